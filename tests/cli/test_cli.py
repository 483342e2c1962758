"""Every command as a user types it, and every invalid input that is refused without a trained model."""

import json
import subprocess
import sys

import pytest
import torch
from command_line import ok, refused
from small_model import CAPTIONS, picture, write_pipeline, write_recipe, write_shard
from typer.testing import CliRunner

import prunekit as pk
from prunekit.cli import app
from prunekit.data.bad_samples import DataError
from prunekit.data.config import DataConfig, load_data
from prunekit.jobs.recipe import dump_recipe, load_recipe
from prunekit.methods import PruneResult
from prunekit.models import load_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture
def recipe(tmp_path, model):
    return write_recipe(tmp_path / "small.yaml", model)


def test_help_names_every_command():
    text = ok("--help")
    for command in ("run", "resume", "plan", "units", "macs", "methods", "generate", "report", "demo", "serve"):
        assert command in text
        assert "--help" in ok(command, "--help")


def test_units(model):
    text = ok("units", "sd-2.1")
    assert "1,606 width + 14 depth = 1,620 units" in text and "up_blocks.3.attentions.2" in text
    assert "0 width" not in ok("units", model, "--depth", "all", "--include", "mid_block.*", "--exclude", "*.resnets.0")
    assert "PrunedUNet2DConditionModel" not in text


@pytest.mark.parametrize(
    ("arguments", "macs"),
    [
        (["sd-2.1"], 1_074_552_872_960),
        (["stabilityai/stable-diffusion-xl-base-1.0", "--size", "32"], None),
        (["sd-1.5"], 401_636_720_640),
        (["CompVis/stable-diffusion-v1-4", "--convention", "aptp"], 461_400_259_840),
        (["sd-2.1-base", "--size", "96x96", "--text-length", "77"], 1_074_552_872_960),
    ],
)
def test_macs(arguments, macs):
    text = ok("macs", *arguments)
    assert "parameters" in text and (macs is None or f"{macs:,} MACs" in text)


def test_macs_of_a_pipeline_and_of_a_pruned_unet_are_checked(model, tmp_path):
    pytest.importorskip("thop")
    pytest.importorskip("fvcore")
    assert "Every difference is explained" in ok("macs", model, "--check")
    unet = load_pipeline(model).unet
    pk.slice_unet(unet, pk.discover(unet).random(0.5)).save_pretrained(tmp_path / "pruned")
    text = ok("macs", tmp_path / "pruned", "--text-length", 16)
    assert text.startswith("PrunedUNet2DConditionModel of ")


def test_methods():
    text = ok("methods")
    assert "norm: Remove the units" in text and "prunekit methods aptp" in text and "threshold" not in text
    text = ok("methods", "norm", "taylor_sp")
    assert "norm: Remove the units" in text and "budget" in text and "scope" in text and "threshold" in text
    assert "did you mean 'taylor_sp'" in refused("methods", "taylor")


def test_plan(recipe):
    text = ok("plan", recipe, "prune.budget=0.6", "--throughput", 0.01)
    assert "norm: fine-tuning" in text and "0.6" in text and "as stated" in text
    assert f"prunekit run {recipe} prune.budget=0.6" in text.replace("\n", " ")


@pytest.fixture
def run_directory(tmp_path, recipe, model):
    """Return a run's directory with a method's result and an expert, as `prunekit run` writes it."""
    folder = tmp_path / "run"
    pipeline = load_pipeline(model)
    architecture = pk.discover(pipeline.unet).random(0.7)
    PruneResult([architecture]).save(folder / "methods" / "norm")
    pk.slice_unet(pipeline.unet, architecture).save_pretrained(folder / "methods" / "norm" / "experts" / "0" / "unet")
    (folder / "recipe.yaml").write_text(dump_recipe(load_recipe(recipe)))
    return folder


def test_generate(run_directory, tmp_path):
    (tmp_path / "prompts.txt").write_text("blue star\n\ngreen cube\n")
    options = ["--method", "norm", "--steps", 2, "--seed", 3]
    given = ["--prompt", "red apple", "--prompts-file", tmp_path / "prompts.txt"]
    assert "red apple" in ok("generate", run_directory, *given, *options)
    folder = run_directory / "generated" / "norm"
    assert [path.name for path in sorted(folder.glob("*.png"))] == ["00000.png", "00001.png", "00002.png"]
    again = ["generate", run_directory, "--prompt", "blue star", *options]
    assert f"are in {folder}-2" in ok(*again).replace("\n", "") and f"are in {folder}-2" in ok(*again).replace("\n", "")
    assert f"are in {folder}\n" in ok("generate", run_directory, *given, *options)
    ok("generate", run_directory, "--prompt", "green cube", *options, "--output", tmp_path / "alone")
    alone = (tmp_path / "alone" / "00000.png").read_bytes()
    assert alone == (folder / "00002.png").read_bytes()


