"""Random command lines end with status 0, 1 or 2, print one error line, and write only to the working directory.

`PRUNEKIT_FUZZ=10 pytest tests/cli/test_fuzz_arguments.py` tries 300. The words contain no existing model or recipe, so
that no command starts long work; commands that only display something are an exception.
"""

import itertools
import json
import os
import tempfile
from functools import cache
from pathlib import Path

import pytest
import yaml
from fuzz_figures import Figures, shown
from fuzzing import TIMEOUT, forked, fuzzed, measured
from hypothesis import given
from hypothesis import strategies as st
from small_model import RECIPE
from typer.testing import CliRunner

from prunekit.cli import app

pytestmark = TIMEOUT
OPTIONS = {  # options by command
    "run": ["--directory"],
    "resume": [],
    "compare": ["--output"],
    "plan": ["--throughput", "--measure", "--devices", "--precision", "--json"],
    "check": ["--devices"],
    "units": ["--depth", "--include", "--exclude"],
    "macs": ["--size", "--text-length", "--convention", "--check"],
    "methods": [],
    "recipes": [],
    "recipes copy": [],
    "generate": [
        *("--prompt", "--prompts-file", "--list", "--validation", "--extremes", "--method", "--seed", "--steps"),
        *("--negative-prompt", "--guidance", "--batch-size", "--max-resident", "--format", "--output"),
    ],
    "evaluate": ["--protocol", "--data", "--images", "--output"],
    "report": ["--sensitivity"],
    "demo": ["--method", "--host", "--port", "--device"],
    "serve": [
        *("--method", "--host", "--port", "--device", "--name", "--max-batch", "--deterministic", "--max-resident"),
        *("--max-queued", "--max-steps", "--max-images", "--max-letters", "--max-pixels", "--request-timeout"),
        "--api-key",
    ],
    "export": ["--tier", "--method", "--expert", "--batch", "--push", "--fold-modulation", "--prompts-file"],
    "import": ["--output", "--model", "--prompt-encoder"],
    "bench": ["--output", "--minutes", "--reduced"],
}
FILES = {  # files of a wrong kind in the working directory
    "empty.yaml": b"",
    "list.yaml": b"- 1\n- 2\n",
    "deep.yaml": b"a: " + b"[" * 3000 + b"]" * 3000,
    "deepmap.yaml": b"{a: " * 1200 + b"1" + b"}" * 1200,
    "latin.yaml": b"name: gr\xfcn\n",
    "binary.yaml": bytes(range(256)),
    "code.yaml": b"!!python/object/apply:os.system [touch ran]\n",
    "bench.yaml": b"job: bench\nname: ../../x\ncells: [{workload: unet}]\nmodel: nothing\n",
    "secret.yaml": b"job: bench\nname: ${oc.env:HOME}\ncells: []\n",
    "compare.yaml": b"job: compare\nname: x\n",
    "small.yaml": yaml.safe_dump({**RECIPE, "model": "./nothing"}).encode(),
    "model.safetensors": b"\xff" * 64,
    "model.ckpt": b"\x80\x04.",
    "prompts.txt": b"red apple\n\nblue \xff\n",
    "table.json": b"[1",
    "folder/a.txt": b"a",
    "run/recipe.yaml": b"name: [",
    "run/log.jsonl": b"{",
    "made/recipe.yaml": yaml.safe_dump({**RECIPE, "job": "prune", "model": "./nothing"}).encode(),
    "made/results.json": b"[]",
    "comparison/recipe.yaml": b"job: compare\nname: x\n",
    "comparison/table.json": b"{",
    "pipeline/model_index.json": json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["a", "b"]}).encode(),
    "unet/config.json": b'{"_class_name": "UNet2DConditionModel", "block_out_channels": [-1, 0]}',
    "export/prunekit.json": b"{}",
}
PLACES = (*FILES, "folder", "run", "made", "comparison", "pipeline", "unet", "export", "loop", "pipe", "missing", ".")
WORDS = (
    *("", " ", "-", "--", "---", "-x", "--nothing", "--help", "--debug", "=", "a=b", "a.b.c=1", "=1", "a=", "\t", "\n"),
    *("0", "-1", "1", "3", "1e999", "nan", "inf", "9" * 30, "0x10", "1.5", "64x", "x64", "64x64", "999999999"),
    *("a" * 300, "a" * 20_000, "кадр", "😀", "\u202e", "\x1b[31m", "\0", "\udcff", "a\nb", "%s", "{}", "*", "[bold]"),
    *("../../x", "/dev/zero", "/dev/null", "/etc/passwd", "/", "~", "~nobody", "a/b", "a/b/c", "https://x.invalid/a"),
    *("norm", "aptp", "all", "exact", "png", "stock", "auto", "cpu", "cuda:99", "float16", "name=../../x"),
    *("model=./x", "prune.budget=2", "methods={", "fine_tune=3", "x=${oc.env:HOME}", "extends=a", "scale=b", "[0]=1"),
)
LOOKED_AT = ("units", "macs", "recipes", "methods")  # commands that may get an existing model
MODELS = ("sd-1.5", "emoji")


