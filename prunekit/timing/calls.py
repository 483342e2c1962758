"""One call of a UNet as a pipeline makes it: what is timed, and what it is timed on."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

TIMESTEP = 500  # of a single call; which one it is does not change the time


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

    inputs: dict[str, Any] = {
        "sample": normal(batch, config.in_channels, height, width),
        "timestep": torch.tensor(TIMESTEP, device=device),
        "encoder_hidden_states": normal(batch, text_length, text_width(unet)),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": normal(batch, pooled), "time_ids": normal(batch, 6)}
    return inputs


def text_width(unet: UNet2DConditionModel) -> int:
    """Return the width of the text states that a UNet takes; a config may state it level by level."""
    width = unet.config.cross_attention_dim
    return width if isinstance(width, int) else width[0]


def unet_call(unet: UNet2DConditionModel, inputs: Mapping[str, Any]) -> Callable[[], Tensor]:
    """Return one call of the UNet."""
    return lambda: unet(**inputs, return_dict=False)[0]
