"""ResBlocks: the units are the GroupNorm groups of `norm2`, that is channels between `conv1` and `conv2`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from .counting import ConvLinear, LayerCost
from .cutting import keep_groups, keep_in, keep_out, units_to_channels
from .emptied import Emptied
from .space import UnitGroup


class EmptiedResnet(Emptied):
    """A ResBlock without a hidden channel: the shortcut plus `conv2`'s bias."""

    output = "conv2"

    def __init__(self, resnet: ResnetBlock2D):
        super().__init__(resnet)
        self.in_channels = resnet.in_channels
        self.out_channels = resnet.out_channels
        self.output_scale_factor = resnet.output_scale_factor
        self.conv_shortcut = resnet.conv_shortcut

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h, w); the time embedding has nothing left to act on."""
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        return (input_tensor + self.bias[:, None, None]) / self.output_scale_factor


def group(path: str, module: nn.Module) -> UnitGroup | None:
    """The ResBlock's width group; None where nothing is left to remove."""
    if isinstance(module, EmptiedResnet):
        return None
    groups = module.norm2.num_groups
    return UnitGroup("resnet", path, groups, module.norm2.num_channels // groups)


def gated_layer(module: ResnetBlock2D) -> nn.Module:
    """The layer whose input carries the gate: `conv2`, after norm, SiLU and dropout, where zero is removal."""
    return module.conv2


def cost(module: nn.Module, counter: ConvLinear, positions: int) -> LayerCost:
    """What a ResBlock costs at `positions` = h·w."""
    shortcut = 0 if module.conv_shortcut is None else sum(counter.conv(module.conv_shortcut, positions))
    if isinstance(module, EmptiedResnet):
        return LayerCost(always=shortcut + counter.emptied(module.bias))
    conv2, conv2_bias = counter.conv(module.conv2, positions)
    kept_channels = module.norm2.num_channels
    through = (
        sum(counter.conv(module.conv1, positions))
        + sum(counter.linear(module.time_emb_proj, 1))
        + counter.norm(module.norm2, positions)
        + counter.silu(kept_channels, positions)
        + conv2
    )
    if_any = (
        counter.norm(module.norm1, positions)
        + counter.silu(module.in_channels, positions)
        + (0 if module.skip_time_act else counter.silu(module.time_emb_proj.in_features, 1))
    )
    per_unit, rest = divmod(through, module.norm2.num_groups)
    assert rest == 0
    if counter.output_bias_stays:
        return LayerCost(per_unit, if_any, shortcut + conv2_bias)
    return LayerCost(per_unit, if_any + conv2_bias, shortcut)


def cut(unet: nn.Module, unit_group: UnitGroup, kept: Sequence[int]) -> None:
    """Keep only these channel groups, in place; replace the ResBlock where none is kept."""
    module = unet.get_submodule(unit_group.path)
    if len(kept) == 0:
        unet.set_submodule(unit_group.path, EmptiedResnet(module))
        return
    channels = units_to_channels(kept, unit_group.channels)
    width = module.norm2.num_channels
    keep_out(module.conv1, channels)
    if module.time_embedding_norm == "scale_shift":  # scale and shift, one after the other
        keep_out(module.time_emb_proj, channels + [width + channel for channel in channels])
    else:
        keep_out(module.time_emb_proj, channels)
    keep_groups(module.norm2, kept)
    keep_in(module.conv2, channels)
