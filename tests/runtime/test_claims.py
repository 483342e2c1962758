"""A directory belongs to one kind of work: commands refuse other files, and lock the directory in which they work."""

import shutil
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from launching import launch
from small_model import RECIPE, TRAINING, write_pipeline, write_world
from unets import build

from prunekit import PromptRoutedPipeline
from prunekit.evaluation.evaluate import evaluate
from prunekit.jobs import stages as stages_module
from prunekit.jobs.compare.comparing import compare
from prunekit.jobs.recipe import dump_recipe, load_recipe, parse_recipe
from prunekit.jobs.run import _claim, start
from prunekit.models import load_pipeline
from prunekit.runtime import work
from prunekit.runtime.errors import UserError
from prunekit.runtime.files import write_json
from prunekit.runtime.run_directory import RESULT
from prunekit.runtime.work import USERS, Piece, claimed, do_together, occupied
from prunekit.serving.bulk import Request, free_directory, generate_to


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_users_come_and_go(tmp_path):
    told, left = [], []
    with occupied(tmp_path / "work", told.append, lambda: left.append("first")):
        with occupied(tmp_path / "work", told.append, lambda: left.append("second")):
            pass
        assert told == [False, True] and left == []
    assert left == ["first"] and not (tmp_path / "work" / USERS).exists()
    with pytest.raises(UserError, match="was removed"), occupied(tmp_path / "work", told.append):
        shutil.rmtree(tmp_path / "work")