def line() -> st.SearchStrategy[list[str]]:
    """Return a strategy of command lines: a command, then words, paths and options in any order."""
    word = st.sampled_from(WORDS) | st.sampled_from(PLACES)

    def rest(command: str) -> st.SearchStrategy[list[str]]:
        option = st.sampled_from(OPTIONS[command]) if OPTIONS[command] else st.just("--unknown")
        given = st.tuples(option, word).map(list)
        models = st.sampled_from(MODELS) if command in LOOKED_AT else st.sampled_from(PLACES)
        one = (word | st.sampled_from(PLACES)).map(lambda text: [text])
        parts = st.lists(one | given, max_size=4)
        whole = parts | st.tuples(models.map(lambda text: [text]), parts).map(lambda two: [two[0], *two[1]])
        return whole.map(lambda words: [*command.split(), *itertools.chain(*words)])

    return st.sampled_from(sorted(OPTIONS)).flatmap(rest) | st.lists(word, max_size=3)


def write_files(folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")


def ended(words: list[str]) -> tuple[int, str]:
    """Run a command, check that its status is 0, 1 or 2 and an error is one line; return the status and the line."""
    result = CliRunner().invoke(app, words)
    if not (result.exception is None or isinstance(result.exception, SystemExit)):
        raise result.exception
    assert result.exit_code in (0, 1, 2), result.exit_code
    text = result.stderr
    if result.exit_code:
        assert text.startswith("prunekit: ") and len(text.splitlines()) == 1, text
        assert text.removesuffix("\n").isprintable(), text
    return result.exit_code, text.strip()


FIGURES = Figures("command lines")
figures = shown(FIGURES)
WHOLE = ["macs", "sd-1.5"]  # the largest model that a command line may contain


@cache
def seconds_of_whole() -> float:
    """Return the CPU time of the slowest valid command line."""
    ended(WHOLE)  # imports all modules
    outcome = forked(lambda: ended(WHOLE), 60)
    assert outcome.kind == "done" and outcome.value == (0, ""), outcome.value
    return outcome.seconds


def check(words: list[str]) -> tuple[int, str]:
    whole = seconds_of_whole()
    with tempfile.TemporaryDirectory() as root:
        work = Path(root) / "work"
        work.mkdir()
        write_files(work)
        before = sorted(Path(root).rglob("*"))

        def work_there() -> tuple[int, str]:
            os.chdir(work)
            return ended([word for word in words if word != "--debug"])

        outcome = measured(work_there, whole)
        with FIGURES.case(words):
            FIGURES.check(outcome, whole, [root])
            FIGURES.refused += outcome.value[0] != 0
            assert all(path.is_relative_to(work) for path in set(Path(root).rglob("*")) - {*before})
            assert not (work / "ran").exists()
        return outcome.value


@fuzzed(30)
@given(line())
def test_any_command_line_ends_in_one_line(words):
    check(words)


def test_a_benchmarks_recipe_reads_no_environment(monkeypatch):
    monkeypatch.setenv("HOME", "/hunter2")
    status, text = check(["bench", "secret.yaml"])
    assert status == 1 and "hunter2" not in text


@pytest.mark.parametrize("name", ["deep.yaml", "deepmap.yaml", "latin.yaml", "binary.yaml"])
@pytest.mark.parametrize("command", ["plan", "bench"])
def test_a_file_that_is_no_recipe_is_one_line(command, name):
    status, text = check([command, name])
    assert status == 1 and name in text
