"""A full disk in a comparison, in a pre-training, and in commands that write a few files."""

import errno
import hashlib
import json

import pytest
import yaml
from safetensors.torch import load_file
from small_disk import LEFT, check_whole, full_at, one_line, small_disk
from small_model import SHAPES, TRAINING, write_world
from typer.testing import CliRunner
from unets import build

import prunekit as pk
from prunekit.cli import app
from prunekit.jobs.recipe import load_recipe
from prunekit.runtime.progress import console

STEPWISE = {**TRAINING, "checkpoint_minutes": 1e-9}  # a checkpoint after each step
SMALL = (".json", ".csv", ".md")  # files that may fit into the remaining space of a full disk
COMMANDS = {"compare": ("compare", "--output"), "pretrain": ("run", "--directory")}
STAGES = {  # job: the files at which the disk becomes full, in writing order
    "compare": [
        "run/cache/text-*/*.safetensors",
        "run/cells/dense*.json",
        "run/work/norm-chosen-*/scores.safetensors",
        "run/work/calibrations/*.safetensors",
        "run/work/norm__0.7*-models-*/*/checkpoints/step-00000002",
        "run/work/norm__0.7*-models-*/*/unet",
        "run/work/norm__0.7*-samples-*/00002.png",
        "run/cells/norm__0.7*.json",
        "run/timings.json",
        "run/results.json",
        "run/table.csv",
        "run/table.md",
        "run/pareto.png",
        "run/comparison.png",
    ],
    "pretrain": [
        "run/autoencoder/checkpoints/step-00000002",
        "run/autoencoder/vae",
        "run/decoder/vae",
        "run/diffusion/step-1",
        "run/diffusion/checkpoints/step-00000002",
        "run/diffusion/final",
        "run/evaluator/evaluator",
        "run/curve.json",
        "run/emoji_model",
    ],
}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """Return a recipe per job."""
    folder = tmp_path_factory.mktemp("world")
    world = write_world(folder)
    evaluation = {"num_images": 4, "steps": 1, "batch_size": 2, "num_predictions": 4}
    parts = {part: {"steps": 3, **STEPWISE} for part in ("autoencoder", "decoder", "diffusion", "evaluator")}
    contents = {
        "compare": {
            **world,
            "job": "compare",
            "budgets": [{"budget": 0.7}, {"budget": 0.8}],
            "methods": {"norm": {"samples": 2}},
            "protocols": ["equal_steps"],
            "fine_tune": {"steps": 2, **STEPWISE},
            "evaluation": evaluation,
        },
        "pretrain": {
            **{"job": "pretrain", "name": "small", "data": world["data"], "milestones": [1], "evaluation": evaluation},
            **{"shapes": SHAPES.model_dump(mode="json"), **parts},
        },
    }
    for job, content in contents.items():
        (folder / f"{job}.yaml").write_text(yaml.safe_dump(content))
    return {job: folder / f"{job}.yaml" for job in contents}


def run(job, recipe, directory):
    command, option = COMMANDS[job]
    with pytest.MonkeyPatch.context() as patches:
        patches.setenv("PRUNEKIT_PROCESSES", "1")
        return CliRunner().invoke(app, [command, str(recipe), option, str(directory)])


def figures(job, directory):
    """Return a finished job's figures without times, and digests of its models."""
    if job == "compare":
        cells = [json.loads(path.read_text()) for path in sorted((directory / "cells").glob("*.json"))]
        found = [(cell["cell"], cell["figures"], cell["errors"], cell["experts"]) for cell in cells]
        for _, own, _, _ in found:
            own.pop("seconds_per_image", None)
            own.pop("training_seconds", None)
    else:
        found = [json.loads((directory / "curve.json").read_text())]
    files = [path for path in sorted(directory.rglob("*.safetensors")) if "cache" not in path.parts]
    return found, {str(path.relative_to(directory)): digest(load_file(path)) for path in files}


