"""Small transformers of every supported class, with random weights that make tests strict."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    CogView4Transformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from torch import nn

from prunekit.core.call import Call, normal
from prunekit.core.registry import denoiser_of

SD3 = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "caption_projection_dim": 64,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 8,
}
SANA = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "cross_attention_head_dim": 32,
    "num_cross_attention_heads": 2,
    "cross_attention_dim": 64,
    "caption_channels": 32,
}
ROPE = {"attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6)}
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "pixart": (
        PixArtTransformer2DModel,
        {
            "sample_size": 8,
            "num_layers": 3,
            "attention_head_dim": 18,
            "num_attention_heads": 4,
            "cross_attention_dim": 72,
            "caption_channels": 32,
            "use_additional_conditions": True,
        },
    ),
    "sd3": (SD3Transformer2DModel, SD3),
    "sd35": (SD3Transformer2DModel, {**SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}),
    "flux": (
        FluxTransformer2DModel,
        {
            **ROPE,
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "pooled_projection_dim": 24,
            "guidance_embeds": True,
        },
    ),
    "qwen_image": (QwenImageTransformer2DModel, {**ROPE, "in_channels": 16, "out_channels": 4, "num_layers": 3}),
    "flux2": (
        Flux2Transformer2DModel,
        {
            **ROPE,
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "joint_attention_dim": 24,
            "timestep_guidance_channels": 32,
            "axes_dims_rope": (4, 4, 4, 4),
        },
    ),
    "z_image": (
        ZImageTransformer2DModel,
        {
            "in_channels": 4,
            "dim": 48,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 4,
            "n_kv_heads": 4,
            "cap_feat_dim": 32,
            "axes_dims": [4, 4, 4],
            "axes_lens": [1024, 64, 64],
        },
    ),
    "sana": (SanaTransformer2DModel, SANA),
    "sana15": (SanaTransformer2DModel, {**SANA, "qk_norm": "rms_norm_across_heads"}),
    "wan": (
        WanTransformer3DModel,
        {
            "attention_head_dim": 24,
            "num_attention_heads": 4,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 32,
            "freq_dim": 32,
            "ffn_dim": 192,
            "num_layers": 3,
            "rope_max_seq_len": 64,
        },
    ),
    "cogview4": (
        CogView4Transformer2DModel,
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "text_embed_dim": 32,
            "time_embed_dim": 48,
            "condition_dim": 8,
            "rope_axes_dim": (16, 16),
        },
    ),
}
UNITS = {
    "pixart": (120, 3),
    "sd3": (172, 3),
    "sd35": (180, 3),
    "flux": (208, 4),
    "qwen_image": (204, 3),
    "sana": (114, 3),
    "sana15": (114, 3),
    "wan": (120, 3),
    "flux2": (208, 4),
    "z_image": (144, 4),
    "cogview4": (144, 4),
}


def build(name: str, device: str = "cpu", seed: int = 0, **changes: Any) -> Any:
    """Return a small transformer in evaluation mode; on the CPU, all weights and biases are random."""
    kind, config = CONFIGS[name]
    with torch.device(device), torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = kind(**{**config, **changes}).eval()
    return randomize(model, seed) if device == "cpu" else model


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw norm weights and all biases at random, as their initial ones and zeros would hide many faults."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.3 * values + (name.endswith("weight")))
            elif "stream_modulation" in name:  # without a bias, all gates are nearly 0
                parameter.mul_(6)
    return model


def call_of(model: Any, batch: int = 2, latent: tuple[int, int] = (8, 6), text_length: int = 5, seed: int = 1) -> Call:
    """Return a call with random values and a different timestep for each sample, on the model's device."""
    fill = normal(torch.Generator().manual_seed(seed))
    times = torch.tensor([137.0 + 211 * index for index in range(batch)])
    call = denoiser_of(model).example(model, batch, latent, text_length, fill, times)
    return call.to(next(model.parameters()).device)


def double_throughout(monkeypatch: Any) -> None:
    """Keep float64 values in float64 where a model casts to float32, as its rounding would hide small differences."""
    cast, to = torch.Tensor.float, torch.Tensor.to

    def unless_double(self: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        is_downcast = self.dtype == torch.float64 and torch.float32 in (*arguments, *options.values())
        return self if is_downcast else to(self, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "float", lambda self: self if self.dtype == torch.float64 else cast(self))
    monkeypatch.setattr(torch.Tensor, "to", unless_double)
