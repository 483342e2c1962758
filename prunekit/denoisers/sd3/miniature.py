"""Stable Diffusion 3.5's transformer in miniature: the denoiser of the second embedded model."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from torch import nn


def build(
    sample_size: int,
    channels: int,
    layers: int,
    heads: int,
    head_channels: int,
    text_width: int,
    pooled_width: int,
    dual_layers: tuple[int, ...],
    patch: int = 1,
) -> SD3Transformer2DModel:
    """Build an untrained transformer of SD 3.5 medium's kind: joint attention with normed queries and keys.

    Modulations and the output start at zero, so that every block begins as the identity (DiT, arXiv 2212.09748).

    Args:
        sample_size: side of the latent.
        channels: channels of the latent.
        layers: number of blocks.
        heads: heads of each attention.
        head_channels: channels of each head.
        text_width: width of the text states.
        pooled_width: width of the pooled text embedding.
        dual_layers: indices of the blocks with a second attention of the image alone.
        patch: side of the latent's square that makes a token.

    """
    model = SD3Transformer2DModel(
        sample_size=sample_size,
        patch_size=patch,
        in_channels=channels,
        out_channels=channels,
        num_layers=layers,
        attention_head_dim=head_channels,
        num_attention_heads=heads,
        joint_attention_dim=text_width,
        caption_projection_dim=heads * head_channels,
        pooled_projection_dim=pooled_width,
        pos_embed_max_size=sample_size // patch,
        dual_attention_layers=dual_layers,
        qk_norm="rms_norm",
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (name == "proj_out" or "norm" in name.rpartition(".")[0]):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def read(folder: Path) -> SD3Transformer2DModel:
    """Read a transformer from its folder, in float32."""
    return SD3Transformer2DModel.from_pretrained(folder, dtype=torch.float32)
