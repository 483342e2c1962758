"""A disk that gets full in any stage of a run: one line that names the file, nothing half-written, and a resume."""

import json

import pytest
import yaml
from PIL import Image
from safetensors import safe_open
from small_disk import LimitedFiles, SmallDisk, full_at, small_disk
from small_model import TRAINING, write_world
from small_run import figures
from typer.testing import CliRunner

from prunekit.cli import app
from prunekit.training.progress import console

WRITES_REPORTS = True
STAGES = {  # the file at which the disk gets full
    "encoding": "run/cache/text-*/*.safetensors",
    "search": "run/methods/aptp/checkpoints/step-00000002",
    "fine-tuning": "run/methods/aptp/experts/1/checkpoints/step-00000002",
    "sampling": "run/samples/norm/00001.png",
    "table": "run/results.json",
    "report": "run/report.html",
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe of every stage, with a checkpoint after each step."""
    folder, stepwise = tmp_path_factory.mktemp("world"), {**TRAINING, "checkpoint_minutes": 1e-9}
    content = {
        **write_world(folder),
        "prune": {"budget": 0.7},
        "methods": {"norm": {}, "aptp": {"experts": 2, "warmup": 1, "search": {"steps": 3, **stepwise}}},
        "fine_tune": {"steps": 2, **stepwise},
        "evaluation": {"num_images": 4, "steps": 1, "batch_size": 2, "num_predictions": 4, "num_pictures": 1},
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(content))
    return folder / "small.yaml"


def run(recipe, directory):
    with pytest.MonkeyPatch.context() as patches:
        patches.setenv("PRUNEKIT_PROCESSES", "1")
        return CliRunner().invoke(app, ["run", str(recipe), "--directory", str(directory)])


@pytest.fixture(scope="module")
def undisturbed(recipe):
    """The figures of a run with room enough."""
    directory = recipe.parent / "undisturbed"
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr("prunekit.run.finish", lambda *given: None)  # the page takes longest, and has no figures
        result = run(recipe, directory)
    assert result.exit_code == 0, result.output
    return figures(directory)


@pytest.fixture(scope="module", params=[SmallDisk, pytest.param(LimitedFiles, marks=pytest.mark.long)])
def disk(request, tmp_path_factory):
    """The disk of one run, which meets the end of the disk in each stage."""
    with small_disk(tmp_path_factory.mktemp("disk"), request.param) as disk:
        yield disk


def check_whole(directory):
    """Every file that is there can be read, and none is hidden."""
    for path in directory.rglob("*"):
        assert not path.name.startswith(".") and path.suffix not in (".tmp", ".old"), path
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            assert all(isinstance(json.loads(line), dict) for line in path.read_text().splitlines())
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                assert list(file.keys())


def one_line(text):
    """A text without the line breaks of a narrow terminal."""
    return text.replace("\n", "").replace(" ", "")


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(stage, recipe, disk):
    directory = disk.folder / "run"
    with full_at(disk, STAGES[stage]) as met, console.capture() as shown:
        result = run(recipe, directory)
    assert met, f"the run has not come to {STAGES[stage]}"
    if stage == "report":  # the figures are written: the run has ended, and says what is missing
        assert result.exit_code == 0 and (directory / "results.json").exists(), result.output
        said = shown.get().partition("no report (")[2]
        assert f"`prunekitreport{directory}`triesagain" in one_line(said)
    else:
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit), repr(result.exception)
        (said,) = result.stderr.strip().splitlines()
        assert said.startswith("prunekit: ")
    assert one_line(f"{disk.full}: ") in one_line(said) and f"'{met[0]}'" in one_line(said)
    assert not met[0].exists()
    check_whole(directory)


def test_with_room_again_the_run_ends_with_the_same_figures(recipe, disk, undisturbed):
    directory = disk.folder / "run"
    if (directory / "results.json").exists():  # all stages but the page are over
        assert CliRunner().invoke(app, ["report", str(directory)]).exit_code == 0
    else:
        assert run(recipe, directory).exit_code == 0
    assert (directory / "report.html").stat().st_size > 10_000
    check_whole(directory)
    assert figures(directory) == undisturbed
