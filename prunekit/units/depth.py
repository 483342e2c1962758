"""Whole layers, inner transformer blocks and stages: what bypasses them once they are gone, and how gates mix."""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from .counting import ConvLinear, LayerCost
from .space import UnitGroup


class BypassedResnet(nn.Module):
    """In place of a removed ResBlock: the hidden state that entered, without the skip joined to it in up blocks."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        """(B, channels + skip, h, w) -> (B, channels, h, w)."""
        return input_tensor[:, : self.channels]


class BypassedTransformer(nn.Module):
    """In place of a removed Transformer layer."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor]:
        """(B, C, h, w) -> ((B, C, h, w),), as a Transformer layer called with return_dict=False."""
        return (hidden_states,)


class BypassedModule(nn.Module):
    """In place of a removed transformer block, downsampler or upsampler."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Its first argument."""
        return hidden_states


BYPASSED = (BypassedResnet, BypassedTransformer, BypassedModule)


def mix(entered: torch.Tensor, output: torch.Tensor | tuple, gate: torch.Tensor) -> torch.Tensor | tuple:
    """u·f(x) + (1 - u)·h (APTP, Eq. 23 and 24), exact at u = 0 and 1; a Transformer layer's output is a tuple."""
    if isinstance(output, tuple):
        return (mix(entered, output[0], gate), *output[1:])
    gate = gate.to(output.dtype).view(-1, *[1] * (output.dim() - 1))
    return torch.lerp(entered.to(output.dtype), output, gate)


def transformer_cost(module: Transformer2DModel, counter: ConvLinear, positions: int) -> LayerCost:
    """What a Transformer layer costs without its blocks: the norm and both projections."""
    total = counter.norm(module.norm, positions)
    for projection in (module.proj_in, module.proj_out):
        count = counter.conv if isinstance(projection, nn.Conv2d) else counter.linear
        total += sum(count(projection, positions))
    return LayerCost(always=total)


def cut(unet: nn.Module, unit_group: UnitGroup) -> None:
    """Replace what the unit covers by modules that pass the hidden state on; list indices stay as they are."""
    for cover in unit_group.covers:
        _bypass(unet, cover, unit_group.channels)


def _bypass(unet: nn.Module, path: str, channels: int) -> None:
    parts = path.split(".")
    if parts[-2:-1] == ["resnets"]:
        unet.set_submodule(path, BypassedResnet(channels))
    elif parts[-2:-1] == ["attentions"]:
        unet.set_submodule(path, BypassedTransformer())
    elif parts[-2:-1] in (["transformer_blocks"], ["downsamplers"], ["upsamplers"]):
        unet.set_submodule(path, BypassedModule())
    else:  # a whole down, mid or up block
        block = unet.get_submodule(path)
        for name in ("resnets", "attentions", "downsamplers", "upsamplers"):
            for index in range(len(getattr(block, name, None) or ())):
                _bypass(unet, f"{path}.{name}.{index}", channels)
