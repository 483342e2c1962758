"""Cutting single layers in place: torch-pruning's layer functions, plus the checks that they lack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from .axes import RMS_NORMS, Axis, Layer, Side, weight_of


def units_to_channels(kept: Sequence[int], channels: int) -> list[int]:
    """Return the channel indices of the kept units, each `channels` wide."""
    return [unit * channels + offset for unit in kept for offset in range(channels)]


def keep_channels(module: nn.Module, axes: Sequence[tuple[Axis, Layer, list[int]]], is_input: bool) -> None:
    """Cut a module's weight along one side, in place, to the channels that the axes on that side keep together.

    axes: every axis on that side, with its layer and the layer's kept units. Channels that no axis owns stay. A weight
        that would lose all its channels is left as it is, because its module is replaced.
    is_input: whether that side is the columns of the weight.
    """
    if isinstance(module, nn.GroupNorm):
        ((_, _, kept),) = axes
        keep_groups(module, kept)
        return
    first, layer, kept = axes[0]
    by_side: dict[Side, Callable[[Any, Sequence[int]], None]] = {"out": keep_out, "in": keep_in, "each": keep_each}
    keep = by_side[first.side]
    assert isinstance(module, (nn.Conv2d, nn.Linear, *RMS_NORMS)), f"a {type(module).__name__} cannot be cut"
    total = weight_of(module).shape[int(is_input)]
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


def keep_each(layer: nn.Module, kept: Sequence[int]) -> None:
    """Keep only these channels of a depthwise convolution or an RMS norm, in place."""
    total = len(weight_of(layer))
    if isinstance(layer, nn.Conv2d):
        assert layer.groups == layer.in_channels == layer.out_channels, "each channel is convolved by itself"
        _keep(layer, total, kept, tp.prune_depthwise_conv_out_channels)
        assert layer.groups == layer.in_channels == layer.out_channels == len(kept)
        return
    _keep(layer, total, kept, _prune_rms_norm)
    assert layer.weight.shape == (len(kept),)


def _prune_rms_norm(norm: nn.Module, removed: Sequence[int]) -> None:
    """Remove channels of an RMS norm, which torch-pruning does not support."""
    gone = set(removed)
    kept = [index for index in range(len(weight_of(norm))) if index not in gone]
    for name, parameter in list(norm.named_parameters()):
        index = torch.tensor(kept, device=parameter.device)
        chosen = nn.Parameter(parameter.detach().index_select(0, index))
        if parameter.grad is not None:
            chosen.grad = parameter.grad.index_select(0, index)
        setattr(norm, name, chosen)
    note_width(norm)


def note_width(norm: nn.Module) -> None:
    """Update the width that an RMS norm (torch's or diffusers') stores, after its weight was cut."""
    shape = weight_of(norm).shape
    if isinstance(norm, nn.RMSNorm):
        norm.normalized_shape = tuple(shape)
    else:
        vars(norm)["dim"] = shape


def keep_groups(norm: nn.GroupNorm, kept: Sequence[int]) -> None:
    """Keep only these groups of a GroupNorm, in place."""
    channels = norm.num_channels // norm.num_groups
    _keep(norm, norm.num_channels, units_to_channels(kept, channels), tp.prune_groupnorm_out_channels)
    norm.num_groups = len(kept)  # torch-pruning keeps the old number, which silently regroups the channels
    assert norm.num_channels == len(kept) * channels


def _keep(layer: nn.Module, total: int, kept: Sequence[int], prune: Callable[..., Any]) -> None:
    assert len(kept) > 0, "a layer that loses everything is replaced, not cut"
    assert all(isinstance(index, int) for index in kept) and sorted(set(kept)) == list(kept)
    assert kept[0] >= 0 and kept[-1] < total
    if len(kept) == total:
        return
    requires_grad = {name: parameter.requires_grad for name, parameter in layer.named_parameters()}
    weight = weight_of(layer)
    channels_last = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    channels_last = channels_last and not weight.is_contiguous()
    remaining = set(kept)
    prune(layer, [index for index in range(total) if index not in remaining])
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(requires_grad[name])
        if channels_last and parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
