"""A run of two processes: killed again and again, left by one of them, asked to end; the table is always the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launching import environment
from small_model import TRAINING, write_world
from test_run import figures

KILLS = int(os.environ.get("PRUNEKIT_KILLS", "3"))  # more on demand
STEPWISE = {**TRAINING, "checkpoint_minutes": 1e-9, "log_every": 1}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """(folder, what the script reports)."""
    folder = tmp_path_factory.mktemp("killed")
    content = {
        **write_world(folder),
        "prune": {"budget": 0.7},
        "methods": {"norm": {}, "aptp": {"experts": 2, "warmup": 2, "search": {"steps": 6, **STEPWISE}}},
        "fine_tune": {"steps": 5, **STEPWISE},
        "evaluation": {"num_images": 6, "steps": 2, "batch_size": 2, "num_predictions": 8, "num_pictures": 2},
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    script = str(Path(__file__).parent / "killed.py")
    command = [sys.executable, script, str(folder / "small.yaml"), str(folder), str(KILLS), "0"]
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
