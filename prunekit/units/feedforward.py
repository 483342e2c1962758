"""Feed-forwards: the units are groups of their inner channels, 32 or the largest divisor of the width below that."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.models.attention import FeedForward
from torch import nn

from .counting import ConvLinear, LayerCost
from .cutting import keep_in, keep_out, units_to_channels
from .emptied import Emptied, spread
from .space import UnitGroup

MOST_GROUPS = 32


class EmptiedFeedForward(Emptied):
    """A feed-forward without an inner channel: the bias of its last linear layer."""

    output = "net.2"

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """(B, q, C) -> (B, q, C), the bias everywhere."""
        return spread(self.bias, hidden_states)


def group(path: str, module: nn.Module, num_groups: int | None = None) -> UnitGroup | None:
    """The feed-forward's width group; None where nothing is left to remove.

    num_groups: of a feed-forward that was cut before: how many of its groups are left.
    """
    if isinstance(module, EmptiedFeedForward):
        return None
    inner = module.net[2].in_features
    if num_groups is None:
        num_groups = next(count for count in range(min(MOST_GROUPS, inner), 0, -1) if inner % count == 0)
    assert inner % num_groups == 0
    return UnitGroup("feedforward", path, num_groups, inner // num_groups)


def gated_layer(module: FeedForward) -> nn.Module:
    """The layer whose input carries the gate: the last linear layer."""
    return module.net[2]


def cost(module: nn.Module, norm: nn.Module, counter: ConvLinear, positions: int, num_groups: int | None) -> LayerCost:
    """What a feed-forward costs on `positions` image tokens, with the LayerNorm that feeds it."""
    if isinstance(module, EmptiedFeedForward):
        return LayerCost(always=counter.emptied(module.bias))
    out, out_bias = counter.linear(module.net[2], positions)
    through = sum(counter.linear(module.net[0].proj, positions)) + out
    units = group("", module, num_groups).size
    per_unit, rest = divmod(through, units)
    assert rest == 0
    if_any = counter.norm(norm, positions)
    if counter.output_bias_stays:
        return LayerCost(per_unit, if_any, out_bias)
    return LayerCost(per_unit, if_any + out_bias)


def cut(unet: nn.Module, unit_group: UnitGroup, kept: Sequence[int]) -> None:
    """Keep only these channel groups, in place; replace the feed-forward where none is kept."""
    module = unet.get_submodule(unit_group.path)
    if len(kept) == 0:
        block = unit_group.path.rpartition(".")[0]
        unet.set_submodule(unit_group.path, EmptiedFeedForward(module))
        unet.set_submodule(f"{block}.norm3", nn.Identity())
        return
    channels = units_to_channels(kept, unit_group.channels)
    inner = module.net[2].in_features
    keep_out(module.net[0].proj, channels + [inner + channel for channel in channels])  # GEGLU: values, gates
    keep_in(module.net[2], channels)
