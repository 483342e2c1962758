"""Attentions, attn1 (self) and attn2 (cross): the units are the heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from .counting import ConvLinear, LayerCost
from .cutting import keep_in, keep_out, units_to_channels
from .emptied import Emptied, spread
from .space import UnitGroup

NORM_OF = {"attn1": "norm1", "attn2": "norm2"}  # the LayerNorm that only feeds this attention


class EmptiedAttention(Emptied):
    """An attention without a head: the bias of its output projection, and the dropout after it."""

    output = "to_out.0"

    def __init__(self, attention: Attention):
        super().__init__(attention)
        self.dropout = attention.to_out[1]

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """(B, q, C) -> (B, q, C), the bias everywhere; text and masks have nothing left to act on."""
        return self.dropout(spread(self.bias, hidden_states))


def group(path: str, module: nn.Module) -> UnitGroup | None:
    """The attention's width group; None where nothing is left to remove."""
    if isinstance(module, EmptiedAttention):
        return None
    return UnitGroup("attention", path, module.heads, module.inner_dim // module.heads)


def gated_layer(module: Attention) -> nn.Module:
    """The layer whose input carries the gate: the output projection, whose input is the heads side by side."""
    return module.to_out[0]


def cost(module: nn.Module, norm: nn.Module, counter: ConvLinear, positions: int) -> LayerCost:
    """What an attention costs on `positions` image tokens, with the LayerNorm that feeds it."""
    if isinstance(module, EmptiedAttention):
        return LayerCost(always=counter.emptied(module.bias))
    keys = counter.text_length if module.is_cross_attention else positions
    out, out_bias = counter.linear(module.to_out[0], positions)
    through = (
        sum(counter.linear(module.to_q, positions))
        + sum(counter.linear(module.to_k, keys))
        + sum(counter.linear(module.to_v, keys))
        + counter.attention(module.inner_dim, module.heads, positions, keys)
        + out
    )
    per_unit, rest = divmod(through, module.heads)
    assert rest == 0
    if_any = counter.norm(norm, positions)
    if counter.output_bias_stays:
        return LayerCost(per_unit, if_any, out_bias)
    return LayerCost(per_unit, if_any + out_bias)


def cut(unet: nn.Module, unit_group: UnitGroup, kept: Sequence[int]) -> None:
    """Keep only these heads, in place; replace the attention where none is kept."""
    module = unet.get_submodule(unit_group.path)
    if len(kept) == 0:
        block, _, name = unit_group.path.rpartition(".")
        unet.set_submodule(unit_group.path, EmptiedAttention(module))
        unet.set_submodule(f"{block}.{NORM_OF[name]}", nn.Identity())
        return
    channels = units_to_channels(kept, unit_group.channels)
    for projection in (module.to_q, module.to_k, module.to_v):
        keep_out(projection, channels)
    keep_in(module.to_out[0], channels)
    module.heads = module.sliceable_head_dim = len(kept)
    module.inner_dim = module.inner_kv_dim = len(channels)
