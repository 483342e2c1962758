"""`check` runs every stage with the recipe's batch sizes, and prints one line about the first stage that fails."""

import pytest
import torch
from data_layouts import COLORS, LAYOUTS, picture, webdataset
from small_model import TRAINING, write_recipe, write_world
from small_sdxl import write
from typer.testing import CliRunner

from prunekit.cli import app
from prunekit.data.config import DataConfig, load_data
from prunekit.jobs.check import CheckError, check
from prunekit.jobs.check.checking import CheckLog, explained
from prunekit.jobs.check.shrinking import first_images, shrunk, write_shard
from prunekit.jobs.recipe import load_recipe

SEARCH = {"steps": 50, "micro_batch": 2, "warmup_steps": 5, **TRAINING}
METHODS = {
    "norm": {},
    "taylor_sp": {"samples": 64, "batch_size": 4},
    "bksdm": {"variant": None},
    "aptp": {"experts": 2, "warmup": 20, "search": SEARCH},
}
EVALUATION = {"num_images": 100, "steps": 20, "guidance": 2.0, "batch_size": 6}
TUNING = {"steps": 40, "batch_size": 8, "micro_batch": 4, "learning_rate": 1e-3, "decay_share": 0.5, "ema": 0.9}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"), layers=2)  # BK-SDM needs 2 layers


def recipe(folder, world, *overrides, **changes):
    settings = {**world, "prune": {"budget": 0.8}, "fine_tune": TUNING, "evaluation": EVALUATION, **changes}
    return load_recipe(write_recipe(folder / "small.yaml", settings.pop("model"), **settings), overrides)


