"""A command that starts more processes of itself on a CPU: how many, the same results, and no process left behind."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from launching import finish, launch, run_recipe
from small_model import TRAINING, write_world
from small_run import figures, write_small_recipe

import prunekit
from prunekit.jobs import process_count
from prunekit.jobs.recipe import load_recipe
from prunekit.runtime import companions
from prunekit.runtime.errors import UserError
from prunekit.runtime.termination import REQUEUE

RECIPES = Path(prunekit.__file__).parents[1] / "recipes"


@pytest.fixture
def quickstart():
    return load_recipe(RECIPES / "quickstart.yaml")


@pytest.fixture
def eight_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_small_recipe(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def alone(recipe):
    """Return the directory of a run with one process."""
    finish(launch(run_recipe(recipe, recipe.parent / "alone")))
    return recipe.parent / "alone"


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setenv(companions.COUNT, "2")


def others_of(directory):
    """Return the ids of this machine's prunekit processes that work in a directory."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(directory).encode() in words and b"prunekit" in words:
            found.append(int(folder.name))
    return found


def started(recipe, directory, rows):
    """Start a run, wait until it has logged `rows` rows, and return its process and its companion's process id."""
    (main,) = launch(run_recipe(recipe, directory))
    log = directory / "log.jsonl"
    while main.is_alive and not (log.is_file() and len(log.read_text().splitlines()) >= rows):
        time.sleep(0.01)
    (other,) = others_of(directory)
    return main, other


def gone(directory, seconds=20.0):
    """Wait at most `seconds` until no process works in a directory; return whether none does."""
    end = time.monotonic() + seconds
    while others_of(directory) and time.monotonic() < end:
        time.sleep(0.1)
    return not others_of(directory)


def search_losses(directory):
    rows = map(json.loads, (directory / "log.jsonl").read_text().splitlines())
    losses = [row["loss"] for row in rows if row.get("stage") == "aptp search"]
    assert losses
    return losses


def known(row):
    """Return a row's figures that are not None."""
    return {key: value for key, value in row.items() if value is not None}


def assert_alike(rows, others):
    """Check that rows of a table agree up to rounding, which the small model's few fine-tuning steps amplify."""
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    for row, other in zip(rows, others, strict=True):
        for name in ("name", "params", "macs", "macs_ratio"):
            assert row.pop(name) == other.pop(name)
        assert row.pop("agreement") == pytest.approx(other.pop("agreement"), rel=1e-2)
        assert known(row) == pytest.approx(known(other), rel=1e-2, abs=0.05)


