"""`plan` on every shipped recipe, and its figures compared with independent counts and measurements."""

import io
import json
from itertools import product
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from rich.console import Console
from small_model import SHAPES, picture, write_pipeline, write_recipe, write_shard
from small_transformers import CONFIGS
from typer.testing import CliRunner

from prunekit.cli import app
from prunekit.core.discovery import discover
from prunekit.core.gates import gated
from prunekit.data.config import DataConfig, data_size
from prunekit.data.prompt_encoder import load_prompt_encoder
from prunekit.jobs.bench.bench_recipe import is_benchmark
from prunekit.jobs.plan import Devices, plan, plan_all
from prunekit.jobs.plan.amounts import Work, pruning_work, timed
from prunekit.jobs.plan.data_size import PUBLISHED, prompt_width, size_of
from prunekit.jobs.plan.plan_table import duration, in_bytes, quantity, show_plan, show_summary
from prunekit.jobs.plan.planned_models import Models
from prunekit.jobs.plan.planned_parts import load_parts
from prunekit.jobs.plan.planned_rows import rows_of
from prunekit.jobs.plan.rehearsal import LiveMemory, Rehearsal, autocast, zero_call
from prunekit.jobs.plan.speed import Speed, measure_speed
from prunekit.jobs.plan.text_encoders import (
    OPEN_CLIP_H,
)
from prunekit.jobs.recipe import load_recipe
from prunekit.methods import PruneResult
from prunekit.models import emoji_model, load_pipeline, load_shape
from prunekit.recovery.fine_tuning import FineTuneConfig
from prunekit.training.memory import held, samples_at_once
from prunekit.training.trainer import TrainerConfig

SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
RECIPES = [path for path in SHIPPED if not is_benchmark(path)]
GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "unet_macs.json").read_text())["models"]
NAMES = [path.stem for path in RECIPES]
QUICK = ["aptp_cc3m_base", "quickstart"]
PLANNED = [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in NAMES]
SPEED = Devices(throughput=1e12, precision="bfloat16")  # a simulated GPU
QUICKLY_REHEARSED = [("gates", False, "bfloat16"), ("weights", True, "float32")]
REHEARSED = [  # two very different recipes; `make test-long` tests the others
    pytest.param(*case, marks=() if case in QUICKLY_REHEARSED else pytest.mark.long)
    for case in product(("gates", "weights"), (False, True), ("float32", "bfloat16"))
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("small") / "model")


class Plans(dict):
    """Plans of shipped recipes by name, computed on first access; work that they share is done once."""

    models = Models()

    def __missing__(self, name):
        self[name] = plan(recipe_named(name), SPEED, self.models)
        return self[name]


@pytest.fixture(scope="module")
def plans():
    return Plans()


def recipe_named(stem: str, *overrides: str):
    return load_recipe(next(path for path in RECIPES if path.stem == stem), overrides)


@pytest.mark.parametrize("name", PLANNED)
def test_every_recipe_passes(name, plans):
    content = plans[name]
    for width in (60, 80, 160):
        console = Console(record=True, width=width, file=io.StringIO(), highlight=False)
        show_plan(content, console)
        show_summary([content, content], console)
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= width and "…" not in text
        assert content["recipe"] in text and all(f"{stage['samples']:,}" in text for stage in content["work"])
        assert all(f"{row['target_macs']:,}" in text for row in content.get("methods", {}).values())
    assert content["seconds"] > 0 and all(stage["samples"] > 0 for stage in content["work"])
    assert content["memory"]["peak"] and content["disk"]["total"] > 0
    assert json.loads(json.dumps(content)) == content


TRANSFORMERS = {  # parameters, and exact MACs at 1024 pixels
    "sd35": (2_243_171_520, 5_624_786_853_888),
    "flux": (11_901_408_320, 37_192_326_709_248),
    "qwen_image": (20_430_401_088, 39_151_961_112_576),
}


@pytest.mark.long
@pytest.mark.parametrize("name", [f"{method}_{model}" for method in ("depth", "obs", "aptp") for model in TRANSFORMERS])
def test_plans_of_transformers_equal_the_goldens(name, plans):
    content, method = plans[name], name.partition("_")[0]
    params, macs = TRANSFORMERS[name.partition("_")[2]]
    assert (content["model"]["params"], content["model"]["macs"]) == (params, macs)
    row = content["methods"][method]
    assert (row["dense_params"], row["dense_macs"]) == (params, macs)
    assert max(content["memory"]["peak"].values()) < 80 * 2**30


