"""Write a run with several experts and a router, as `prunekit run` would, for a small pipeline."""

from pathlib import Path

import torch
from small_model import RECIPE, SHAPES, write_pipeline
from small_sdxl import write

import prunekit as pk
from prunekit.data.prompt_encoder import load_prompt_encoder
from prunekit.jobs.recipe import dump_recipe, parse_recipe
from prunekit.methods import PruneResult
from prunekit.methods.router import Router
from prunekit.models import emoji_model, load_pipeline

SUBJECTS = ("apple", "ball", "cube", "star", "cat", "dog", "tree", "house", "car", "moon", "fish", "bird")
PROMPTS = [f"{color} {subject}" for subject in SUBJECTS for color in ("red", "green", "blue", "big", "old", "two")]


def write_mixture(
    folder: Path,
    experts: int = 2,
    family: str = "sd2",
    depth_only: tuple[int, ...] = (),
    channels: tuple[int, ...] | None = None,
) -> Path:
    """Write the run to `folder`; its contents are the same in every call.

    depth_only: experts that use BK-SDM's architecture, which a stock config expresses. channels: channels of a larger
    "sd2" UNet.
    """
    layers = 2 if depth_only or channels else 1  # BK-SDM needs two layers, like Stable Diffusion
    model = write_pipeline(folder / "model", layers) if family == "sd2" else write(folder / "model", family)
    if channels is not None:
        large = SHAPES.model_copy(update={"unet_channels": channels})
        emoji_model.build_unet(large).save_pretrained(model / "unet")
    unet = load_pipeline(model).unet
    space = pk.discover(unet, "blocks")
    architectures = [space.random(0.4 + 0.1 * seed, seed=seed) for seed in range(experts)]
    for index in depth_only:
        architectures[index] = pk.methods.BKSDM(variant="base").architecture(unet).on(space)
    z = load_prompt_encoder("emoji").encode(PROMPTS)
    weight = torch.randn(experts, z.shape[1], generator=torch.Generator().manual_seed(0))
    bias = -(z @ weight.T).mean(dim=0)  # balances the experts, so that each gets prompts
    method = folder / "methods" / "aptp"
    info = {"method": "aptp", "ratio": [0.5] * experts}
    PruneResult(architectures, Router(weight, bias), info).save(method)
    for index, architecture in enumerate(architectures):
        pk.slice_unet(unet, architecture).save_pretrained(method / "experts" / str(index) / "unet")
    recipe = parse_recipe({**RECIPE, "model": str(model), "methods": {"aptp": {"experts": experts}}})
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    return folder
