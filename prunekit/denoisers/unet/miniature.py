"""Stable Diffusion 2's UNet in miniature: the denoiser of the embedded model."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel


def build(
    sample_size: int,
    channels: int,
    widths: tuple[int, ...],
    heads: tuple[int, ...],
    text_width: int,
    norm_groups: int,
) -> UNet2DConditionModel:
    """Build an untrained UNet of Stable Diffusion 2's topology: levels with cross-attention, and one without.

    Args:
        sample_size: side of the latent.
        channels: channels of the latent.
        widths: channels of each level, outermost first; the innermost level has no attention.
        heads: attention heads of each level.
        text_width: width of the text states.
        norm_groups: number of groups of a GroupNorm.

    """
    levels = len(widths) - 1
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=channels,
        out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * levels + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * levels,
        block_out_channels=widths,
        layers_per_block=2,
        attention_head_dim=heads,
        cross_attention_dim=text_width,
        norm_num_groups=norm_groups,
        use_linear_projection=True,
    )


def read(folder: Path) -> UNet2DConditionModel:
    """Read a UNet from its folder, in float32."""
    return UNet2DConditionModel.from_pretrained(folder, dtype=torch.float32)