def test_users_of_many_threads(tmp_path):
    """Each user is told whether there are others, and the last one removes the folder of users."""
    inside, most, left = [], [], []

    def use():
        for _ in range(20):
            with occupied(tmp_path / "work", inside.append, lambda: left.append(1)):
                time.sleep(0.002)  # makes the uses overlap
                most.append(len(list((tmp_path / "work" / USERS).glob("*.user"))))

    threads = [threading.Thread(target=use) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(inside) == 120 and max(most) > 1 and left and not (tmp_path / "work" / USERS).exists()


class Launch:
    """The processes of a launch of two, as its main process sees them."""

    count, is_main = 2, True

    def agree(self, value):
        return value


def test_a_launch_of_several_processes_leaves_a_choice_to_another_launch(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(work, "current", Launch)
    monkeypatch.setattr(work, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(stages_module.PruneResult, "load", lambda *_: calls.append("loaded"))
    stages = object.__new__(stages_module.Stages)
    stages.locks, stages.pipeline = tmp_path / "locks", build("sd2", "meta")
    folder = tmp_path / "methods" / "norm"
    with claimed(stages.locks / "norm-choice.lock"):  # a launch of one process holds this lock in `share`
        thread = threading.Thread(target=stages.choose, args=(SimpleNamespace(name="norm", prune=None), folder))
        thread.start()
        thread.join(0.1)
        assert thread.is_alive() and not calls
        write_json(folder / RESULT, {})
    thread.join(60)
    assert calls == ["loaded"]
    done = []
    do_together(Piece("other", lambda: bool(done), lambda: done.append(1)), stages.locks)
    assert done == [1]


def test_a_dead_user_is_none(tmp_path):
    code = "from pathlib import Path; from prunekit.runtime.work import occupied; import os\n"
    code += f"with occupied(Path({str(tmp_path)!r}), lambda others: None): os._exit(1)"
    (process,) = launch(["-c", code])
    process.wait()
    assert list((tmp_path / USERS).glob("*.user"))
    told = []
    with occupied(tmp_path, told.append):
        assert told == [False]
    assert not (tmp_path / USERS).exists()


def test_another_recipe_does_not_replace_one_that_is_loading(tmp_path):
    """Once, run B took run A's directory when A had written only its recipe, and then showed A's architectures."""
    first = parse_recipe(RECIPE)
    second = parse_recipe({**RECIPE, "prune": {"budget": 0.6}})
    folder = tmp_path / "run"
    with occupied(folder, lambda others: _claim(folder, first, others)):
        refused = pytest.raises(UserError, match=r"another recipe: prune.budget is 0\.7 there and 0\.6 here")
        with refused, occupied(folder, lambda others: _claim(folder, second, others)):
            pass
        before = contents(folder)
        with occupied(folder, lambda others: _claim(folder, first, others)):  # the same recipe may join
            pass
        assert {name: text for name, text in contents(folder).items() if USERS not in name.parts} == {
            name: text for name, text in before.items() if USERS not in name.parts
        }
    with occupied(folder, lambda others: _claim(folder, second, others)):  # the first run left no results
        assert load_recipe(folder / "recipe.yaml").prune.budget == 0.6


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


COMPARISON = {
    "job": "compare",
    "methods": {"norm": {"samples": 2}},
    "budgets": [{"budget": 0.7}],
    "fine_tune": {"steps": 1, **TRAINING},
    "evaluation": {"num_images": 2, "steps": 1, "batch_size": 2, "num_predictions": 2},
}


@pytest.fixture
def run(tmp_path):
    """The folder of a run, with the files by which commands recognize a run."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(dump_recipe(parse_recipe(RECIPE)))
    for name in ("results.json", "table.md", "report.html"):
        (folder / name).write_text("mine")
    return folder


def test_a_comparison_does_not_overwrite_a_run(world, run, tmp_path):
    """Once, a comparison overwrote a run."""
    path, before = tmp_path / "compare.yaml", contents(run)
    path.write_text(yaml.safe_dump({**world, **COMPARISON}))
    with pytest.raises(UserError, match="holds the run of a recipe with job=prune"):
        compare([path], (), run)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "table.md").write_text("mine")
    with pytest.raises(UserError, match="is not empty and has no comparison"):
        compare([path], (), tmp_path / "mine")
    assert contents(run) == before and len(contents(tmp_path / "mine")) == 1


def test_an_evaluation_and_pictures_do_not_overwrite_a_run(run, tmp_path):
    before = contents(run)
    with pytest.raises(UserError, match="has no evaluation"):
        evaluate("emoji", "emoji", output=run)
    pipeline = PromptRoutedPipeline.from_pretrained(write_pipeline(tmp_path / "model", layers=1), device="cpu")
    with pytest.raises(UserError, match="has no generated pictures"):
        generate_to(run, pipeline, Request(["red apple"], [0], 1))
    assert contents(run) == before


@pytest.mark.long
def test_two_comparisons_in_one_directory_keep_their_cells(world, tmp_path):
    """Recipes with two names share equal cells. Different cells and both recipes are kept."""
    folder = tmp_path / "both"
    paths = []
    for name, steps in (("one", 1), ("two", 2)):
        content = {**world, **COMPARISON, "name": name, "fine_tune": {"steps": steps, **TRAINING}}
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_text(yaml.safe_dump(content))
        compare([paths[-1]], (), folder)
    cells = sorted(path.name for path in (folder / "cells").glob("*.json"))
    assert cells == ["dense__seed0__static.json", *(f"norm__0.7__seed0__static{end}.json" for end in ("", "__two"))]
    before = contents(folder / "cells")
    compare([paths[0]], (), folder)
    assert contents(folder / "cells") == before and load_recipe(folder / "recipe.yaml").name == "one"
    assert load_recipe(folder / "recipe-two.yaml").fine_tune.steps == 2


def test_pictures_of_another_model_are_not_taken_for_this_ones(tmp_path):
    """Once, generating with model B into the directory of model A returned A's pictures."""
    first = write_pipeline(tmp_path / "first", layers=1)
    second = tmp_path / "second"
    pipeline = load_pipeline(first)
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(2)
    pipeline.save_pretrained(second)
    request, folder = Request(["red apple"], [0], 1), tmp_path / "pictures"
    for place in (first, second):
        own = PromptRoutedPipeline.from_pretrained(place, device="cpu")
        own.set_progress_bar_config(disable=True)
        if place is first:
            generate_to(folder, own, request)
            generate_to(folder, own, request)  # a second time
        else:
            with pytest.raises(UserError, match="made with other weights"):
                generate_to(folder, own, request)
            assert free_directory(folder, own, request) == tmp_path / "pictures-2"


def test_a_request_that_drew_nothing_leaves_its_directory_free(tmp_path, monkeypatch):
    own = PromptRoutedPipeline.from_pretrained(write_pipeline(tmp_path / "model", layers=1), device="cpu")
    with pytest.raises(ValueError, match="divisible by 8"):
        generate_to(tmp_path / "out", own, Request(["red apple"], [0], 1, size=(7, 7)))
    assert free_directory(tmp_path / "out", own, Request(["blue star"], [0], 1)) == tmp_path / "out"


def test_a_run_whose_directory_goes_fails(world, tmp_path, monkeypatch):
    """Once, the run ended with status 0 in a directory without its recipe."""
    content = {**world, "methods": {"norm": {"samples": 2}}, "prune": {"budget": 0.7}}
    content |= {key: COMPARISON[key] for key in ("fine_tune", "evaluation")}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))

    def compare_without(run, *given):
        shutil.rmtree(run.directory)

    monkeypatch.setattr("prunekit.jobs.run.Run.compare", compare_without)
    with pytest.raises(UserError, match="was removed while this process worked in it"):
        start(path, (), tmp_path / "run")
