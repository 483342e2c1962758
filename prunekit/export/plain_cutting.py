"""Cutting single layers with torch alone, in place of `core.cutting` in the class file, which lacks torch-pruning.

Both modules give the same layers (a test compares them). The class file cuts before it loads the weights, so only
shapes and attributes matter there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from prunekit.core.cutting import note_width


def keep_out(layer: nn.Conv2d | nn.Linear, kept: Sequence[int]) -> None:
    """Keep only these output channels of a layer, in place."""
    _select(layer, "weight", kept, 0)
    _select(layer, "bias", kept, 0)
    setattr(layer, "out_channels" if isinstance(layer, nn.Conv2d) else "out_features", len(kept))


def keep_in(layer: nn.Conv2d | nn.Linear, kept: Sequence[int]) -> None:
    """Keep only these input channels of a layer, in place."""
    _select(layer, "weight", kept, 1)
    setattr(layer, "in_channels" if isinstance(layer, nn.Conv2d) else "in_features", len(kept))


def keep_each(layer: nn.Module, kept: Sequence[int]) -> None:
    """Keep only these channels of a depthwise convolution or an RMS norm, in place."""
    for name, _ in list(layer.named_parameters()):
        _select(layer, name, kept, 0)
    if isinstance(layer, nn.Conv2d):
        layer.in_channels = layer.out_channels = layer.groups = len(kept)
    else:
        note_width(layer)


def keep_groups(norm: nn.GroupNorm, kept: Sequence[int]) -> None:
    """Keep only these groups of a GroupNorm, in place."""
    width = norm.num_channels // norm.num_groups
    channels = [group * width + offset for group in kept for offset in range(width)]
    _select(norm, "weight", channels, 0)
    _select(norm, "bias", channels, 0)
    norm.num_groups, norm.num_channels = len(kept), len(channels)


def _select(layer: nn.Module, name: str, kept: Sequence[int], axis: int) -> None:
    parameter = getattr(layer, name)
    if parameter is not None:
        index = torch.tensor(list(kept), dtype=torch.long, device=parameter.device)
        chosen = parameter.detach().index_select(axis, index)
        setattr(layer, name, nn.Parameter(chosen, requires_grad=parameter.requires_grad))
