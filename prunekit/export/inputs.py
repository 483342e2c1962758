"""What a UNet is called with where it is compared with its export: random, and the same in every process."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from prunekit.core.call import normal
from prunekit.core.registry import denoiser_of
from prunekit.runtime.randomness import generator

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
    steps = torch.tensor([501 - 37 * (index % 10) for index in range(batch)])
    draw = normal(generator(seed, "export"))

    def fill(name: str, shape: tuple[int, ...]) -> Tensor:
        return 16 + draw(name, shape).abs() if name == "sizes" else draw(name, shape)

    arguments = dict(denoiser_of(unet).example(unet, batch, size, text_length, fill, steps).to(unet))
    added = arguments.pop("added_cond_kwargs", {})
    return {**arguments, **added}


def relative_error(a: Tensor, b: Tensor) -> float:
    """Return the L2 error of `a` relative to `b`; infinite where shapes differ or a value is not finite."""
    if a.shape != b.shape or not bool(a.isfinite().all()):
        return float("inf")
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
