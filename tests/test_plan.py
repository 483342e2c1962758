"""`plan` on every recipe that ships, and its figures against what is counted and measured elsewhere."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from small_model import SHAPES, picture, write_pipeline, write_recipe, write_shard

from prunekit.data.config import DataConfig
from prunekit.estimates import activation_bytes, data_size, measure_speed
from prunekit.methods import PruneResult
from prunekit.models import EMBEDDED_DIRECTORY, load_pipeline, load_shape
from prunekit.plan import plan
from prunekit.plan_table import duration, in_bytes, quantity, show_plan
from prunekit.recipe import load_recipe
from prunekit.training import emoji_model

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
SPEED = 1e12


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("small") / "model")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_passes(path, model):
    recipe = load_recipe(path)
    if getattr(recipe, "model", None) == "emoji" and not EMBEDDED_DIRECTORY.is_dir():
        recipe = load_recipe(path, [f"model={model}"])
    content = plan(recipe, SPEED)
    console = Console(record=True, width=160, file=io.StringIO())
    show_plan(content, console)
    assert recipe.name in console.export_text()
    assert content["seconds"] > 0 and all(stage["samples"] > 0 for stage in content["work"])


def test_the_papers_recipe():
    content = plan(load_recipe(next(path for path in RECIPES if path.stem == "aptp_cc3m_base")), SPEED)
    row = content["methods"]["aptp"]
    assert row["dense_macs"] == 1_074_552_872_960 and row["dense_params"] == 865_910_724
    assert row["target_macs"] == 913_369_942_016 and row["experts"] == 16
    assert row["units"] == 1620 == sum(kind["units"] for kind in content["units"].values())
    stages = {stage["stage"]: stage for stage in content["work"]}
    search = stages["aptp: search"]
    assert search["samples"] == 3000 * 1024
    assert search["macs"] == 3 * search["samples"] * 90_545_233_920  # at 256 pixels
    assert stages["dense: generation"]["macs"] == 14_000 * 52 * 1_074_552_872_960
    assert content["disk"]["encoded_cache"] is None


def test_figures_of_a_small_recipe(model, tmp_path):
    write_shard(tmp_path / "shards" / "0.tar", [(picture(), "red apple")] * 3)
    path = write_recipe(tmp_path / "small.yaml", model, data={"kind": "webdataset", "path": str(tmp_path / "shards")})
    content = plan(load_recipe(path), SPEED)
    pipeline = load_pipeline(model)
    result = load_recipe(path).method("norm").prune(pipeline)
    row = content["methods"]["norm"]
    assert row["dense_params"] == pipeline.unet.num_parameters() == content["model"]["params"]
    assert row["dense_macs"] == result.info["dense_macs"] and row["text_length"] == 16
    assert result.info["macs"][0] <= row["target_macs"]
    assert row["params_estimate"] == pytest.approx(result.info["params"][0], rel=0.3)
    assert content["disk"]["data"] == {"images": 3, "captions": 3}
    assert content["disk"]["encoded_cache"] == 4 * (3 * 4 * 8 * 8 + 3 * 16 * 32)
    assert content["disk"]["samples"] == 2 * 4 * 3 * 64 * 64
    tuning = next(stage for stage in content["work"] if stage["stage"] == "norm: fine-tuning")
    assert tuning["samples"] == 16 and tuning["macs"] == pytest.approx(16 * (3 * 0.7 + 1) * row["dense_macs"])
    assert isinstance(result, PruneResult)


def test_a_budget_below_the_floor_says_the_floor(model, tmp_path):
    path = write_recipe(tmp_path / "small.yaml", model, prune={"budget": 0.7})
    floor = plan(load_recipe(path), SPEED)["methods"]["norm"]["floor"]
    with pytest.raises(ValueError, match=f"still costs {floor:.2f}"):
        plan(load_recipe(path, ["prune.budget=0.001"]), SPEED)


def test_activations_are_what_autograd_saves():
    unet = emoji_model.build_unet(SHAPES)
    own = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = unet(torch.randn(4, 4, 8, 8), torch.ones(4), torch.randn(4, 16, 32)).sample
    counted = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    config = load_recipe(RECIPES[0]).fine_tune.model_copy(
        update={"batch_size": 4, "micro_batch": None, "precision": "float32"}
    )
    with torch.device("meta"):
        shapes = emoji_model.build_unet(SHAPES)
    assert activation_bytes(shapes, (8, 8), 16, config) == pytest.approx(counted, rel=0.15)
    assert output.requires_grad


def test_the_speed_is_measured_and_says_so(model):
    shape = load_shape(model)
    speed = measure_speed(shape.unet, 10**6, (8, 8), 16, "float32")
    assert speed.macs_per_second > 0 and "measured on" in speed.source
    assert shape.unet.device.type == "meta"


def test_the_embedded_data_is_counted():
    assert data_size(DataConfig()) == (1844, 4398)
    assert data_size(DataConfig(kind="webdataset", path="nowhere")) is None


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (quantity(1_074_552_872_960), "1.07 T"),
        (quantity(12), "12 "),
        (in_bytes(3 * 2**30), "3 GiB"),
        (in_bytes(5), "5 B"),
        (duration(90), "90 s"),
        (duration(7200), "2 h"),
        (duration(600), "10 min"),
    ],
)
def test_numbers_for_people(shown, expected):
    assert shown == expected
