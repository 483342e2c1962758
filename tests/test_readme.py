"""What the README and the docs show is real: commands parse, files exist, Python runs."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer
from diffusers import DiffusionPipeline
from small_mixture import write_mixture

from prunekit import PromptRoutedPipeline, PrunedUNet2DConditionModel
from prunekit.cli import app
from prunekit.export import load_pipeline_directory
from prunekit.export.parts import save_pipeline
from prunekit.models import load_pipeline
from prunekit.serving.bulk import Request, generate_to

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list:
    return [
        pytest.param(body, id=f"{page.stem}-{index}")
        for page in PAGES
        for index, (kind, body) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
        if kind == language
    ]


def commands() -> list:
    found = []
    for block in blocks("sh"):
        for line in block.values[0].replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["prunekit"]:
                found.append(pytest.param(words[1:], id=" ".join(words)))
    return found


@pytest.mark.parametrize("words", commands())
def test_every_command_parses(words):
    group = typer.main.get_command(app)
    command = group.commands[words[0]]
    context = command.make_context(words[0], list(words[1:]))
    recipe = context.params.get("recipe")
    assert recipe is None or (ROOT / recipe).is_file()


def test_the_readme_has_commands_and_names_them_all():
    shown = {param.values[0][0] for param in commands()}
    assert shown == set(typer.main.get_command(app).commands)


@pytest.mark.parametrize("block", blocks("sh"))
def test_every_make_target_exists(block):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", block, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def programs() -> list:
    """The Python of each page: its blocks, which go on from one another, as one program."""
    found = [
        (page, [body for kind, body in BLOCK.findall(page.read_text("utf-8")) if kind == "python"]) for page in PAGES
    ]
    return [pytest.param(bodies, id=page.stem) for page, bodies in found if bodies]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A directory with what the pages name: a run, its exports, its pictures, and the package's own files."""
    folder = tmp_path_factory.mktemp("project")
    run = write_mixture(folder / "runs" / "aptp_emoji", 2)
    pipeline = PromptRoutedPipeline.from_pretrained(run, device="cpu")
    pipeline.save_pretrained(folder / "exported")
    with pipeline.mixture.experts.use(0) as unet:
        save_pipeline(pipeline.parts, unet, folder / "one")
    generate_to(folder / "pictures", pipeline, Request(["red apple"], [0], 1))
    (folder / "prunekit").symlink_to(ROOT / "prunekit")
    return folder


@pytest.mark.parametrize("bodies", programs())
def test_python_runs(bodies, project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(project / "modules"))
    names = {"__name__": "page"}
    for body in bodies:
        exec(compile(body, "page", "exec"), names)
    assert bool(capsys.readouterr().out.strip()) == any("print(" in body for body in bodies)


def test_the_page_on_export_shows_all_that_opens_without_code(project):
    """After `import prunekit` plain diffusers opens a class-tier pipeline by prunekit's own class, as recipes do."""
    index = json.loads((project / "one" / "model_index.json").read_text())
    assert index["unet"] == ["modeling_pruned", PrunedUNet2DConditionModel.__name__]
    for load in (DiffusionPipeline.from_pretrained, load_pipeline, load_pipeline_directory):
        assert type(load(project / "one").unet) is PrunedUNet2DConditionModel


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_recipes_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target
    for recipe in re.findall(r"recipes/\w+\.yaml", text):
        assert (ROOT / recipe).is_file(), recipe
