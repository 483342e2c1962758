"""Trackers: their files contain what was logged; the error of a missing tracker names the extra to install."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import LoggerType
from small_disk import small_disk

from prunekit.jobs.stages import RunLog
from prunekit.runtime.tracking import TENSORBOARD, Trackers, TrackingConfig, flat, run_id

NAMES = TrackingConfig.model_fields["trackers"].annotation.__args__[0].__args__
ROWS = [
    {"event": "started", "seconds": 0.1},
    {"stage": "aptp search", "step": 10, "loss": 2.5, "rate": 1e-3, "done": True, "note": "x", "bad": float("nan")},
    {"stage": "aptp search", "step": 20, "loss": 1.5, "rate": 1e-3},
    {"stage": "aptp 0", "step": 10, "loss": 0.5},
    {"stage": "aptp", "seconds": 3.0, "ratio": 0.7},
]
SETTINGS = {"name": "small", "prune": {"budget": 0.7, "include": None}, "methods": {"norm": {}}, "evaluation": [1, 2]}


def trackers(directory: Path, *names: str, settings=SETTINGS) -> Trackers:
    return Trackers(TrackingConfig(trackers=list(names)), "small", directory, settings)


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Return (step, value) of every scalar that TensorBoard finds in a run's directory."""
    return scalars_of(directory / TENSORBOARD)


def scalars_of(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Return (step, value) of every scalar in a directory or a file."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(path)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_has_every_tracker(name):
    assert name in LOGGER_TYPE_TO_CLASS and LoggerType(name)


def test_tensorboard_holds_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    log = RunLog(tmp_path, trackers(tmp_path, "tensorboard"))
    for row in ROWS:
        log.log(row)
    log.trackers.close()
    assert [json.loads(line)["stage"] for line in (tmp_path / "log.jsonl").read_text().splitlines()[1:4]]
    found = scalars(tmp_path)
    assert found["aptp search/loss"] == [(10, 2.5), (20, 1.5)]
    assert found["aptp 0/loss"] == [(10, 0.5)] and found["aptp/ratio"] == [(0, pytest.approx(0.7))]
    assert not any(tag.endswith(("/done", "/note", "/bad", "/step")) or "event" in tag for tag in found)
    assert [path for path in (tmp_path / TENSORBOARD).rglob("hparams.yml") if "prune.budget: 0.7" in path.read_text()]


def test_a_resumed_run_goes_on_in_the_same_place(tmp_path):
    pytest.importorskip("tensorboard")
    for step in (10, 20):
        once = trackers(tmp_path, "tensorboard")
        once.log({"stage": "norm 0", "step": step, "loss": 1.0})
        once.close()
        once.log({"stage": "norm 0", "step": 99, "loss": 1.0})  # the tracker is closed, so this does nothing
    assert [step for step, _ in scalars(tmp_path)["norm 0/loss"]] == [10, 20]
    assert len(list((tmp_path / TENSORBOARD).rglob("hparams.yml"))) == 1


@pytest.mark.long
def test_a_run_writes_them(tmp_path):
    pytest.importorskip("tensorboard")
    from small_model import write_recipe, write_world

    from prunekit.jobs.run import start

    world = write_world(tmp_path / "world")
    path = write_recipe(tmp_path / "small.yaml", world.pop("model"), **world, tracking={"trackers": ["tensorboard"]})
    start(path, directory=tmp_path / "run")
    assert [step for step, _ in scalars(tmp_path / "run")["norm 0/loss"]] == [4]


def test_without_trackers_nothing_is_written(tmp_path):
    none = trackers(tmp_path)
    none.log(ROWS[1])
    none.close()
    assert not list(tmp_path.iterdir())


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"wandb.*not installed: pip install 'prunekit\[tracking\]'"):
        trackers(tmp_path, "wandb")


def test_an_unknown_tracker_is_refused():
    with pytest.raises(ValueError, match="tensorboard"):
        TrackingConfig(trackers=["tensorbord"])


def test_a_tracker_that_fails_is_one_line(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / TENSORBOARD).write_text("a file where the folder goes")
    with pytest.raises(ValueError, match=r"tensorboard does not start: .*remove it from tracking\.trackers"):
        trackers(tmp_path, "tensorboard")


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("started", [False, True])
def test_a_full_disk_is_one_error_that_names_the_folder(tmp_path, started):
    """TensorBoard writes in a thread. Once, the thread's traceback was shown, and again when the process ended."""
    pytest.importorskip("tensorboard")
    with small_disk(tmp_path) as disk:
        if not started:
            disk.fill(left=0)
            with pytest.raises(ValueError, match=rf"does not start: .*{disk.full}.*{tmp_path / TENSORBOARD}"):
                trackers(tmp_path, "tensorboard")
            return
        several = trackers(tmp_path, "tensorboard")
        disk.fill()
        with pytest.raises(OSError, match=disk.full) as error:
            for step in range(1000):
                several.log({"stage": "aptp search", "step": step, "loss": 1.5})
        assert error.value.filename == str(tmp_path / TENSORBOARD)
        several.close()
        disk.free()
        trackers(tmp_path, "tensorboard").log({"stage": "aptp search", "step": 2000, "loss": 0.5})
        found = map(scalars_of, (tmp_path / TENSORBOARD).glob("events*"))
        first, second = sorted([step for step, _ in each["aptp search/loss"]] for each in found)
        assert first == list(range(len(first))) and len(first) > 10 and second == [2000]


def test_run_ids_are_a_directorys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_id(Path("a")) == run_id(tmp_path / "a") == run_id(tmp_path / "b" / ".." / "a") != run_id(Path("b"))
    assert flat(SETTINGS)["prune.budget"] == 0.7


OFFLINE = """
import sys
from pathlib import Path
from prunekit.runtime.tracking import TrackingConfig, Trackers
for start in range(2):
    trackers = Trackers(TrackingConfig(trackers=[sys.argv[1]]), "small", Path(sys.argv[2]), {"prune": {"budget": 0.7}})
    for step in (10 * start + 5, 10 * start + 10):
        trackers.log({"stage": "aptp search", "step": step, "loss": 1.5})
    trackers.log({"stage": "aptp 0", "step": 5, "loss": 0.5})
    trackers.close()
"""


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_work_offline(name, tmp_path):
    pytest.importorskip(name)
    settings = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(tmp_path / "trackio")}
    command = [sys.executable, "-c", OFFLINE, name, str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".wandb", ".db")]
    assert files, list(tmp_path.rglob("*"))
    content = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"aptp search/loss" in content and b"aptp 0/loss" in content