@pytest.mark.parametrize("names", [QUICK, pytest.param(NAMES, marks=pytest.mark.long)], ids=len)
def test_plans_equal_the_goldens(names, plans):
    known = {768: "sd-2.1@768", 512: "sd-1.4"}  # by the resolution at which MACs are counted
    checked = set()
    for content in (plans[name] for name in names):
        golden = GOLDENS.get(known.get(content["model"]["resolution"][0]))
        if golden is None or content["model"]["params"] != golden["params"]:
            continue
        checked.add(golden["latent"])
        assert content["model"]["macs"] == golden["exact"]
        for row in content["methods"].values():
            assert row["dense_macs"] == golden["exact"] and row["dense_params"] == golden["params"]
            if "units" in golden and row["units"] == golden["units"]["total"]:
                assert sum(kind["units"] for kind in content["units"].values()) == golden["units"]["total"]
    assert checked == ({96} if names is QUICK else {96, 64})


def test_the_papers_recipe(plans):
    content = plans["aptp_cc3m_base"]
    row = content["methods"]["aptp"]
    assert row["target_macs"] == 913_369_942_016 and row["experts"] == 16 and row["units"] == 1620
    stages = {stage["stage"]: stage for stage in content["work"]}
    search, recipe = stages["aptp: search"], recipe_named("aptp_cc3m_base")
    live = 0 if recipe.cache.text else OPEN_CLIP_H.macs
    recomputed = recipe.method("aptp").config.search.gradient_checkpointing
    assert search["samples"] == 3000 * 1024
    dense = GOLDENS["sd-2.1@256"]["exact"]
    assert search["macs"] == search["samples"] * ((3 + recomputed) * dense + live)
    assert stages["dense: generation"]["passes"].startswith("50 denoiser calls (DDIMScheduler)")
    assert 16_000 * 50 * row["dense_macs"] < stages["dense: generation"]["macs"] < 16_000 * 56 * row["dense_macs"]
    assert stages["encoding of pictures"]["samples"] == 2_905_954 + 13_443
    assert content["disk"]["data"]["source"].startswith("as published (CC3M, train and CC3M, validation)")
    encoded = content["disk"]["encoded"]
    assert encoded["prompts"] / 1e9 == pytest.approx(4.5, rel=0.02)


@pytest.mark.parametrize(
    ("latents", "text", "expected"),
    [("moments", "true", (48, 458)), pytest.param("means", "false", (24, 0), marks=pytest.mark.long)],
)
def test_the_cache_of_cc3m(latents, text, expected):
    overrides = (f"cache.latents={latents}", f"cache.text={text}", "cache.precision=float16")
    encoded = plan(recipe_named("norm_cc3m", *overrides), SPEED)["disk"]["encoded"]
    assert (encoded["latents"] / 1e9, encoded["text"] / 1e9) == pytest.approx(expected, rel=0.02)


def test_figures_of_a_small_recipe(model, tmp_path):
    write_shard(tmp_path / "shards" / "0.tar", [(picture(), "red apple")] * 3)
    data = {"kind": "webdataset", "path": str(tmp_path / "shards"), "holdout_by": "captions"}
    path = write_recipe(tmp_path / "small.yaml", model, data=data, methods={"norm": {}, "taylor_sp": {"samples": 2}})
    content = plan(load_recipe(path, ["evaluation.at_steps=[2]"]), SPEED)
    pipeline = load_pipeline(model)
    result = load_recipe(path).method("norm").prune(pipeline)
    row = content["methods"]["norm"]
    assert row["dense_params"] == pipeline.unet.num_parameters() == content["model"]["params"]
    assert row["dense_macs"] == result.info.dense_macs and row["text_length"] == 16
    assert result.info.macs[0] <= row["target_macs"]
    assert row["params_estimate"] == pytest.approx(result.info.params[0], rel=0.3)
    disk, stages = content["disk"], {stage["stage"]: stage for stage in content["work"]}
    assert disk["data"] == {"images": 3, "captions": 3, "source": "counted"}
    assert disk["encoded"] == {
        "latents": 4 * 3 * 4 * 8 * 8,
        "text": 4 * 3 * 16 * 32,
        "prompts": 4 * 3 * 80,
        "pooled": 0,
    }
    assert disk["samples"] == (1 + 2 * 2) * 4 * 3 * 64 * 64 and disk["snapshots"] == disk["experts"]
    assert stages["norm: fine-tuning"]["samples"] == 16
    assert stages["norm: fine-tuning"]["macs"] == pytest.approx(16 * (3 * 0.7 + 1) * row["dense_macs"])
    assert stages["taylor_sp: calibration"]["macs"] == 2 * 3 * 50 * row["dense_macs"]
    assert stages["taylor_sp: depth scores"]["samples"] == 2 and stages["norm: depth scores"]["samples"] == 16
    assert stages["norm: generation"]["samples"] == 8 and stages["dense: generation"]["samples"] == 4
    assert set(content["memory"]["peak"]) == {"encoding", "taylor_sp: calibration", "fine-tuning", "generation"}
    assert isinstance(result, PruneResult)


