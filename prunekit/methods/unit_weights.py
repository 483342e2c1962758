"""The weights that a unit owns, over which weight-based scores (magnitude, Taylor) are summed.

A width unit owns the rows that produce its channels and the columns that read them. These are the convolution and
linear weights that slicing removes with the unit. Biases and norms are not counted, as in torch-pruning's importances.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit.core.axes import Axis, weight_of
from prunekit.core.discovery import width_layers
from prunekit.core.space import UnitGroup


@dataclass(frozen=True)
class OwnedWeight:
    """A convolution or linear layer, and the axis along which a group's units own parts of its weight."""

    layer: nn.Module
    axis: Axis

    @property
    def weight(self) -> nn.Parameter:
        """The layer's weight."""
        weight = weight_of(self.layer)
        assert isinstance(weight, nn.Parameter), "what is scored can be trained"
        return weight


def owned_weights(model: nn.Module, group: UnitGroup) -> list[OwnedWeight]:
    """Return the layers and axes of the weights that the units of a width group own."""
    layer = width_layers(model)[group.name]
    owned = [OwnedWeight(layer.module(model, axis), axis) for axis in layer.axes]
    return [weight for weight in owned if isinstance(weight.layer, nn.Conv2d | nn.Linear)]


def sum_per_channel(owned: OwnedWeight, values: Tensor) -> Tensor:
    """Return the sum of `values`, of the weight's shape, over each channel on the axis's side, (C,)."""
    return (values.transpose(0, 1) if owned.axis.side == "in" else values).flatten(1).sum(1)


def sum_per_unit(
    model: nn.Module,
    group: UnitGroup,
    value: Callable[[nn.Parameter], Tensor],
    of_sum: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Tensor:
    """Return the sum of `value(weight)` over the weights that each unit of a width group owns, (size,).

    value: returns a tensor of the weight's shape. of_sum: is applied to the sum over each channel of a layer, before
    the channels of a unit are added.
    """
    total = torch.zeros(group.size, dtype=torch.float64)
    width = group.size * group.channels
    for owned in owned_weights(model, group):
        axis, per_channel = owned.axis, of_sum(sum_per_channel(owned, value(owned.weight)))
        copies = per_channel[axis.start : axis.start + axis.copies * width].view(axis.copies, width).sum(0)
        total += copies.double().cpu().view(group.size, group.channels).sum(1)
    return total
