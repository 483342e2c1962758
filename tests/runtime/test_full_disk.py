"""A full disk in any stage of a run: one line names the file, no file is half-written, and the run resumes."""

import errno
from contextlib import nullcontext

import pytest
import yaml
from launching import launch, run_recipe
from small_disk import LimitedFiles, SmallDisk, below, check_whole, full_at, one_line, small_disk
from small_model import TRAINING, write_world
from small_run import figures
from typer.testing import CliRunner

from prunekit.cli import app
from prunekit.jobs.reporting import finish
from prunekit.runtime.progress import console

WRITES_REPORTS = True
NOT_MOUNTED = "a file system cannot be mounted here"
STAGES = {  # stage: the file at which the disk becomes full
    "encoding": "run/cache/text-*/*.safetensors",
    "search": "run/methods/aptp/checkpoints/step-00000002",
    "fine-tuning": "run/methods/aptp/experts/1/checkpoints/step-00000002",
    "sampling": "run/samples/norm/00001.png",
    "table": "run/results.json",
    "report": "run/report.html",
}
SLOW = ("fine-tuning", "sampling", "table", "report")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Return the path of a recipe with every stage and a checkpoint after each step."""
    folder, stepwise = tmp_path_factory.mktemp("world"), {**TRAINING, "checkpoint_minutes": 1e-9}
    content = {
        **write_world(folder),
        "prune": {"budget": 0.7},
        "methods": {"norm": {"samples": 2}, "aptp": {"experts": 2, "warmup": 1, "search": {"steps": 3, **stepwise}}},
        "fine_tune": {"steps": 2, **stepwise},
        "evaluation": {"num_images": 4, "steps": 1, "batch_size": 2, "num_predictions": 4, "num_pictures": 1},
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(content))
    return folder / "small.yaml"


def run(recipe, directory, page=False):
    with pytest.MonkeyPatch.context() as patches:
        patches.setenv("PRUNEKIT_PROCESSES", "1")
        if not page:  # the page takes longest and has no figures
            patches.setattr("prunekit.jobs.run.finish", lambda *given: None)
        return CliRunner().invoke(app, ["run", str(recipe), "--directory", str(directory)])


@pytest.fixture(scope="module")
def undisturbed(recipe):
    """Return the figures of a run with enough disk space."""
    directory = recipe.parent / "undisturbed"
    result = run(recipe, directory)
    assert result.exit_code == 0, result.output
    return figures(directory)


@pytest.fixture(scope="module", params=[SmallDisk, pytest.param(LimitedFiles, marks=pytest.mark.long)])
def disk(request, tmp_path_factory):
    """Yield the disk of a run; the disk becomes full in each stage."""
    with small_disk(tmp_path_factory.mktemp("disk"), request.param) as disk:
        yield disk


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=pytest.mark.long) if stage in SLOW else stage for stage in STAGES]
)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(stage, recipe, disk):
    directory = disk.folder / "run"
    with full_at(disk, STAGES[stage]) as met, console.capture() as shown:
        result = run(recipe, directory, page=stage == "report")
    assert met, f"the run has not come to {STAGES[stage]}"
    if stage == "report":  # the figures are written, so the run succeeds and says that the report is missing
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
    if (directory / "results.json").exists():  # all stages except the page are finished
        assert CliRunner().invoke(app, ["report", str(directory)]).exit_code == 0
        assert (directory / "report.html").stat().st_size > 10_000
    result = run(recipe, directory)
    assert result.exit_code == 0, result.output
    check_whole(directory)
    assert figures(directory) == undisturbed


@pytest.mark.long
def test_a_disk_that_gets_full_at_every_file_of_a_run(recipe, undisturbed, tmp_path):
    """Repeat the run until it ends; each time the disk becomes full at the next file, with no byte left."""
    with small_disk(tmp_path) as disk:
        directory, past = tmp_path / "run", set()
        while True:
            with full_at(disk, "run/*", past, left=0) as met, console.capture():
                result = run(recipe, directory)
            if not met:
                break
            past.add(below(disk, met[0]))
            assert result.exit_code == 1 and isinstance(result.exception, SystemExit), repr(result.exception)
            (said,) = result.stderr.strip().splitlines()
            assert f"{disk.full}: " in said and str(directory) in said and ".tmp" not in said
            check_whole(directory)
        assert result.exit_code == 0 and len(past) > 50
        assert figures(directory) == undisturbed


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_log_without_room_for_the_last_line_loses_no_run(number, tmp_path):
    said = []

    def say(text):
        said.append(text)
        raise OSError(number, "x")

    with nullcontext() if number == errno.ENOSPC else pytest.raises(OSError, match="x"):
        finish(tmp_path, say)
    assert len(said) == 1 and "is neither a run" in said[0]


@pytest.fixture(scope="module")
def undisturbed_of_two(recipe):
    """Return the figures of a run of two processes with enough disk space."""
    (process,) = launch(run_recipe(recipe, recipe.parent / "two"), variables={"PRUNEKIT_PROCESSES": "2"})
    assert process.wait() == 0, process.printed()
    return figures(recipe.parent / "two")


@pytest.mark.long
@pytest.mark.parametrize("room", [60, 3500])  # free KiB: full in encoding, full in fine-tuning
def test_a_full_disk_ends_both_processes_of_a_command(room, recipe, undisturbed_of_two, tmp_path):
    with small_disk(tmp_path) as disk:
        if not isinstance(disk, SmallDisk):
            pytest.skip(NOT_MOUNTED)
        directory = tmp_path / "run"
        for left, code in ((room * 1024, 1), (None, 0)):
            if left:
                disk.fill(left)
            (process,) = launch(run_recipe(recipe, directory), variables={"PRUNEKIT_PROCESSES": "2"})
            assert process.wait() == code, process.printed()
            disk.free()
            text = process.printed()
            assert "Traceback" not in text and "2 processes" in text and text.count("prunekit: ") == code
            assert code == 0 or one_line(f"prunekit: [Errno {errno.ENOSPC}] {disk.full}: ") in one_line(text)
            check_whole(directory)
        assert figures(directory) == undisturbed_of_two
