"""The three things that are timed: one UNet call, the whole sampling, and the whole image."""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from prunekit.benchmark.models import PROMPT
from prunekit.sampling import quiet
from prunekit.timing.calls import unet_call, unet_inputs

__all__ = ["pipeline_call", "unet_call", "unet_calls", "unet_inputs", "with_unet"]

EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def with_unet(pipeline: DiffusionPipeline, unet: UNet2DConditionModel) -> DiffusionPipeline:
    """Return a pipeline of the same parts around another UNet, with a scheduler of its own."""
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    parts = {**pipeline.components, "unet": unet, "scheduler": scheduler}
    checker = {"requires_safety_checker": False} if "safety_checker" in parts else {}
    return type(pipeline)(**parts, **checker)


def pipeline_call(
    pipeline: DiffusionPipeline,
    workload: str,
    resolution: int,
    batch: int,
    guidance: float,
    steps: int,
    stack: ExitStack,
    seed: int = 0,
) -> Callable[[], Tensor]:
    """Return one call of the stock pipeline: its loop alone ("sampling"), or all of it ("image").

    stack: the pipeline's bar and safety checker are off until it closes.
    """
    stack.enter_context(quiet(pipeline))
    unet, side = pipeline.unet, resolution // pipeline.vae_scale_factor
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, unet.config.in_channels, side, side, generator=generator).to(unet.device, unet.dtype)
    prompts = [PROMPT] * batch
    common = {
        "height": resolution,
        "width": resolution,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "latents": latents,
    }
    if workload == "image":
        return lambda: pipeline(prompt=prompts, output_type="pt", **common).images
    with torch.no_grad():
        encoded = pipeline.encode_prompt(
            prompt=prompts, device=unet.device, num_images_per_prompt=1, do_classifier_free_guidance=guidance > 1
        )
    embeds = {name: value for name, value in zip(EMBEDS, encoded, strict=False) if value is not None}
    return lambda: pipeline(output_type="latent", **embeds, **common).images


def unet_calls(pipeline: DiffusionPipeline, steps: int) -> int:
    """Return how often a pipeline's loop calls the UNet."""
    pipeline.scheduler.set_timesteps(steps)
    return len(pipeline.scheduler.timesteps)
