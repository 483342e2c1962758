"""Runs, comparisons, evaluations and bulk generation send other nodes pieces as calls of pure JSON."""

import json
from contextlib import nullcontext

import pytest
import yaml
from elsewhere import Elsewhere
from small_model import TRAINING, write_world
from small_run import check_table

from prunekit.evaluation.evaluate import evaluate
from prunekit.jobs.compare.comparing import compare
from prunekit.jobs.recipe import load_recipe
from prunekit.jobs.run import start
from prunekit.serving.bulk import Request, Source, generate_to

EVALUATION = {"num_images": 4, "steps": 1, "batch_size": 2, "num_predictions": 4, "num_pictures": 2}


pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    content = {**write_world(folder), "fine_tune": {"steps": 1, **TRAINING}, "evaluation": EVALUATION}
    return folder, content


@pytest.fixture(scope="module")
def elsewhere():
    """Return the executor that all commands use."""
    executor = Elsewhere()
    with pytest.MonkeyPatch.context() as patches:
        for module in ("jobs.run", "jobs.compare.comparing", "evaluation.evaluate"):
            patches.setattr(f"prunekit.{module}.executor_of", lambda engine, log: nullcontext(executor))
        yield executor


@pytest.fixture(scope="module")
def run(world, elsewhere):
    """Return the directory of a run."""
    folder, content = world
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**content, "prune": {"budget": 0.7}, "methods": {"norm": {"samples": 2}}}))
    return start(path, (), folder / "run")


def test_a_run(run, elsewhere):
    check_table(run)
    # a model; batches of two rows, of held-out and of training pictures; the figures of two rows
    assert elsewhere.calls.pop("prunekit.jobs.run:work_on") == 1 + 2 * (2 + 2) + 2
    assert any("norm 0: fine-tuned on" in text for text in elsewhere.said)


def test_a_comparison(world, elsewhere):
    folder, content = world
    path = folder / "compare.yaml"
    content = {**content, "job": "compare", "methods": {"norm": {"samples": 2}}, "budgets": [{"budget": 0.7}]}
    path.write_text(yaml.safe_dump(content))
    directory = compare([path], (), folder / "cells")
    check_table(directory)
    assert elsewhere.calls.pop("prunekit.jobs.compare.comparing:make_one") == 2
    assert load_recipe(directory / "recipe.yaml").engine.kind == "local"


def test_an_evaluation(run, tmp_path, elsewhere):
    settings = ["steps=1", "metrics=[clip_score]", "batch_size=3"]
    evaluate(run, num_images=4, overrides=settings, output=tmp_path)
    assert elsewhere.calls.pop("prunekit.evaluation.evaluate:draw_one") == 4
    assert "engine" not in json.loads((tmp_path / "results.json").read_text())["protocol"]


def test_pictures(run, tmp_path):
    source, executor = Source(str(run)), Elsewhere()
    request = Request([f"red apple {i}" for i in range(6)], [0] * 6, 1, size=(64, 64))
    drawn = []
    for folder, given in ((tmp_path / "here", {}), (tmp_path / "there", {"executor": executor, "source": source})):
        drawn.append([path.read_bytes() for path, _ in generate_to(folder, source.open(), request, **given)])
    assert drawn[0] == drawn[1] and executor.calls == {"prunekit.serving.bulk:draw_one": 2}