def test_every_stage_of_a_run(tmp_path, world, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    said = []
    content = check(
        recipe(tmp_path, world, methods=METHODS, evaluation={**EVALUATION, "at_steps": [10]}), say=said.append
    )
    assert content["stages"] == said and all(stage.seconds > 0 and stage.peak_bytes > 2**20 for stage in said)
    assert [stage.stage for stage in said] == [
        *("recipe", "data", "model and encoding", "encoding again"),
        *("aptp: search", "bksdm: choice", "norm: choice", "taylor_sp: choice", "prompts and evaluator"),
        *(f"{name}: {part}" for name in sorted(METHODS) for part in ("fine-tuning", "generation", "evaluation")),
    ]
    work = {row["stage"]: row for row in content["work"]}
    assert {"encoding of pictures", "aptp: search", "dense: generation", "norm: depth scores"} <= set(work)
    assert all(row["seconds"] > 0 for row in work.values())
    assert work["aptp: fine-tuning"]["samples"] == 2 * 40 * 8
    assert content["wall_seconds"] == pytest.approx(content["seconds"]) and content["seconds"] < 3600
    assert not [path.name for path in tmp_path.iterdir() if path.name != "small.yaml"]


def test_every_row_of_a_comparison_once(tmp_path, world):
    budgets = [{"budget": 0.8, "seeds": [3, 4], "methods": ["norm"]}, {"budget": 0.7, "seeds": [0, 1, 2]}]
    plain = "norm @ 1: plain"  # a label may contain the separator of a stage's title
    methods = {"norm": {}, plain: {"method": "norm", "distillation": False}}
    compared = recipe(tmp_path, world, job="compare", prune={}, methods=methods, budgets=budgets)
    content = check(compared, devices=2)
    stages = [stage.stage for stage in content["stages"]]
    assert [s for s in stages if "fine-tuning" in s] == ["norm @ 0.8: fine-tuning", f"{plain} @ 0.7: fine-tuning"]
    work = {row["stage"]: row["seconds"] for row in content["work"]}
    assert {"norm @ 0.7: fine-tuning", "norm @ 0.7: generation", f"{plain} @ 0.7: generation"} <= set(work)
    assert all(seconds > 0 for seconds in work.values())
    assert content["wall_seconds"] == pytest.approx(content["seconds"] / 2, rel=0.2)


@pytest.mark.parametrize(
    ("recover", "parts"),
    [
        pytest.param({"closed_form": {"batch_size": 4}}, ["closed-form refit", "fine-tuning"], marks=pytest.mark.long),
        ({"closed_form": {"batch_size": 8}, "fine_tune": False}, ["closed-form refit"]),
        ({"fine_tune": False}, ["cut"]),
    ],
)
def test_the_recovery_is_the_recipes(recover, parts, tmp_path, world):
    content = check(recipe(tmp_path, world, recover=recover))
    stages = [stage.stage for stage in content["stages"] if stage.stage.startswith("norm")]
    assert stages == [f"norm: {part}" for part in ("choice", *parts, "generation", "evaluation")]
    work = {row["stage"]: row for row in content["work"]}
    recovery = {stage for stage in work if stage.startswith("norm: ") and ("refit" in stage or "tuning" in stage)}
    assert recovery == {f"norm: {part}" for part in parts if part != "cut"}
    assert all(row["seconds"] > 0 for row in work.values())


def test_the_recovery_of_each_row_of_a_comparison(tmp_path, world):
    methods = {
        "norm": {},
        "refitted": {"method": "norm", "closed_form": {"batch_size": 4}, "fine_tune": False},
        "default": {"method": "norm", "closed_form": True},
        "plain": {"method": "norm", "closed_form": False},
    }
    settings = {
        "prune": {},
        "methods": methods,
        "budgets": [{"budget": 0.8}],
        "recover": {"closed_form": {"batch_size": 8}},
    }
    compared = recipe(tmp_path, world, job="compare", **settings)
    small = shrunk(compared, compared.data)
    refits = {label: small.recovering(label).closed_form for label in methods}
    samples = {label: config and config.samples for label, config in refits.items()}
    assert samples == {"norm": 8, "refitted": 4, "default": 8, "plain": None}
    assert refits["refitted"].batch_size == 4 and small.recovering("refitted").fine_tune is False
    stages = [stage.stage for stage in check(compared)["stages"]]
    assert [stage for stage in stages if stage.endswith(("refit", "tuning"))] == [
        *(f"{label} @ 0.8: {part}" for label in ("default", "norm") for part in ("closed-form refit", "fine-tuning")),
        "plain @ 0.8: fine-tuning",
        "refitted @ 0.8: closed-form refit",
    ]


def test_an_sdxl_pipeline(tmp_path, world):
    sdxl = {**world, "model": str(write(tmp_path / "sdxl", "sdxl"))}
    content = check(recipe(tmp_path, sdxl, methods={"uniarch": {"search": SEARCH}}))
    assert content["stages"][-1].stage == "uniarch: evaluation"


def test_batches_stay_as_they_are(tmp_path, world):
    whole = recipe(
        tmp_path, world, "evaluation.at_steps=[10]", methods=METHODS, resolution=64, cache={"latents": "moments"}
    )
    small = shrunk(whole, whole.data, devices=4)
    assert small.fine_tune.batch_size == 8 and small.fine_tune.micro_batch == 4 and small.fine_tune.ema == 0.9
    assert small.resolution == 64 and small.cache.latents == "moments" and small.evaluation.batch_size == 6
    assert (small.fine_tune.steps, small.evaluation.num_images, small.evaluation.at_steps) == (2, 6, [])
    search = small.method("aptp").config.search
    assert (search.steps, search.batch_size, search.micro_batch) == (2, 4, 1)  # with four devices, each has one sample
    taylor = small.method("taylor_sp").config
    assert (taylor.samples, taylor.batch_size, taylor.num_timesteps) == (4, 4, 1)
    assert whole.fine_tune.steps == 40 and whole.methods["aptp"]["search"]["steps"] == 50


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_the_first_pairs_are_those_of_the_data(layout, tmp_path):
    (tmp_path / "all").mkdir()
    samples = [(picture(color), f"a {color} tile") for color in COLORS]
    config = DataConfig(**layout(tmp_path / "all", samples))
    images, whole = first_images(config, 0, 5), load_data(config, 0)
    assert images.captions == whole.captions[:5] and images.num_images == 5
    written = load_data(write_shard(images, 4, tmp_path / "few" / "0.tar"), 0)
    assert written.captions == whole.captions[:4] and bytes(written.encoded[3]) == bytes(whole.encoded[3])


def test_a_bad_sample_among_the_first_is_left_out(tmp_path):
    samples = [(b"no picture", "bad"), *((picture(color), f"a {color} tile") for color in COLORS)]
    images = first_images(DataConfig(**webdataset(tmp_path, samples)), 0, 4)
    assert images.captions == [f"a {color} tile" for color in COLORS[:3]] and len(images.skipped) == 1


@pytest.mark.parametrize(
    "cache",
    [
        pytest.param({"latents": "off", "text": False}, marks=pytest.mark.long),
        {"latents": "moments", "precision": "float16"},
    ],
)
def test_caches_of_every_kind(cache, tmp_path, world):
    content = check(recipe(tmp_path, world, cache=cache, methods={"uniarch": {"search": SEARCH}}))
    assert content["stages"][-1].stage == "uniarch: evaluation" and content["seconds"] > 0


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.path=nowhere"], "data failed: data.path=nowhere does not exist"),
        (["model=nowhere/nothing"], "recipe failed: no model 'nowhere/nothing' here"),
        (["prune.budget=0.0001"], "norm: choice failed: budget"),
        (["evaluator=./nothing"], "(settings: evaluator)"),
        (["tracking.trackers=[nothing]"], "tracking.trackers"),
    ],
    ids=lambda value: value[0].partition("=")[0] if isinstance(value, list) else "",
)
def test_the_first_failure_is_one_line(overrides, expected, tmp_path, world):
    recipe(tmp_path, world)
    result = CliRunner().invoke(app, ["check", str(tmp_path / "small.yaml"), *overrides])
    assert result.exit_code == 1 and result.stderr.startswith("prunekit: ") and expected in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and "Traceback" not in result.output


