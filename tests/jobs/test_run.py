"""The main job on a small model: two runs give the same results, also after kills in each stage."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
from launching import launch, run_recipe
from small_run import RESULTS, figures, write_small_recipe

from prunekit.jobs.recipe import RecipeError, load_recipe
from prunekit.jobs.run import _claim, resume, start
from prunekit.methods import PruneResult
from prunekit.runtime.errors import UserError


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_small_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "straight"
    assert start(recipe, (), directory) == directory
    return directory


def test_every_stage_leaves_its_result(finished):
    rows = json.loads((finished / "results.json").read_text())["table"]["rows"]
    assert [row["name"] for row in rows] == ["dense", "norm", "aptp"]
    assert rows[0]["macs_ratio"] == 1 and rows[0]["agreement"] == 0
    for row in rows[1:]:
        assert 0.5 < row["macs_ratio"] <= 0.7 and row["agreement"] > 0 and row["seconds_per_image"] > 0
    warnings = json.loads((finished / "results.json").read_text())["warnings"]
    chosen = [f"aptp: {line}" for line in PruneResult.load(finished / "methods" / "aptp").warnings()]
    assert warnings[: len(chosen)] == chosen
    assert all(" is omitted: the evaluator scores real held-out pictures" in line for line in warnings[len(chosen) :])
    assert "gates kept" in warnings[0]  # gates do not close within six steps
    assert f"## Warnings\n\n- {warnings[0]}.\n" in (finished / "table.md").read_text()
    assert (finished / "comparison.png").stat().st_size > 5_000
    assert "| aptp |" in (finished / "table.md").read_text()
    for path in (*RESULTS, "methods/aptp/router.safetensors", "methods/aptp/experts/1/unet/config.json"):
        assert (finished / path).is_file(), path
    assert not list(finished.rglob("checkpoints/step-*")), "checkpoints of finished trainings are left"


def test_nothing_but_safetensors_json_yaml_pages_and_pictures(finished):
    kinds = {path.suffix for path in finished.rglob("*") if path.is_file()}
    assert kinds <= {".safetensors", ".json", ".jsonl", ".yaml", ".md", ".png", ".html"}


@pytest.mark.long
def test_twice_the_same(recipe, finished, tmp_path):
    assert figures(start(recipe, (), tmp_path / "again")) == figures(finished)


def test_a_finished_run_is_not_made_again(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    assert resume(finished) == finished
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}


STAGES = {  # how to see that a stage is running
    "encoding": lambda d: (d / "recipe.yaml").is_file(),
    "search": lambda d: list(d.glob("methods/aptp/checkpoints/step-*")),
    "fine-tuning": lambda d: list(d.glob("methods/*/experts/*/checkpoints/step-*")),
    "generation": lambda d: list(d.glob("samples/*/*.png")),
    "evaluation": lambda d: (d / "metrics" / "norm.json").is_file(),
}


@pytest.mark.long
@pytest.mark.parametrize("stages", [["search"], [*STAGES]], ids=len)
def test_killed_once_in_each_stage_and_resumed_is_the_same(stages, recipe, finished, tmp_path):
    directory, killed = tmp_path / "killed", []
    for stage in stages:
        under_way = STAGES[stage]
        (process,) = launch(run_recipe(recipe, directory))
        while process.is_alive and not under_way(directory):
            time.sleep(0.01)
        if process.is_alive:
            process.send(signal.SIGKILL)
            killed.append(stage)
        process.wait()
    assert len(killed) >= len(stages) - 1, killed  # the last stage may end before the signal
    assert figures(start(recipe, (), directory)) == figures(finished)


def test_a_directory_of_another_recipe_is_refused(recipe, finished, tmp_path):
    with pytest.raises(RecipeError, match=r"another recipe: prune\.budget is 0\.7 there and 0\.6 here"):
        start(recipe, ["prune.budget=0.6"], finished)
    stillborn = tmp_path / "stillborn"  # for example, because its data was missing
    stillborn.mkdir()
    shutil.copy(finished / "recipe.yaml", stillborn)
    (stillborn / "log.jsonl").write_text("{}\n")
    _claim(stillborn, load_recipe(recipe, ["prune.budget=0.6"]), others=False)
    assert load_recipe(stillborn / "recipe.yaml").prune.budget == 0.6 and not (stillborn / "log.jsonl").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="not empty and has no run"):
        start(recipe, (), tmp_path)
    with pytest.raises(RecipeError, match="is not a run directory"):
        resume(tmp_path)


def test_a_stage_that_fails_leaves_the_finished_ones(recipe, tmp_path):
    directory = tmp_path / "run"
    with pytest.raises(ValueError, match="experts=50 is more than"):
        start(recipe, ["methods.aptp.experts=50"], directory)
    assert (directory / "methods" / "norm" / "result.json").is_file()
    assert not Path(directory / "results.json").exists()