def digest(tensors):
    """Return a digest of a file's tensors that does not depend on their order in the file."""
    parts = [part for name in sorted(tensors) for part in (name.encode(), tensors[name].numpy().tobytes())]
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.fixture(scope="module")
def undisturbed(recipes):
    """Return the figures of each job with enough disk space."""

    def of(job):
        directory = recipes[job].parent / f"undisturbed-{job}"
        result = run(job, recipes[job], directory)
        assert result.exit_code == 0, result.output
        return figures(job, directory)

    return of


def fails_at(disk, pattern, job, recipe):
    """Run a job on a disk that becomes full at a file; check for one line that names it and no half-written file."""
    left = 0 if pattern.endswith(SMALL) else LEFT
    with full_at(disk, pattern, left=left) as met, console.capture():
        result = run(job, recipe, disk.folder / "run")
    assert met, f"the {job} has not come to {pattern}: {result.output}"
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), repr(result.exception)
    (said,) = result.stderr.strip().splitlines()
    assert said.startswith("prunekit: ") and one_line(f"{disk.full}: ") in one_line(said)
    assert f"'{met[0]}'" in said and ".tmp" not in said
    assert not met[0].exists()
    check_whole(disk.folder / "run")


@pytest.mark.parametrize("job", [pytest.param(job, marks=pytest.mark.long) for job in STAGES])
def test_a_job_meets_a_full_disk_at_each_stage_and_ends_with_the_same_figures(job, recipes, undisturbed, tmp_path):
    with small_disk(tmp_path) as disk:
        for pattern in STAGES[job]:
            fails_at(disk, pattern, job, recipes[job])
        result = run(job, recipes[job], tmp_path / "run")
        assert result.exit_code == 0, result.output
        check_whole(tmp_path / "run")
        assert figures(job, tmp_path / "run") == undisturbed(job)


@pytest.mark.parametrize("job", STAGES)
def test_a_full_disk_at_the_first_stage_of_a_job(job, recipes, tmp_path):
    with small_disk(tmp_path) as disk:
        fails_at(disk, STAGES[job][0], job, recipes[job])


def test_a_copied_recipe_is_whole_or_not_there(tmp_path):
    """If a recipe was written, so were all recipes that it extends; the next copy writes the missing files."""
    words = ["recipes", "copy", "aptp_cc3m_base", str(tmp_path / "own")]
    with small_disk(tmp_path) as disk:
        for pattern in ("own/base/*.yaml", "own/aptp_cc3m_base.yaml"):
            with full_at(disk, pattern, left=0) as met:
                result = CliRunner().invoke(app, words)
            assert result.exit_code == 1 and not met[0].exists()
            (said,) = result.stderr.strip().splitlines()
            assert said.startswith("prunekit: ") and f"{disk.full}: " in said and f"'{met[0]}'" in said
            assert not (tmp_path / "own" / "aptp_cc3m_base.yaml").exists()
            check_whole(tmp_path / "own")
        assert CliRunner().invoke(app, words).exit_code == 0
        assert load_recipe(tmp_path / "own" / "aptp_cc3m_base.yaml").name == "aptp_cc3m_base"


def test_an_architecture_that_the_disk_has_no_room_for_leaves_the_old_one(tmp_path):
    space = pk.discover(build("sd2"))
    old, new = space.random(0.8, seed=0), space.random(0.5, seed=1)
    with small_disk(tmp_path) as disk:
        path = tmp_path / "kept.json"
        old.save(path)
        with full_at(disk, "kept.json", left=0), pytest.raises(OSError, match=disk.full) as error:
            new.save(path)
        assert error.value.filename == str(path) and error.value.errno in (errno.ENOSPC, errno.EFBIG)
        check_whole(tmp_path)
        assert pk.Architecture.load(path) == old
        new.save(path)
        assert pk.Architecture.load(path) == new
