"""Prompts go to their experts, in any company, and come back as the expert alone would draw them."""

import pytest
import torch
from small_model import CAPTIONS, RECIPE, write_pipeline

import prunekit as pk
from prunekit.data.prompt_encoder import PROMPT_ENCODER_DIRECTORY, load_prompt_encoder
from prunekit.methods import PruneResult
from prunekit.methods.aptp.router import Router
from prunekit.models import load_pipeline
from prunekit.recipe import dump_recipe, parse_recipe
from prunekit.sampling import draw
from prunekit.serving import RoutedModel

STEPS, GUIDANCE = 2, 3.0


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    """A run with two experts and a router over the embedded prompt encoder."""
    if not PROMPT_ENCODER_DIRECTORY.is_dir():
        pytest.skip("the embedded prompt encoder is not in this checkout")
    folder = tmp_path_factory.mktemp("run")
    model = write_pipeline(folder / "model")
    unet = load_pipeline(model).unet
    space = pk.discover(unet)
    architectures = [space.random(0.5, seed=seed) for seed in range(2)]
    z = load_prompt_encoder("emoji").encode(CAPTIONS)
    weight = torch.randn(2, z.shape[1], generator=torch.Generator().manual_seed(0))
    PruneResult(architectures, Router(weight, torch.zeros(2))).save(folder / "methods" / "aptp")
    for index, architecture in enumerate(architectures):
        expert = folder / "methods" / "aptp" / "experts" / str(index) / "unet"
        pk.slice_unet(unet, architecture).save_pretrained(expert)
    (folder / "recipe.yaml").write_text(dump_recipe(parse_recipe({**RECIPE, "model": str(model)})))
    return folder


def test_each_prompt_is_drawn_by_its_expert(run_directory):
    model = RoutedModel.load(run_directory, "aptp", device="cpu")
    assert model.num_experts == 2 and model.guidance == RECIPE["evaluation"]["guidance"]
    dense = model.pipeline.unet
    prompts, seeds = CAPTIONS[:6], list(range(6))
    pictures, experts = model.generate(prompts, seeds, STEPS, GUIDANCE)
    assert pictures.shape == (6, 3, 64, 64) and pictures.dtype == torch.uint8
    assert set(experts.tolist()) == {0, 1}
    assert model.pipeline.unet is dense
    for index in (0, 5):
        alone, expert = model.generate([prompts[index]], [seeds[index]], STEPS, GUIDANCE)
        assert torch.equal(alone[0], pictures[index]) and expert.item() == experts[index]
        model.pipeline.unet = model.expert(int(experts[index]))
        assert torch.equal(draw(model.pipeline, [prompts[index]], [seeds[index]], STEPS, GUIDANCE)[0], pictures[index])
        model.pipeline.unet = dense
    together, same = model.generate(prompts, seeds, STEPS, GUIDANCE, batch_size=4)
    assert torch.equal(same, experts)
    assert (together.int() - pictures.int()).abs().max() <= 1  # rounding of larger batches


def test_what_is_missing_is_said(run_directory, tmp_path):
    with pytest.raises(FileNotFoundError, match="no run directory"):
        RoutedModel.load(tmp_path)
    with pytest.raises(ValueError, match="no result of method 'norm': it has aptp"):
        RoutedModel.load(run_directory, "norm")
    model = RoutedModel.load(run_directory, device="cpu")
    with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
        model.generate(["a", "b"], [0])
    with pytest.raises(FileNotFoundError, match="expert 7 of aptp is not there yet"):
        model.expert(7)
