"""Runs and comparisons on a Ray cluster of two nodes, also if nodes are lost or the command is stopped: the results are
those of one process.
"""

import json
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml
from launching import finish, launch, run_recipe
from ray_cluster import Cluster, why_not
from small_model import TRAINING, write_world
from small_run import STEPWISE, figures

PRUNEKIT = str(Path(sys.executable).parent / "prunekit")
LOST = "its process or node was lost"
STOPPED, INTERRUPTED = 75, 130  # exit codes after SIGTERM and after SIGINT
FINE_TUNING_STEPS = 60  # enough to stop the training three times on a busy machine
EVALUATION = {"num_images": 6, "steps": 2, "batch_size": 2, "num_predictions": 8, "num_pictures": 2}

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def cluster():
    if reason := why_not():
        pytest.skip(reason)
    with Cluster() as started:
        for _ in range(2):
            started.add_node()
        yield started


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return folder, write_world(folder)


@pytest.fixture(scope="module")
def recipe(world):
    """Return a recipe of three models with a checkpoint after each step."""
    folder, settings = world
    methods = {"norm": {"samples": 2}, "aptp": {"experts": 2, "warmup": 2, "search": {"steps": 6, **STEPWISE}}}
    content = {**settings, "prune": {"budget": 0.7}, "methods": methods, "evaluation": EVALUATION}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**content, "fine_tune": {"steps": FINE_TUNING_STEPS, **STEPWISE}}))
    return path


@pytest.fixture(scope="module")
def local(recipe):
    """Return the directory of a run by one process."""
    finish(launch(run_recipe(recipe, recipe.parent / "local"), variables={"PRUNEKIT_PROCESSES": "1"}))
    return recipe.parent / "local"


def started(cluster, recipe, directory, *settings):
    return cluster.start(PRUNEKIT, "run", str(recipe), "engine=ray", *settings, "--directory", str(directory))


def ended(command):
    """Wait for a command that must succeed, and return its output."""
    assert command.wait() == 0, command.output()
    return command.output()


def wait_for(folder, pattern, command):
    while command.is_alive and not list(folder.glob(pattern)):
        time.sleep(0.01)
    assert command.is_alive, command.output()


def files(directory):
    """Return names and bytes of the trained models and generated pictures."""
    found = [*directory.glob("methods/*/experts/*/unet/*"), *directory.glob("samples*/**/*.png")]
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def check_equal(directory, local):
    assert files(directory) == files(local) and len(files(local)) > 3 * 2 + 6
    assert figures(directory) == figures(local)
    assert not list(directory.glob("locks*")) and not list(directory.glob("**/*.tmp"))


def test_a_run_is_that_of_one_process(cluster, recipe, local, tmp_path):
    printed = ended(started(cluster, recipe, tmp_path / "run"))
    check_equal(tmp_path / "run", local)
    assert LOST not in printed and "norm 0: fine-tuned on" in printed
    assert re.search(r"stage \d of \d: fine-tune", printed), "the driver says which stage runs"
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in log if row.get("stage") == "aptp 0"]
    assert steps == list(range(1, FINE_TUNING_STEPS + 1)), "rows of tasks are in the log, once and in order"


