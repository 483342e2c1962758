"""The whole job, from data to table, on Stable Diffusion 1.x (epsilon prediction) and XL; test_run.py covers 2.x."""

import json

import pytest
import torch
import yaml
from small_model import CAPTIONS, COLORS, TRAINING, picture, write_shard
from small_sdxl import write

import prunekit as pk
from prunekit.core.registry import with_denoiser
from prunekit.data.encoded import encode
from prunekit.data.images import CaptionedImages
from prunekit.evaluation.generate import generate
from prunekit.jobs.compare.comparing import compare
from prunekit.jobs.plan import Devices, plan
from prunekit.jobs.recipe import load_recipe
from prunekit.jobs.run import start
from prunekit.models import load_pipeline
from prunekit.report.comparison_table import TIMINGS, rows_of
from prunekit.serving import PromptRoutedPipeline

METHODS = {
    "norm": {"samples": 2},
    "taylor_sp": {"samples": 2, "batch_size": 2, "num_timesteps": 2},
    "bksdm": {},
    "aptp": {"experts": 2, "warmup": 1, "search": {"steps": 2, **TRAINING}},
}


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.long) for name in ("sd1", "sdxl")])
def run(request, tmp_path_factory):
    """Return the family, recipe and directory of a finished run."""
    folder = tmp_path_factory.mktemp(request.param)
    samples = [(picture(COLORS[i % 4]), f"{caption} number {i}") for i, caption in enumerate(CAPTIONS[:8])]
    write_shard(folder / "shards" / "0.tar", samples)
    content = {
        "name": request.param,
        "model": str(write(folder / "model", request.param)),
        "data": {"kind": "webdataset", "path": str(folder / "shards"), "holdout": 0.25},
        "resolution": 32,  # half the model's size, so that XL's size condition differs
        "prune": {"budget": 0.7},
        "methods": METHODS,
        "fine_tune": {"steps": 2, **TRAINING},
        "evaluation": {"num_images": 2, "steps": 1, "batch_size": 2, "num_predictions": 2, "num_pictures": 2},
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    return request.param, recipe, start(recipe, (), folder / "run")


def test_every_method_reaches_the_table(run):
    _, _, directory = run
    rows = {row["name"]: row for row in json.loads((directory / "results.json").read_text())["table"]["rows"]}
    assert list(rows) == ["dense", *METHODS]
    assert rows["dense"]["macs_ratio"] == 1 and rows["dense"]["agreement"] == 0
    for name in METHODS:
        row = rows[name]
        assert 0.3 < row["macs_ratio"] <= 0.7 and 0 < row["agreement"] < float("inf"), name
        assert row["cmmd"] > 0 and row["seconds_per_image"] > 0, name
    assert rows["aptp"]["params"] > rows["norm"]["params"]


def test_experts_generate(run):
    _, _, directory = run
    pipeline = PromptRoutedPipeline.from_pretrained(directory, device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    drawn = pipeline(CAPTIONS[:3], seeds=[0, 1, 2], **options)
    assert drawn.images.shape == (3, 64, 64, 3) and drawn.images.std() > 0
    alone = pipeline(CAPTIONS[2], seeds=2, **options)
    assert (alone.images[0] == drawn.images[2]).all() and alone.experts[0] == drawn.experts[2]


@pytest.mark.long
def test_a_plan_counts_it(run):
    _, recipe, directory = run
    counted = plan(load_recipe(recipe), Devices(throughput=1e12))
    ratio = json.loads((directory / "methods" / "norm" / "result.json").read_text())["info"]["dense_macs"]
    assert counted["methods"]["norm"]["dense_macs"] == ratio


@pytest.mark.long
def test_a_comparison_of_xl_reaches_its_table(tmp_path):
    """Once, it failed after training all cells, because the timed calls lacked the added conditions."""
    samples = [(picture(COLORS[i % 4]), f"{caption} number {i}") for i, caption in enumerate(CAPTIONS[:8])]
    write_shard(tmp_path / "shards" / "0.tar", samples)
    content = {
        "job": "compare",
        "name": "sdxl",
        "model": str(write(tmp_path / "model", "sdxl")),
        "data": {"kind": "webdataset", "path": str(tmp_path / "shards"), "holdout": 0.25},
        "resolution": 32,
        "methods": {"norm": {"samples": 2}},
        "budgets": [{"budget": 0.7}],
        "protocols": ["equal_steps", "equal_compute"],
        "fine_tune": {"steps": 1, **TRAINING},
        "evaluation": {"num_images": 2, "steps": 1, "batch_size": 2, "num_predictions": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    directory = compare([tmp_path / "recipe.yaml"], (), tmp_path / "out")
    assert json.loads((directory / "results.json").read_text())["missing"] == []
    rows = {row.method: row for row in rows_of([json.loads(p.read_text()) for p in directory.glob("cells/*.json")])}
    assert rows.keys() == {"dense", "norm"} and rows["norm"].costs["macs"] < rows["dense"].costs["macs"]
    ratios = json.loads((directory / TIMINGS).read_text())
    assert ratios and "| norm |" in (directory / "table.md").read_text()


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_another_unet_in_the_same_pipeline(family, tmp_path):
    pipeline = load_pipeline(write(tmp_path / "model", family))
    dense = pipeline.unet
    space = pk.discover(dense, depth="all")
    pruned = with_denoiser(pipeline, pk.slice_unet(dense, space.random(0.5)))
    assert type(pruned) is type(pipeline) and pipeline.unet is dense and pruned.unet is not dense
    assert pruned.vae is pipeline.vae
    for name, value in pipeline.config.items():
        assert name == "unet" or pruned.config[name] == value, name
    same = with_denoiser(pipeline, pk.slice_unet(dense, space.full()))
    arguments = (CAPTIONS[:2], [0, 1], 2, 3.0)
    expected = generate(pipeline, *arguments).int()
    assert (generate(same, *arguments).int() - expected).abs().max() <= 1  # rounding, as the memory layout changes
    assert (generate(pruned, *arguments).int() - expected).abs().max() > 1


class Prompts:
    def encode(self, texts):
        return torch.zeros(len(texts), 3)


def test_xl_is_trained_on_what_it_is_sampled_with(tmp_path):
    """Encoded conditions equal those that the pipeline gives its UNet: prompts, the empty prompt, and sizes."""
    pipeline = load_pipeline(write(tmp_path / "model", "sdxl"))
    captions = CAPTIONS[:2]
    flags = torch.zeros(2, dtype=torch.bool)
    images = CaptionedImages([picture(), picture("blue")], captions, captions, torch.arange(2), flags)
    data = encode(pipeline, images, Prompts(), 64)
    seen = {}

    def look(module, arguments, options):
        seen.update(options)

    hook = pipeline.unet.register_forward_pre_hook(look, with_kwargs=True)
    generate(pipeline, captions, [0, 1], 1, 3.0)
    hook.remove()
    pairs = torch.tensor([0, 1, 0, 1])
    ours = data.conditions(pairs, dropped=torch.tensor([True, True, False, False]))
    assert torch.allclose(ours["text"], seen["encoder_hidden_states"], atol=1e-5)
    for role, name in (("pooled", "text_embeds"), ("sizes", "time_ids")):
        assert torch.allclose(ours[role], seen["added_cond_kwargs"][name], atol=1e-5), name
