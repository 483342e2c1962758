"""A run of two processes: killed repeatedly, one process lost, stopped by SIGTERM; the table is always the same."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launching import environment, launch, run_recipe
from small_run import figures, write_small_recipe

KILLS = int(os.environ.get("PRUNEKIT_KILLS", "3"))  # set the variable for more
STOPPED = 75  # exit code of a run after SIGTERM


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_small_recipe(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def straight(recipe):
    """Return the directory of an undisturbed run."""
    assert codes(started(recipe, recipe.parent / "straight")) == [0, 0]
    return recipe.parent / "straight"


def started(recipe, directory):
    return launch(run_recipe(recipe, directory), count=2)


def codes(processes):
    return [process.wait() for process in processes]


def losses(directory):
    """Return the losses by stage and step; a repeated step has several losses."""
    found = {}
    for line in (directory / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "loss" in row:
            found.setdefault((row["stage"], row["step"]), set()).add(row["loss"])
    return found


def logged(directory):
    """Return the number of rows in a run's log."""
    log = directory / "log.jsonl"
    return len(log.read_text().splitlines()) if log.is_file() else 0


def wait_for(folder, pattern, process):
    while process.is_alive and not list(folder.glob(pattern)):
        time.sleep(0.002)


@pytest.mark.long
def test_killed_again_and_again(recipe, straight, tmp_path):
    draw, delivered = random.Random(0), 0
    for _ in range(KILLS):
        rows = logged(tmp_path / "run") + draw.randint(0, logged(straight) // 3)
        processes = started(recipe, tmp_path / "run")
        while logged(tmp_path / "run") < rows and processes[0].is_alive:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.2))  # a random time between two rows of the log
        delivered += all(process.is_alive for process in processes)
        for process in processes:
            process.send(signal.SIGKILL)
        codes(processes)
    assert delivered >= min(KILLS, 2)
    assert codes(started(recipe, tmp_path / "run")) == [0, 0]
    assert figures(tmp_path / "run") == figures(straight)


@pytest.mark.long
def test_the_loss_of_one_process_leaves_the_other_at_work(recipe, straight, tmp_path):
    first, second = started(recipe, tmp_path / "run")
    wait_for(tmp_path / "run", "methods/*/experts/*/checkpoints/step-*", second)
    second.send(signal.SIGKILL)
    assert codes([first, second]) == [0, -signal.SIGKILL]
    assert figures(tmp_path / "run") == figures(straight)


@pytest.mark.long
def test_sigterm_to_one_saves_and_ends_both_with_the_code_to_start_again(recipe, straight, tmp_path):
    first, second = started(recipe, tmp_path / "run")
    wait_for(tmp_path / "run", "methods/aptp/checkpoints/step-*", first)
    second.send(signal.SIGTERM)
    assert codes([first, second]) == [STOPPED, STOPPED]
    assert len(list((tmp_path / "run").glob("methods/aptp/checkpoints/step-*"))) == 1
    assert codes(started(recipe, tmp_path / "run")) == [0, 0]
    assert figures(tmp_path / "run") == figures(straight)


@pytest.mark.long
def test_torchrun_starts_a_launch_again_that_lost_a_process(recipe, straight, tmp_path):
    """`torchrun --max-restarts`: all processes restart, and resume from the last checkpoint of the search."""
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--max-restarts", "1", *run_recipe(recipe, tmp_path / "run")]
    with (tmp_path / "printed").open("w") as printed:
        process = subprocess.Popen(command, env=environment(), stdout=printed, stderr=printed)
        while process.poll() is None and not list((tmp_path / "run").glob("methods/aptp/checkpoints/step-*")):
            time.sleep(0.002)
        ranks = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children()}
        ranks["1"].kill()
        assert process.wait(500) == 0, (tmp_path / "printed").read_text()
    assert "failed (exitcode: -9) local_rank: 1" in (tmp_path / "printed").read_text()
    assert figures(tmp_path / "run") == figures(straight)
    ours, theirs = losses(tmp_path / "run"), losses(straight)
    assert ours == theirs and len([step for step in ours if step[0] == "aptp search"]) == 6
