"""A model for rectangular pictures has a `sample_size` of two numbers, which all code must support."""

import json
import shutil

import pytest
import yaml
from small_data import stub
from small_model import TRAINING, write_world
from unets import build

import prunekit as pk
from prunekit.data.config import DataConfig, load_data
from prunekit.jobs.bench.bench_job import run_recipe
from prunekit.jobs.plan import Devices, plan
from prunekit.jobs.recipe import load_recipe
from prunekit.jobs.stages import RunLog, Stages
from prunekit.methods.calibration import as_encoded
from prunekit.models import load_pipeline, load_shape, resolution_of
from prunekit.runtime.errors import UserError

SAYS = "the model is made for 128 x 192 pixels; set resolution=SIDE"


def made_for(world, folder, size):
    """Copy the small model with another `sample_size`; return its folder."""
    shutil.copytree(world["model"], folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "sample_size": size}))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def models(world, tmp_path_factory):
    """Return the same model for squares and for rectangles; both have a `sample_size` of two numbers."""
    folder = tmp_path_factory.mktemp("models")
    return {name: made_for(world, folder / name, size) for name, size in (("square", [8, 8]), ("wide", [16, 24]))}


@pytest.fixture
def recipe(world, models, tmp_path):
    """Write a recipe for one of the models, load it, and return it."""

    def write(name, *overrides):
        content = {
            **world,
            "model": str(models[name]),
            "prune": {"budget": 0.7},
            "methods": {"norm": {"samples": 2}},
            "fine_tune": {"steps": 1, **TRAINING},
            "evaluation": {"num_images": 4, "steps": 1},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
        return load_recipe(tmp_path / "recipe.yaml", overrides)

    return write


@pytest.mark.parametrize(("size", "side"), [(8, 64), ([8, 8], 64), ((24, 24), 192)])
def test_the_resolution_of_squares(size, side):
    unet = build("sd2", "meta")
    unet.register_to_config(sample_size=size)
    assert resolution_of(stub(unet)) == side


def test_shapes_and_plans_have_both_sides(models, recipe):
    assert load_shape(models["wide"]).resolution == (128, 192)
    assert load_shape(models["square"]).resolution == (64, 64)
    planned = plan(recipe("wide"), Devices(throughput=1e12))
    assert planned["model"]["resolution"] == [128, 192]
    shape = load_shape(models["wide"])
    cost = pk.CostModel(shape.denoiser, pk.discover(shape.denoiser), (16, 24), shape.text_length)
    assert planned["methods"]["norm"]["dense_macs"] == cost.dense_macs


def test_a_run_takes_squares_and_says_how_to_train_the_others(recipe, tmp_path):
    def resolution(name, *overrides):
        return Stages(recipe(name, *overrides), RunLog(tmp_path), tmp_path).resolution

    assert resolution("square") == 64
    with pytest.raises(UserError, match=SAYS):
        resolution("wide")
    assert resolution("wide", "resolution=32") == 32


def test_calibration_data_is_encoded_at_the_resolution_of_the_model(world, models):
    images = load_data(DataConfig(**world["data"]), 0)
    assert as_encoded(load_pipeline(models["square"]), images).latents.shape[-2:] == (8, 8)
    with pytest.raises(UserError, match=SAYS):
        as_encoded(load_pipeline(models["wide"]), images)


def test_an_evaluation_refuses_rectangles_before_it_draws(models, tmp_path):
    with pytest.raises(UserError, match=SAYS):
        pk.evaluate([models["wide"]], "emoji", None, 2, ("steps=1", "batch_size=2", "num_references=4"), tmp_path)
    assert not list(tmp_path.rglob("*.png"))


def test_a_benchmark_of_a_run_refuses_rectangles(models, tmp_path):
    expert = tmp_path / "methods" / "norm" / "experts" / "0" / "unet"
    expert.mkdir(parents=True)
    (expert / "config.json").write_text("{}")
    for name in ("square", "wide"):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": str(models[name])}))
        if name == "square":
            assert run_recipe(tmp_path).resolution == 64
        else:
            with pytest.raises(UserError, match="made for 128 x 192 pixels; a benchmark needs square pictures"):
                run_recipe(tmp_path)
