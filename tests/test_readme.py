"""The Python code of the README and the docs runs, and named files exist. tests/cli/test_commands.py runs commands."""

import json
import re

import data_layouts
import pytest
import yaml
from diffusers import DiffusionPipeline
from pages import PAGES, ROOT, blocks
from small_mixture import write_mixture
from small_model import RECIPE

from prunekit import PromptRoutedPipeline, PrunedUNet2DConditionModel
from prunekit.evaluation.protocols import PROTOCOLS
from prunekit.export import load_pipeline_directory, register_with_diffusers
from prunekit.export.pipeline_parts import save_pipeline
from prunekit.jobs.recipe import load_recipe
from prunekit.methods import registry
from prunekit.models import load_pipeline
from prunekit.serving.bulk import Request, generate_to
from prunekit.serving.in_process import InProcessBackend
from prunekit.serving.limits import ServerSettings

LANGUAGES = {"sh", "python", "yaml", "toml"}
SERVED = "127.0.0.1:8000"  # an address at which a server is expected
SLOW = ("comparisons", "recovery", "performance", "without_training")
PROGRAMS = [
    pytest.param(bodies, id=page.stem, marks=pytest.mark.long if page.stem in SLOW else ())
    for page in PAGES
    if (bodies := blocks(page, "python"))
]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Return a directory with the files that pages use: a run, its exports, its pictures, and the package's files."""
    folder = tmp_path_factory.mktemp("project")
    run = write_mixture(folder / "runs" / "aptp_emoji", 2)
    pipeline = PromptRoutedPipeline.from_pretrained(run, device="cpu")
    pipeline.save_pretrained(folder / "exported")
    with pipeline.mixture.experts.use(0) as unet:
        save_pipeline(pipeline.parts, unet, folder / "one")
    generate_to(folder / "pictures", pipeline, Request(["red apple"], [0], 1))
    data_layouts.webdataset(folder / "shards", data_layouts.samples(24))
    (folder / "prunekit").symlink_to(ROOT / "prunekit")
    return folder


@pytest.fixture(scope="module")
def served(project):
    """Yield the address of a server of the run."""
    pytest.importorskip("openai")
    from small_server import serving

    backend = InProcessBackend.open(project / "runs" / "aptp_emoji", ServerSettings(devices=("cpu",)))
    with serving(backend) as url:
        yield url.removeprefix("http://")


@pytest.mark.parametrize("bodies", PROGRAMS)
def test_python_runs(bodies, project, request, monkeypatch, capsys):
    """The Python blocks of a page, joined, run as one program."""
    monkeypatch.chdir(project)
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))  # a page may register a method
    for setting, small in (("steps", 1), ("num_references", 50)):
        monkeypatch.setitem(PROTOCOLS["emoji"], setting, small)
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(project / "modules"))
    if any(SERVED in body for body in bodies):
        bodies = [body.replace(SERVED, request.getfixturevalue("served")) for body in bodies]
    names = {"__name__": "page"}
    for body in bodies:
        exec(compile(body, "page", "exec"), names)
    talks = any(word in body for body in bodies for word in ("print(", "pk.evaluate("))
    assert bool(capsys.readouterr().out.strip()) == talks


def test_the_page_on_export_shows_all_that_opens_without_code(project, monkeypatch):
    """After the class is registered, plain diffusers opens a pipeline of the class tier, as the page's recipes do."""
    monkeypatch.delattr("diffusers.pipelines.modeling_pruned", raising=False)  # an earlier test may have set it
    index = json.loads((project / "one" / "model_index.json").read_text())
    assert index["unet"] == ["modeling_pruned", PrunedUNet2DConditionModel.__name__]
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(project / "one")
    register_with_diffusers()
    for load in (DiffusionPipeline.from_pretrained, load_pipeline, load_pipeline_directory):
        assert type(load(project / "one").unet) is PrunedUNet2DConditionModel


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_recipes_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target
    for recipe in re.findall(r"recipes/\w+\.yaml", text):
        assert (ROOT / recipe).is_file(), recipe


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_shown_is_in_a_language_that_is_tried(page):
    """Blocks with braces are Sphinx directives, which the documentation's build checks."""
    assert set(re.findall(r"^ *```([^\n`{]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)) <= LANGUAGES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_settings_that_are_shown_are_settings(page, tmp_path):
    (tmp_path / "aptp_cc3m_base.yaml").symlink_to(ROOT / "recipes" / "aptp_cc3m_base.yaml")  # a page extends it
    (tmp_path / "base").symlink_to(ROOT / "recipes" / "base")
    for body in blocks(page, "yaml"):
        shown = yaml.safe_load(body)
        (tmp_path / "shown.yaml").write_text(yaml.safe_dump(shown if "extends" in shown else {**RECIPE, **shown}))
        recipe = load_recipe(tmp_path / "shown.yaml").model_dump()
        assert set(shown) - {"extends"} <= set(recipe)
