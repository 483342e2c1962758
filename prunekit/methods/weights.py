"""Which weights a unit owns: what weight-based scores (magnitude, Taylor) sum over.

A width unit owns the rows that make its channels and the columns that read them. These are the convolution and
linear weights that slicing removes with it; biases and norms are not counted, as in torch-pruning's importances.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from prunekit.units import UnitGroup


@dataclass(frozen=True)
class OwnedWeight:
    """A layer of which a group's units own parts: output channels or input channels, or both halves of the outputs."""

    layer: nn.Conv2d | nn.Linear
    is_input: bool = False
    is_halved: bool = False  # the outputs are two halves, and a channel owns one row of each (GEGLU, scale and shift)


def owned_weights(unet: UNet2DConditionModel, group: UnitGroup) -> list[OwnedWeight]:
    """The weights that the units of a width group own."""
    module = unet.get_submodule(group.path)
    if group.kind == "resnet":
        return [
            OwnedWeight(module.conv1),
            OwnedWeight(module.time_emb_proj, is_halved=module.time_embedding_norm == "scale_shift"),
            OwnedWeight(module.conv2, is_input=True),
        ]
    if group.kind == "attention":
        rows = [OwnedWeight(layer) for layer in (module.to_q, module.to_k, module.to_v)]
        return [*rows, OwnedWeight(module.to_out[0], is_input=True)]
    assert group.kind == "feedforward", f"{group.name} is not a width group"
    return [OwnedWeight(module.net[0].proj, is_halved=True), OwnedWeight(module.net[2], is_input=True)]


def sum_per_channel(owned: OwnedWeight, values: Tensor) -> Tensor:
    """Sum of `values`, of the layer's weight's shape, over what each channel owns: (C,), or (2C,) where halved."""
    return (values.transpose(0, 1) if owned.is_input else values).flatten(1).sum(1)


def sum_per_unit(
    unet: UNet2DConditionModel,
    group: UnitGroup,
    value: Callable[[nn.Parameter], Tensor],
    of_sum: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Tensor:
    """Sum of `value(weight)`, a tensor of the weight's shape, over what each unit of a width group owns: (size,).

    of_sum: applied to the sum over each layer's channel, before those of a unit are added.
    """
    total = torch.zeros(group.size, dtype=torch.float64)
    for owned in owned_weights(unet, group):
        per_channel = of_sum(sum_per_channel(owned, value(owned.layer.weight)))
        if owned.is_halved:
            per_channel = per_channel.view(2, -1).sum(0)
        total += per_channel.double().cpu().view(group.size, group.channels).sum(1)
    return total