def test_generate_refuses(run_directory, tmp_path):
    assert "has no result of method 'aptp': it has norm" in refused(
        "generate", run_directory, "--method", "aptp", "--prompt", "cat"
    )
    assert "--prompt TEXT" in refused("generate", run_directory, "--method", "norm")
    assert "neither a run directory" in refused("generate", tmp_path / "nowhere", "--prompt", "cat")
    assert "nowhere.txt" in refused(
        "generate", run_directory, "--method", "norm", "--prompts-file", tmp_path / "nowhere.txt"
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("prune.bugdet=0.5", "did you mean 'budget'"),
        ("fine_tune.lerning_rate=1", "did you mean 'learning_rate'"),
        ("prune.budget=0", "greater than 0"),
        ("prune.budget=1.5", "less than 1"),
        ("prune.budget=0.01", "with every unit removed this UNet still costs 0."),
        ("prune.depth=everything", "'aptp', 'all', 'blocks' or 'none'"),
        ("methods.nrom={}", "did you mean 'norm'"),
        ("prune.include=dwon_blocks.*", "matches no module path"),
        ("prune.resolution=63", "the nearest is"),
        ("model=nowhere/at/all", "no directory"),
        ("model=sd-2.2", "did you mean 'sd-2.1'"),
        ("fine_tune.steps", "fine_tune.steps=None"),
    ],
)
def test_a_wrong_setting_is_one_line(recipe, override, expected):
    assert expected in refused("plan", recipe, override, "--throughput", 1)


def test_wrong_arguments_are_one_line(recipe, tmp_path):
    assert "did you mean" in refused("plan", recipe.with_name("smal.yaml"))
    assert "no recipe" in refused("run", tmp_path / "nowhere" / "x.yaml")
    line = refused("run", recipe, f"cache.directory={recipe}/cache", "--directory", tmp_path / "run")
    assert f"cache.directory={recipe}/cache cannot be created: Not a directory" in line
    assert "No such command" in refused("prnue")
    assert "Missing argument" in refused("plan")
    assert "No such option" in refused("units", "sd-2.1", "--dept", "all")
    assert "a side" in refused("macs", "sd-2.1", "--size", "a") or "side" in refused("macs", "sd-2.1", "--size", "0")
    assert "choose one of" in refused("units", "sd-2.1", "--depth", "some")
    assert "choose one of" in refused("macs", "sd-2.1", "--convention", "exakt")
    assert "did you mean 'emoji'" in refused("units", "emojy")
    assert "is not a run directory" in refused("resume", tmp_path)


def test_an_unsupported_model_is_one_line(tmp_path):
    for name, change in {
        "image": {"addition_embed_type": "image"},
        "lumina": {"_class_name": "Lumina2Transformer2DModel"},
    }.items():
        unet = tmp_path / name / "unet"
        unet.mkdir(parents=True)
        (unet / "config.json").write_text(json.dumps({"sample_size": 8, **change}))
        assert "not supported" in refused("units", tmp_path / name)
    (unet / "config.json").write_text("{")
    assert "cannot be read" in refused("units", tmp_path / name)
    assert "holds neither" in refused("units", tmp_path)


def test_a_run_directory_of_another_recipe_is_refused(run_directory, recipe):
    line = refused("run", recipe, "prune.budget=0.5", "--directory", run_directory)
    assert "prune.budget is 0.7 there and 0.5 here" in line


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([(picture(), "red apple"), (picture(), " ")], "empty caption"),
        ([(b"", "red apple")], "no picture"),
        ([], "0.tar"),
        (None, "no shard"),
    ],
)
def test_bad_data_stops_a_run_in_one_line(recipe, tmp_path, samples, expected):
    (tmp_path / "shards").mkdir()
    if samples is not None:
        write_shard(tmp_path / "shards" / "0.tar", samples)
    line = refused("run", recipe, f"data.path={tmp_path / 'shards'}", "--directory", tmp_path / "out")
    assert expected in line


def test_a_corrupt_picture_is_named(tmp_path):
    pictures = [picture(), picture("blue")[:40], picture("green")]
    write_shard(tmp_path / "0.tar", list(zip(pictures, CAPTIONS, strict=False)))
    data = load_data(DataConfig(kind="webdataset", path=str(tmp_path)), seed=0)
    with pytest.raises(DataError, match="'red ball' cannot be read"):
        data.pixels(range(3), 16)


def test_bugs_show_a_traceback_and_debug_shows_all(monkeypatch, recipe):
    result = CliRunner().invoke(app, ["--debug", "plan", str(recipe), "prune.budget=0"])
    assert isinstance(result.exception, ValueError)

    def broken(name):
        torch.zeros(2).reshape(3)

    monkeypatch.setattr("prunekit.models.load_shape", broken)
    assert isinstance(CliRunner().invoke(app, ["units", "sd-2.1"]).exception, RuntimeError)
    monkeypatch.setattr("prunekit.models.load_shape", lambda name: int("x"))
    result = CliRunner().invoke(app, ["units", "sd-2.1"])
    assert isinstance(result.exception, SystemExit | ValueError)


def test_an_interrupt_is_one_line(monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("prunekit.models.load_shape", interrupted)
    assert "prunekit resume" in refused("units", "sd-2.1")


def test_help_needs_no_torch():
    command = [sys.executable, "-X", "importtime", "-m", "prunekit", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "generate" in result.stdout
    assert "typer" in result.stderr and "torch" not in result.stderr and "diffusers" not in result.stderr