MOMENTS = {  # files to wait for, and the lock file that the lost node holds
    "while it trains": ("methods/aptp/experts/0/checkpoints/step-00000004", "aptp-0.lock"),
    "when a model is there": ("methods/*/experts/*/unet", "*.lock"),
    "while pictures are drawn": ("samples/*/*.png", "*-samples-*.lock"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_loss_of_a_node_changes_nothing(cluster, recipe, local, tmp_path, moment):
    run, (there, held) = tmp_path / "run", MOMENTS[moment]
    command = started(cluster, recipe, run)
    wait_for(run, there, command)
    cluster.holder(run / "locks" / held, command)[0].kill_all()
    cluster.add_node()
    assert LOST in ended(command)
    check_equal(run, local)


def test_what_is_asked_to_end_saves_first(cluster, recipe, local, tmp_path):
    """Stop the command twice, then a task. Periodic checkpoints are off, but no step is repeated."""
    run, settings = tmp_path / "run", ("fine_tune.checkpoint_minutes=60", "fine_tune.log_every=1")

    def trains_on():
        before = len(logged(run, "norm 0"))
        command = started(cluster, recipe, run, *settings)
        while command.is_alive and len(logged(run, "norm 0")) < before + 2:
            time.sleep(0.01)
        return command

    for number, code in ((signal.SIGTERM, STOPPED), (signal.SIGINT, INTERRUPTED)):
        command = trains_on()
        command.send(number)
        assert command.wait() == code, command.output()
        assert list(run.glob("methods/*/experts/*/checkpoints/step-*"))
        assert "Traceback" not in command.output()
    command = trains_on()
    cluster.holder(run / "locks" / "norm-0.lock", command)[1].send_signal(signal.SIGTERM)
    assert LOST not in ended(command)
    assert files(run) == files(local)
    assert [row["step"] for row in logged(run, "norm 0")] == list(range(1, FINE_TUNING_STEPS + 1))


def logged(directory, stage):
    """Return the rows of a stage in a run's log."""
    log = directory / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    return [row for row in rows if row.get("stage") == stage and "step" in row]


def test_cells_of_a_comparison_are_those_of_one_process(cluster, world, tmp_path):
    folder, settings = world
    path = folder / "compare.yaml"
    content = {**settings, "job": "compare", "methods": {"norm": {"samples": 2}, "random": {}}}
    content |= {"budgets": [{"budget": 0.7, "seeds": [0, 1]}], "protocols": ["equal_steps"], "evaluation": EVALUATION}
    path.write_text(yaml.safe_dump({**content, "fine_tune": {"steps": 3, **TRAINING}}))
    finish(launch(["-m", "prunekit", "compare", path, "--output", tmp_path / "one"], 1, {"PRUNEKIT_PROCESSES": "1"}))
    ended(cluster.start(PRUNEKIT, "compare", str(path), "engine=ray", "--output", str(tmp_path / "ray")))
    cells = [untimed(tmp_path / name) for name in ("one", "ray")]
    assert cells[0] == cells[1] and len(cells[0]) == 6
    assert not json.loads((tmp_path / "ray" / "results.json").read_text())["missing"]


def untimed(directory):
    """Return the cells of a comparison without their times."""
    cells = {path.name: json.loads(path.read_text()) for path in directory.glob("cells/*.json")}
    for cell in cells.values():
        cell["figures"].pop("training_seconds", None)
    return cells


def test_generated_and_evaluated_pictures_are_those_of_one_process(cluster, local, tmp_path):
    wanted = ["--prompt", "red apple", "--prompt", "blue star", "--validation", "3", "--steps", "2"]
    for engine in ("local", "ray"):
        command = [PRUNEKIT, "generate", str(local), *wanted, "--output", str(tmp_path / engine)]
        ended(cluster.start(*command, f"engine={engine}"))
        command = [PRUNEKIT, "evaluate", str(local), "--images", "4", "--output", str(tmp_path / f"table-{engine}")]
        ended(cluster.start(*command, "steps=2", "metrics=[clip_score]", f"engine={engine}"))
    for kind in ("", "table-"):
        drawn = [pictures(tmp_path / f"{kind}{engine}") for engine in ("local", "ray")]
        assert drawn[0] == drawn[1] and len(drawn[0]) > 4
    tables = [json.loads((tmp_path / f"table-{engine}" / "results.json").read_text()) for engine in ("local", "ray")]
    assert tables[0] == tables[1]


def pictures(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*.png")}


def test_what_does_not_fit_the_cluster_is_refused_in_one_line(cluster, recipe, tmp_path):
    """A node cannot see the directory; here it is a file system in memory that the nodes' namespaces lack."""
    elsewhere = "mount -t tmpfs none {0} && exec {1} run {2} engine=ray --directory {0}/run"
    (tmp_path / "hidden").mkdir()
    words = elsewhere.format(tmp_path / "hidden", PRUNEKIT, recipe)
    command = cluster.start("unshare", "--mount", "sh", "-c", words)
    assert command.wait() == 1
    (line,) = [line for line in command.output().splitlines() if line.startswith("prunekit:")]
    assert "does not see" in line and "work in a directory that all nodes share" in line