def test_one_process_for_each_thread_of_a_small_model(quickstart, monkeypatch):
    for threads, count in ((1, 1), (2, 2), (64, process_count.MOST)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert process_count.process_count(quickstart) == count


def test_no_more_than_the_smallest_batch_has_samples(eight_threads):
    recipe = load_recipe(RECIPES / "quickstart.yaml", ["methods.aptp.search.batch_size=3"])
    assert process_count.process_count(recipe) == 3


@pytest.mark.parametrize("name", companions.LAUNCHED)
def test_none_under_a_launcher(quickstart, eight_threads, monkeypatch, name):
    monkeypatch.setenv(name, "2")
    assert process_count.process_count(quickstart) == 1


def test_none_on_a_gpu_and_for_what_is_large_or_not_shared(quickstart, eight_threads, monkeypatch):
    assert process_count.process_count(load_recipe(RECIPES / "pretrain_emoji.yaml")) == 1
    assert process_count.process_count(load_recipe(RECIPES / "aptp_cc3m_base.yaml")) == 1
    monkeypatch.setattr(process_count, "SMALL", 1000)
    assert process_count.process_count(quickstart) == 1
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert process_count.process_count(quickstart) == 1


@pytest.mark.parametrize("given", ["0", "-1", "two", "1.5"])
def test_the_users_number_is_checked(quickstart, monkeypatch, given):
    monkeypatch.setenv(companions.COUNT, given)
    with pytest.raises(UserError, match=companions.COUNT):
        process_count.process_count(quickstart)
    monkeypatch.setenv(companions.COUNT, "3")
    assert process_count.process_count(quickstart) == 3


@pytest.mark.long
def test_two_processes_end_where_one_does(recipe, alone, tmp_path, two):
    (said,) = finish(launch(run_recipe(recipe, tmp_path / "run")))
    said = " ".join(said.split())
    assert said.count("2 processes") == 1 and said.count("an agreement MSE of") == 1 and "The run is in" in said
    ours, theirs = (figures(folder) for folder in (tmp_path / "run", alone))
    assert_alike(ours[2]["table"]["rows"], theirs[2]["table"]["rows"])
    assert search_losses(tmp_path / "run") == pytest.approx(search_losses(alone), rel=1e-5)
    assert gone(tmp_path / "run") and not list((tmp_path / "run").glob("**/*.lock"))


@pytest.mark.long
def test_a_process_that_does_not_start_is_done_without(recipe, tmp_path, two):
    script = [str(Path(prunekit.__file__).parent / "__main__.py"), *run_recipe(recipe, tmp_path / "run")[2:]]
    code = f"""
import subprocess, sys
from prunekit.cli import main
begin, sys.argv = subprocess.Popen, {script}
subprocess.Popen = lambda command, **given: begin([sys.executable, "-c", "raise SystemExit(9)"], **given)
main()
"""
    (said,) = finish(launch(["-c", code]))
    assert "continuing in one process: another process of this command ended with status 9" in said
    assert (tmp_path / "run" / "results.json").is_file()


@pytest.mark.long
def test_a_process_lost_in_the_search_is_one_line(recipe, tmp_path, two):
    main, other = started(recipe, tmp_path / "run", rows=7)
    os.kill(other, signal.SIGKILL)
    assert main.wait() == 1
    assert "prunekit: another process of this command ended with status -9" in main.printed()
    assert "Traceback" not in main.printed()
    finish(launch(run_recipe(recipe, tmp_path / "run")))


@pytest.mark.long
def test_a_killed_command_leaves_no_process(recipe, tmp_path, two):
    main, _ = started(recipe, tmp_path / "run", rows=6)
    main.send(signal.SIGKILL)
    assert main.wait() == -signal.SIGKILL and gone(tmp_path / "run")


@pytest.mark.long
@pytest.mark.long
@pytest.mark.parametrize("rows", [7, 14], ids=["in the search", "in fine-tuning"])
def test_sigterm_ends_both_with_the_code_to_start_again(recipe, alone, tmp_path, two, rows):
    main, _ = started(recipe, tmp_path / "run", rows)
    main.send(signal.SIGTERM)
    assert main.wait() == REQUEUE and gone(tmp_path / "run")
    finish(launch(run_recipe(recipe, tmp_path / "run")))
    ours, theirs = (figures(folder)[2]["table"]["rows"] for folder in (tmp_path / "run", alone))
    assert_alike(ours, theirs)


@pytest.mark.long
@pytest.mark.long
def test_a_comparison_is_whole_when_its_command_ends(tmp_path, two):
    content = {
        "job": "compare",
        **write_world(tmp_path),
        "budgets": [{"budget": 0.8, "seeds": [0, 1], "methods": ["norm", "random"]}],
        "methods": {"norm": {"samples": 2}, "random": {}},
        "fine_tune": {"steps": 4, **TRAINING},
        "evaluation": {"num_images": 4, "steps": 1, "batch_size": 4, "num_predictions": 4},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    (said,) = finish(launch(["-m", "prunekit", "compare", str(path), "--output", str(tmp_path / "out")]))
    assert "still missing" not in said and said.count("The table is in") == 1
    assert len(list((tmp_path / "out" / "cells").glob("*.json"))) == 8 and gone(tmp_path / "out")
