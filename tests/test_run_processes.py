"""A run of two processes: killed again and again, left by one of them, asked to end; the table is always the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import environment
from test_run import figures, write_small_recipe

KILLS = int(os.environ.get("PRUNEKIT_KILLS", "3"))  # more on demand


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """(folder, what the script reports)."""
    folder = tmp_path_factory.mktemp("killed")
    recipe = write_small_recipe(folder)
    script = str(Path(__file__).parent / "killed.py")
    command = [sys.executable, script, str(recipe), str(folder), str(KILLS), "0"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_all_came_to_their_end(killed):
    _, report = killed
    assert report["straight"] == report["after kills"] == report["after end"] == [0, 0], report
    assert report["kills"] >= min(KILLS, 2)


@pytest.mark.parametrize("name", ["killed", "lost", "ended"])
def test_the_table_is_as_undisturbed(killed, name):
    folder, _ = killed
    assert figures(folder / name) == figures(folder / "straight")


def test_the_loss_of_one_process_leaves_the_other_at_work(killed):
    assert killed[1]["lost"] == [0, -9]


def test_sigterm_to_one_saves_and_ends_both_with_the_code_to_start_again(killed):
    assert killed[1]["ended"] == [75, 75] and killed[1]["kept"] == 1
