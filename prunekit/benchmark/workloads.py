"""The three things that are timed: one UNet call, the whole sampling, and the whole image."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from prunekit.benchmark.models import PROMPT
from prunekit.sampling import quiet

TIMESTEP = 500  # of a single call; which one it is does not change the time
EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def unet_inputs(
    unet: UNet2DConditionModel, batch: int, latent: int | tuple[int, int], text_length: int, seed: int = 0
) -> dict[str, Any]:
    """Return keyword arguments of a UNet call: normal noise and text on its device, in its dtype, for `batch` samples.

    The timestep is a scalar, as a pipeline's; SDXL's further conditions are there where the UNet takes them.
    """
    height, width = (latent, latent) if isinstance(latent, int) else latent
    config, device, dtype = unet.config, unet.device, unet.dtype
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    text = config.cross_attention_dim if isinstance(config.cross_attention_dim, int) else config.cross_attention_dim[0]
    inputs: dict[str, Any] = {
        "sample": normal(batch, config.in_channels, height, width),
        "timestep": torch.tensor(TIMESTEP, device=device),
        "encoder_hidden_states": normal(batch, text_length, text),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": normal(batch, pooled), "time_ids": normal(batch, 6)}
    return inputs


def unet_call(unet: UNet2DConditionModel, inputs: Mapping[str, Any]) -> Callable[[], Tensor]:
    """Return one call of the UNet."""
    return lambda: unet(**inputs, return_dict=False)[0]


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