@pytest.mark.long
def test_a_shared_backbone_is_trained_once_and_kept_dense(model, tmp_path):
    search = {"steps": 2, "batch_size": 4, "learning_rate": 1e-3}
    methods = {"aptp": {"experts": 3, "warmup": 1, "search": search}}
    own, shared = (
        plan(load_recipe(write_recipe(tmp_path / "small.yaml", model, methods=methods), settings), SPEED)
        for settings in ([], ["fine_tune.shared_backbone=true"])
    )
    steps = [next(s for s in each["work"] if s["stage"] == "aptp: fine-tuning")["samples"] for each in (own, shared)]
    assert steps[0] == 3 * steps[1]
    assert shared["disk"]["experts"] == 4 * shared["methods"]["aptp"]["dense_params"]


def test_what_is_not_cached_is_computed_at_every_step(model, tmp_path):
    parts, macs = load_parts(model, load_shape(model).denoiser), []
    for cache in ({}, {"latents": "off", "text": False}):
        path = write_recipe(tmp_path / "small.yaml", model, cache=cache)
        recipe, planned = load_recipe(path), Models().get(str(model))
        work = pruning_work(recipe, rows_of(recipe, planned), planned, None)
        macs.append(next(stage.macs for stage in work if stage.stage == "norm: fine-tuning"))
    assert macs[1] - macs[0] == pytest.approx(16 * (parts.picture_macs((8, 8))[0] + parts.caption_macs))


@pytest.mark.long
def test_a_budget_below_the_floor_says_the_floor(model, tmp_path):
    path = write_recipe(tmp_path / "small.yaml", model, prune={"budget": 0.7})
    floor = plan(load_recipe(path), SPEED)["methods"]["norm"]["floor"]
    with pytest.raises(ValueError, match=f"^small: .*still costs {floor:.2f}"):
        plan_all([load_recipe(path, ["prune.budget=0.001"])], SPEED)


TRAINER = {"steps": 1, "batch_size": 4, "learning_rate": 1.0}


@pytest.mark.parametrize(("trained", "recompute", "precision"), REHEARSED)
def test_the_rehearsal_takes_what_a_real_step_takes(trained, recompute, precision):
    config = TrainerConfig(**TRAINER, gradient_checkpointing=recompute, precision=precision)
    unet, autoencoder = emoji_model.build_unet(SHAPES).eval(), emoji_model.build_autoencoder(SHAPES)
    space, rehearsal = discover(unet, "aptp"), Rehearsal(unet, autoencoder)
    inputs = {key: torch.randn(value.shape) for key, value in zero_call(unet, (8, 8), 16, 4).items()}
    inputs["timestep"] = torch.ones(4, dtype=torch.long)
    if trained == "gates":
        expected = rehearsal.search(space, (8, 8), 16, 4, config)
        unet.requires_grad_(False)
        with LiveMemory(unet.parameters()) as memory, held(config, unet), gated(unet, space) as gates:
            gates.set(torch.rand(4, space.size, requires_grad=True))
            with autocast(precision):
                prediction = unet(**inputs).sample
            prediction.float().square().mean().backward()
    else:
        expected = rehearsal.training((8, 8), 16, 4, config)
        for parameter in unet.parameters():
            parameter.grad = torch.zeros_like(parameter)
        known = [*unet.parameters(), *(p.grad for p in unet.parameters())]
        with held(config, unet), LiveMemory(known) as memory:
            with autocast(precision):
                prediction = unet(**inputs).sample
            prediction.float().square().mean().backward()
    tolerance = 0.05 if precision == "float32" else 0.35  # norms run in float32 on a GPU, but not on a CPU
    assert memory.peak == pytest.approx(expected, rel=tolerance)


@pytest.mark.long
@pytest.mark.parametrize("recompute", [False, True])
def test_long_lists_of_blocks_are_rehearsed_by_few(recompute):
    blocks = {"num_layers": 9, "num_single_layers": 13}
    model = FluxTransformer2DModel(**{**CONFIGS["flux"][1], **blocks})
    settings = {**TRAINER, "gradient_checkpointing": recompute, "precision": "bfloat16"}
    few, whole = (
        Rehearsal(model, emoji_model.build_autoencoder(SHAPES), lowered=True, whole=whole) for whole in (False, True)
    )
    assert len(few._sizes) == 3 and len(whole._sizes) == 1
    config, sizes = FineTuneConfig(**settings, lora={"rank": 4}), ((16, 16), 5, 2)
    for rehearse in (
        lambda one: one.search(discover(model), *sizes, config),
        lambda one: one.training(*sizes, config),
        lambda one: one.low_rank(*sizes, config),
        lambda one: one.forward(*sizes, "bfloat16"),
    ):
        assert rehearse(few) == pytest.approx(rehearse(whole), rel=0.01)


