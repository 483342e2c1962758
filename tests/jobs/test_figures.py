"""The paper's figures of a small run: each kind is drawn, and errors are one line."""

import shutil
from pathlib import Path

import pytest
import torch
from command_line import ok, refused
from PIL import Image
from small_run import write_small_recipe

from prunekit.evaluation.comparison import frequent_words
from prunekit.jobs.run import start
from prunekit.methods.router import RandomRouter, Router


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    start(write_small_recipe(folder), ["data.holdout=0.5"], folder / "run")
    path = folder / "run" / "methods" / "aptp" / "router.safetensors"
    trained = Router.load(path)  # after six steps, it sends every prompt to one expert
    RandomRouter(torch.tensor([0.5, 0.5]), trained.embedding_size, info=trained.info).save(path)
    return folder / "run"


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("extremes", ["--count", 1]),
        ("experts", ["--count", 2]),
        ("runs", ["--count", 2]),
        ("assignment", ["--count", 1]),
        ("losses", ["--row", "aptp"]),
    ],
)
def test_every_figure_is_drawn(kind, more, run, tmp_path):
    path = tmp_path / f"{kind}.png"
    given = [kind, run, *([run] if kind in ("runs", "assignment") else []), "--output", path, *more]
    if kind in ("extremes", "experts"):
        given += ["--list", "aptp-parti"]
    if kind not in ("assignment", "losses"):
        given += ["--steps", 1]
    assert str(path) in ok("figure", *given).replace("\n", "")
    with Image.open(path) as picture:
        assert picture.width > 200 and len(set(picture.convert("L").getdata())) > 2


def test_experts_are_drawn_for_a_comparison_without_equal_steps(tmp_path):
    recorded = Path("docs/results/compare_emoji/cells")
    (tmp_path / "cells").mkdir()
    for path in recorded.glob("*__0.5__seed0__equal_total.json"):
        shutil.copy(path, tmp_path / "cells")
    picture = tmp_path / "experts.png"
    ok("figure", "num-experts", tmp_path, "--output", picture)
    with Image.open(picture) as image:
        assert len(set(image.convert("L").getdata())) > 2
    for path in (tmp_path / "cells").iterdir():
        path.unlink()
    shutil.copy(recorded / "dense__seed0__static.json", tmp_path / "cells")
    assert "no finished cells of pruned" in refused("figure", "num-experts", tmp_path, "--output", picture)


def test_mistakes_are_one_line(run, tmp_path):
    for given, message in (
        (["expert", run], "Near names: experts"),
        (["experts", run, run], "of one run"),
        (["losses", run, "--row", "nothing"], "has no search"),
        (["num-experts", run], "no finished cells"),
        (["experts", tmp_path], "it has none of"),
    ):
        assert message in refused("figure", *given, "--output", tmp_path / "x.png")


def test_words_are_those_that_tell_experts_apart():
    captions = [["a red apple on the table", "red apple pie"], ["a blue car on the table", "the blue car"], []]
    first, second, none = frequent_words(captions, 2)
    assert set(first) == {"red", "apple"} and set(second) == {"blue", "car"} and none == []
    assert frequent_words([["the", "a"], []]) == [[], []]
