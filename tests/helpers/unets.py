"""Small UNets with the topology of SD 1.x, SD 2.x and SDXL, with random weights that make tests strict."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from prunekit.core.space import Architecture

CONFIGS = {
    "sd1": {
        "block_out_channels": [32, 64, 64, 64],
        "layers_per_block": 2,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    },
    "sd2": {
        "block_out_channels": [32, 64, 96, 96],
        "layers_per_block": 2,
        "cross_attention_dim": 32,
        "attention_head_dim": [2, 4, 6, 6],
        "norm_num_groups": 8,
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": [32, 64, 96],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2, 2],
        "cross_attention_dim": 32,
        "attention_head_dim": [2, 4, 6],
        "norm_num_groups": 8,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    },
}
SHAPES = tuple(CONFIGS)
MORE_SHAPES = ("sd2", *(pytest.param(shape, marks=pytest.mark.long) for shape in SHAPES if shape != "sd2"))


def build(shape: str, device: str = "cpu", seed: int = 0, **overrides) -> UNet2DConditionModel:
    """Return a small UNet in evaluation mode; on the CPU, with random weights, including the norms'."""
    with torch.device(device), torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(sample_size=16, **{**CONFIGS[shape], **overrides}).eval()
        return randomize_norms(unet, seed) if device == "cpu" else unet


def randomize_norms(unet: UNet2DConditionModel, seed: int = 0) -> UNet2DConditionModel:
    """Draw norm weights and all biases at random, as their initial ones and zeros would hide many faults."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in unet.modules():
            if isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm):
                module.weight.copy_(1 + 0.5 * torch.randn(module.weight.shape, generator=generator))
        for name, parameter in unet.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return unet


def inputs(
    unet: UNet2DConditionModel,
    batch: int = 1,
    size: int | tuple[int, int] = 16,
    text_length: int = 7,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict:
    """Return keyword arguments of a forward pass, on the UNet's device."""
    height, width = (size, size) if isinstance(size, int) else size
    device = unet.conv_in.weight.device
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype).to(device)

    arguments = {
        "sample": normal(batch, unet.config.in_channels, height, width),
        "timestep": torch.tensor([37 + 11 * b for b in range(batch)], device=device),
        "encoder_hidden_states": normal(batch, text_length, unet.config.cross_attention_dim),
    }
    if unet.config.addition_embed_type == "text_time":
        time_ids = 6 * unet.config.addition_time_embed_dim
        pooled = unet.config.projection_class_embeddings_input_dim - time_ids
        conditions = {"text_embeds": normal(batch, pooled), "time_ids": 16 + normal(batch, 6).abs()}
        arguments["added_cond_kwargs"] = conditions
    return arguments


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the L2 error of `a`, relative to `b`."""
    return ((a - b).norm() / b.norm()).item()


def with_empty_groups(architecture: Architecture, seed: int) -> Architecture:
    """Return the architecture with about a tenth of its width groups emptied."""
    space, values = architecture.space, architecture.values.clone()
    draws = torch.rand(len(space.width_groups), generator=torch.Generator().manual_seed(seed))
    for group, draw in zip(space.width_groups, draws, strict=True):
        if draw < 0.1:
            values[space.slice(group)] = False
    return Architecture(space, values)
