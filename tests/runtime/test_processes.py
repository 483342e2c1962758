"""Several processes give the losses and the choice of one process; inconsistent launches are refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import environment, finish, launch, run_recipe
from small_model import write_pipeline, write_recipe

from prunekit.runtime.processes import LaunchError, Processes, apart, check_launch, current

SCRIPT = str(Path(__file__).parents[1] / "helpers" / "trained.py")


OTHERS = [pytest.param(name, marks=pytest.mark.long) for name in ("accumulated", "two")]


class Trained(dict):
    """Figures by way of training; each is trained on first access."""

    def __init__(self, folder):
        self.folder = folder

    def __missing__(self, name):
        count = 2 if name == "two" else 1
        finish(launch([SCRIPT, str(self.folder / name), *(["4"] if name == "accumulated" else [])], count=count))
        self[name] = json.loads((self.folder / f"{name}.json").read_text())
        assert self[name]["processes"] == count
        return self[name]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the figures of one process ("one"), one that accumulates gradients ("accumulated"), and two ("two")."""
    return Trained(tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("training", ["search", "fine_tuning"])
def test_losses_of_20_steps(trained, other, training):
    one, two = (torch.tensor(trained[name][training]) for name in ("one", other))
    assert len(one) == 20 and one[0] != one[-1]
    assert ((one - two).abs() / one.abs().clamp(min=1)).max() <= 1e-5


@pytest.mark.parametrize("other", OTHERS)
def test_the_same_assignments_but_for_ties(trained, other):
    steps = list(zip(trained["one"]["seen"], trained[other]["seen"], strict=True))
    assert len({tuple(a["assignment"]) for a, _ in steps}) > 5
    for one, two in steps:
        for mine, theirs, scores in zip(one["assignment"], two["assignment"], one["scores"], strict=True):
            best = sorted(scores)[-2:]
            assert mine == theirs or best[1] - best[0] <= 1e-5


@pytest.mark.parametrize("other", OTHERS)
def test_the_same_budget_and_units_in_the_end(trained, other):
    one, two = trained["one"], trained[other]
    assert one["ratio"] == pytest.approx(two["ratio"], abs=1e-3) and two["ratio"] <= 0.7
    chosen = [torch.tensor(content["chosen"]) for content in (one, two)]
    assert (chosen[0] == chosen[1]).double().mean() >= 0.99


REFUSED = {
    "none of them knows of the others": {"WORLD_SIZE": "2"},
    "accelerate launch --cpu": {"MASTER_PORT": "29500", "ACCELERATE_MIXED_PRECISION": "no"},
    "srun without a launcher": {"SLURM_STEP_NUM_TASKS": "8"},
    "mpirun": {"OMPI_COMM_WORLD_SIZE": "4"},
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_launch_that_is_not_what_it_seems_is_refused(case):
    with pytest.raises(LaunchError, match="torchrun --nproc-per-node"):
        check_launch(REFUSED[case], 1)


@pytest.mark.parametrize("given", [{}, {"WORLD_SIZE": "1"}, {"SLURM_STEP_NUM_TASKS": "1"}, {"MASTER_PORT": "1"}])
def test_a_launch_of_one_is_fine(given):
    check_launch(given, 1)


def test_several_on_a_node_that_slurm_started_once(tmp_path):
    check_launch({"WORLD_SIZE": "16", "SLURM_STEP_NUM_TASKS": "2"}, 16)


def test_one_process_is_alone():
    processes = current()
    assert isinstance(processes, Processes) and processes.count == 1 and processes.is_main
    tensor = torch.ones(3)
    processes.sum([tensor])
    assert tensor.tolist() == [1, 1, 1] and processes.agree("x") == "x" and processes.first(lambda: 5) == 5
    with apart():
        assert current().count == 1


@pytest.mark.long
def test_accelerates_silent_single_process_is_refused_in_one_line(tmp_path):
    recipe = write_recipe(tmp_path / "small.yaml", write_pipeline(tmp_path / "model"))
    command = [Path(sys.executable).parent / "accelerate", "launch", "--cpu", "--num_processes", "2", "--module"]
    arguments = [*command, *run_recipe(recipe, tmp_path / "run")[1:]]
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    lines = [line for line in done.stderr.splitlines() if line.startswith("prunekit:")]
    assert len(lines) == 1 and "started one process instead of several" in lines[0], done.stderr
