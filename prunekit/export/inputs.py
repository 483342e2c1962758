"""What a UNet is called with where it is compared with its export: random, and the same in every process."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from prunekit.randomness import generator

ADDED = ("text_embeds", "time_ids")  # XL's added conditions
MOST_TOKENS = 77


class Called(nn.Module):
    """A UNet with tensors in and one tensor out, for graphs: XL's added conditions are arguments of their own."""

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        """(B, 4, h, w), (B,), (B, tokens, C) and XL's (B, P), (B, 6) -> (B, 4, h, w)."""
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.unet(sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False)[0]


def example_inputs(
    unet: UNet2DConditionModel, batch: int, size: tuple[int, int], text_length: int, seed: int = 0
) -> dict[str, Tensor]:
    """Return the arguments of `Called`, by name, on the UNet's device and in its type; size is the latent's (h, w)."""
    draw, config = generator(seed, "export"), unet.config
    width = config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    arguments = {
        "sample": normal(batch, config.in_channels, *size),
        "encoder_hidden_states": normal(batch, text_length, width),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        arguments |= {"text_embeds": normal(batch, pooled), "time_ids": 16 + normal(batch, 6).abs()}
    arguments = {name: value.to(unet.device, unet.dtype) for name, value in arguments.items()}
    steps = torch.tensor([501 - 37 * (index % 10) for index in range(batch)], device=unet.device)
    order = ("sample", "timestep", "encoder_hidden_states", *ADDED)
    arguments["timestep"] = steps
    return {name: arguments[name] for name in order if name in arguments}


def latent_size(unet: UNet2DConditionModel) -> tuple[int, int]:
    """Return the latent's (h, w) that a UNet was made for."""
    size = unet.config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


def relative_error(a: Tensor, b: Tensor) -> float:
    """Return the L2 error of `a` relative to `b`; infinite where shapes differ or a value is not finite."""
    if a.shape != b.shape or not bool(a.isfinite().all()):
        return float("inf")
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