@pytest.mark.long
def test_saved_tensors_are_within_the_rehearsal():
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
    rehearsal = Rehearsal(unet, emoji_model.build_autoencoder(SHAPES))
    assert rehearsal.training((8, 8), 16, 4) == pytest.approx(counted, rel=0.1)
    assert output.requires_grad


@pytest.mark.long
def test_settings_that_save_memory_save_memory(model, tmp_path):
    tuning = {"steps": 4, "batch_size": 64, "learning_rate": 1e-3}
    path = write_recipe(tmp_path / "small.yaml", model, methods={"uniarch": {"search": tuning}}, fine_tune=tuning)
    models = Models()

    def peaks(*overrides: str):
        return plan(load_recipe(path, overrides), SPEED, models)["memory"]["peak"]

    plain = peaks()
    small = peaks("fine_tune.micro_batch=8", "methods.uniarch.search.micro_batch=8")
    recomputed = peaks("fine_tune.gradient_checkpointing=true", "methods.uniarch.search.gradient_checkpointing=true")
    for stage in ("fine-tuning", "uniarch: search"):
        assert small[stage] < plain[stage] and recomputed[stage] < plain[stage]
    assert recomputed["generation"] == plain["generation"]
    config = load_recipe(path).fine_tune
    assert [samples_at_once(config, devices) for devices in (1, 3, 64)] == [64, 22, 1]
    assert samples_at_once(config.model_copy(update={"micro_batch": 8}), 3) == 8


def test_devices_share_the_work():
    work = [Work("search", 100, 1.0, ""), Work("fine-tuning", 600, 1.0, "", jobs=3), Work("evaluator", 5, None, "")]
    for devices, wall in ((1, 700), (2, 50 + 400), (3, 100 / 3 + 200), (4, 700 / 4)):
        content = timed(work, Speed(1.0, "as stated"), devices)
        assert content["wall_seconds"] == pytest.approx(wall) and content["seconds"] == 700
        assert content["gpu_hours"] == pytest.approx(700 / 3600)


def test_the_speed_is_measured_and_says_so(model):
    shape = load_shape(model)
    speed = measure_speed(shape.denoiser, 10**6, (8, 8), 16, "float32", 0.2)
    assert speed.macs_per_second > 0 and "measured on" in speed.source and "0.2 s" in speed.source
    assert shape.denoiser.device.type == "meta"


def test_data_is_counted_or_known():
    assert data_size(DataConfig()) == (1844, 4398) == (size_of(DataConfig()).images, size_of(DataConfig()).captions)
    assert size_of(DataConfig(kind="webdataset", path="nowhere")) is None
    assert size_of(DataConfig(kind="folder", path="cc3m")) is None
    for config, name in (
        (DataConfig(kind="webdataset", path="none/cc3m", split="validation"), "CC3M, validation"),
        (DataConfig(kind="cc3m_tsv", path="none/Train_GCC-training.tsv"), "CC3M, train"),
        (DataConfig(kind="coco", path="none", split="train"), "COCO 2014, train"),
    ):
        found = size_of(config)
        assert (found.images, found.captions) == PUBLISHED[name] and name in found.source
    assert prompt_width("emoji") == load_prompt_encoder("emoji").size and prompt_width("some/encoder") == 768


@pytest.mark.long
def test_the_command_takes_many_recipes(model, tmp_path):
    paths = [str(write_recipe(tmp_path / f"{name}.yaml", model, name=name)) for name in ("first", "second")]
    arguments = ["plan", *paths, "fine_tune.steps=8", "--throughput", "1", "--devices", "2"]
    result = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "plans.json")])
    assert result.exit_code == 0, result.output
    assert result.output.count("before and after") == 2 and "all plans" in result.output
    content = json.loads((tmp_path / "plans.json").read_text())
    assert [made["recipe"] for made in content] == ["first", "second"] and content[0]["devices"] == 2
    assert next(s for s in content[1]["work"] if s["stage"] == "norm: fine-tuning")["samples"] == 8 * 4
    one = CliRunner().invoke(app, ["plan", paths[0], "--measure", "0.1"])
    assert "prunekit run " + paths[0] in one.output and "all plans" not in one.output
    none = CliRunner().invoke(app, ["plan", "fine_tune.steps=8"])
    assert none.exit_code == 1 and "no recipe" in none.stderr


def test_the_summary_has_a_line_a_recipe(plans):
    console = Console(record=True, width=200, file=io.StringIO())
    shown = [plans[name] for name in QUICK]
    show_summary(shown, console)
    text = console.export_text()
    assert all(content["recipe"] in text for content in shown)


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