def test_the_command_says_every_stage(tmp_path, world):
    recipe(tmp_path, world)
    result = CliRunner().invoke(app, ["check", str(tmp_path / "small.yaml"), "--devices", "2"])
    assert result.exit_code == 0, result.output
    assert "ok  norm: fine-tuning" in result.output and "on 2 devices" in result.output


def test_what_cannot_be_checked(tmp_path):
    path = tmp_path / "pretrain.yaml"
    training = "{steps: 1, batch_size: 1, learning_rate: 1.0}"
    parts = "".join(f"{part}: {training}\n" for part in ("autoencoder", "decoder", "diffusion", "evaluator"))
    path.write_text(f"job: pretrain\nname: tiny\n{parts}")
    with pytest.raises(ValueError, match="check is for prune and compare; use instead"):
        check(load_recipe(path))


def test_errors_that_are_not_ours_name_their_kind():
    assert explained(KeyError("x"), "stage", "data") == "stage failed: KeyError: 'x' (settings: data)"
    assert "larger device" in explained(MemoryError(), "stage", "data")
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    text = explained(caught.value, "search", "methods.a", "methods.a.search.micro_batch")
    assert text.startswith("search does not fit into memory: lower methods.a.search.micro_batch, or set gradient")
    assert issubclass(CheckError, ValueError)


def test_the_pace_is_that_of_the_last_step(tmp_path):
    log = CheckLog(tmp_path)
    for step, seconds in ((1, 9.0), (2, 10.5)):
        log.log({"stage": "aptp search", "step": step, "seconds": seconds})
    assert log.steps_seconds(0) == 3.0 and not list(tmp_path.iterdir())
