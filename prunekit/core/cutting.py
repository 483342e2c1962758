"""Cutting single layers: torch-pruning's layer functions, which cut in place and check nothing, made checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from .axes import Axis, Layer


def units_to_channels(kept: Sequence[int], channels: int) -> list[int]:
    """The channel indices of the kept units, each `channels` wide."""
    return [unit * channels + offset for unit in kept for offset in range(channels)]


def keep_channels(module: nn.Module, axes: Sequence[tuple[Axis, Layer, list[int]]], is_input: bool) -> None:
    """Cut a module's weight along one side, in place, to what all the axes on that side keep together.

    axes: with the layer that each belongs to and its kept units; channels that no axis owns stay. A weight of which
        nothing would stay is left, since what holds it is replaced.
    """
    if isinstance(module, nn.GroupNorm):
        ((_, _, kept),) = axes
        keep_groups(module, kept)
        return
    assert isinstance(module, nn.Conv2d | nn.Linear), f"a {type(module).__name__} cannot be cut"
    total, keep = module.weight.shape[int(is_input)], keep_in if is_input else keep_out
    first, layer, kept = axes[0]
    owns_all = len(axes) == 1 and first.copies * layer.units.size * layer.units.channels == total
    if owns_all and kept:
        keep(module, first.channels(kept, layer.units))
        return
    staying = set(range(total))
    for axis, layer, kept in axes:
        staying -= set(axis.channels(list(range(layer.units.size)), layer.units))
        staying |= set(axis.channels(kept, layer.units))
    if staying:
        keep(module, sorted(staying))


def keep_out(layer: nn.Conv2d | nn.Linear, kept: Sequence[int]) -> None:
    """Keep only these output channels of a layer, in place."""
    prune = tp.prune_conv_out_channels if isinstance(layer, nn.Conv2d) else tp.prune_linear_out_channels
    _keep(layer, layer.weight.shape[0], kept, prune)
    assert layer.weight.shape[0] == len(kept)


def keep_in(layer: nn.Conv2d | nn.Linear, kept: Sequence[int]) -> None:
    """Keep only these input channels of a layer, in place."""
    prune = tp.prune_conv_in_channels if isinstance(layer, nn.Conv2d) else tp.prune_linear_in_channels
    _keep(layer, layer.weight.shape[1], kept, prune)
    assert layer.weight.shape[1] == len(kept)


def keep_groups(norm: nn.GroupNorm, kept: Sequence[int]) -> None:
    """Keep only these groups of a GroupNorm, in place."""
    channels = norm.num_channels // norm.num_groups
    _keep(norm, norm.num_channels, units_to_channels(kept, channels), tp.prune_groupnorm_out_channels)
    norm.num_groups = len(kept)  # torch-pruning leaves it, which silently regroups the channels
    assert norm.num_channels == len(kept) * channels


def _keep(
    layer: nn.Conv2d | nn.Linear | nn.GroupNorm, total: int, kept: Sequence[int], prune: Callable[..., Any]
) -> None:
    assert len(kept) > 0, "a layer that loses everything is replaced, not cut"
    assert all(isinstance(index, int) for index in kept) and sorted(set(kept)) == list(kept)
    assert kept[0] >= 0 and kept[-1] < total
    if len(kept) == total:
        return
    requires_grad = {name: parameter.requires_grad for name, parameter in layer.named_parameters()}
    weight = layer.weight
    channels_last = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    channels_last = channels_last and not weight.is_contiguous()
    remaining = set(kept)
    prune(layer, [index for index in range(total) if index not in remaining])
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(requires_grad[name])
        if channels_last and parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
