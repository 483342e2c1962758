"""What a denoiser says of its layers: which rows and columns of which weights a unit owns.

Gates, cuts, exact costs, the weights that a score sums over, LoRA matrices and latency keys are loops over axes, so
each is written once for all models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from diffusers.models.normalization import RMSNorm
from torch import nn

from .space import UnitGroup

Side = Literal["out", "in", "each"]
RMS_NORMS = (nn.RMSNorm, RMSNorm)


@dataclass(frozen=True)
class Axis:
    """A group's channels along one weight: `copies` runs of all the group's channels, one after another, from `start`.

    layer: the path of the module that holds the weight, inside the layer.
    side: "out": rows (and elements of the bias); "in": columns; "each": channels that a norm or a depthwise convolution
        handles one by one. The statistic of an RMS norm runs over all of them: under gates, over those that are kept.
    """

    layer: str
    side: Side
    start: int = 0
    copies: int = 1

    def channels(self, kept: list[int], group: UnitGroup) -> list[int]:
        """The positions along the weight of the kept units' channels, in order."""
        width, channels = group.size * group.channels, group.channels
        positions: list[int] = []
        for copy in range(self.copies):
            start = self.start + copy * width
            for unit in kept:
                positions += range(start + unit * channels, start + (unit + 1) * channels)
        return positions


@dataclass(frozen=True)
class Activation:
    """An elementwise activation on `channels` values at every position of a stream; only some conventions charge it.

    needed: "unit": a share of it belongs to every unit; "any": it runs while any unit is left; "always".
    """

    channels: int
    stream: str
    needed: Literal["unit", "any", "always"] = "always"


@dataclass(frozen=True)
class Layer:
    """A part of a denoiser that costs something, or that contains such parts, in the order of the forward pass.

    kind: such as "attention"; with a group, the group's kind.
    path: of the module; "" for what lies in no other layer (both ends of the model, its embeddings).
    stream: whose positions its modules run on; "" where `streams` must name them all.
    streams: exceptions, by the path inside the layer of a module or of what contains it.
    group: the units that can be removed from it one by one; None if nothing is left to remove.
    axes: what these units own.
    products: attention: the streams of the queries and of the keys; of a linear attention, whose keys are summed up
        in a matrix for each head, a stream of as many positions as the matrix has rows stands for the keys.
    feeds: paths (in the model) of modules, such as norms, that only feed this layer and go with its last unit.
    tables: names of parameters, of modules that hold no others, that shift or scale hidden states: they cost no MACs.
    """

    kind: str
    path: str
    stream: str = ""
    streams: Mapping[str, str] = field(default_factory=dict)
    group: UnitGroup | None = None
    axes: tuple[Axis, ...] = ()
    products: tuple[str, str] | None = None
    feeds: tuple[str, ...] = ()
    activations: tuple[Activation, ...] = ()
    tables: frozenset[str] = frozenset()

    @property
    def units(self) -> UnitGroup:
        """The group of a layer that has one."""
        assert self.group is not None, f"{self.path} has no units"
        return self.group

    def stream_of(self, name: str) -> str:
        """The stream on whose positions a module of the layer runs, by its path inside the layer; "": unknown."""
        while name:
            if name in self.streams:
                return self.streams[name]
            name = name.rpartition(".")[0]
        return self.stream

    def place(self, axis: Axis) -> str:
        """The path, in the model, of the module that holds an axis's weight."""
        return f"{self.path}.{axis.layer}"

    def module(self, model: nn.Module, axis: Axis) -> nn.Module:
        """The module that holds an axis's weight."""
        return model.get_submodule(self.place(axis))


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight of a module that holds one."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor), f"a {type(module).__name__} has no weight"
    return weight


def bias_of(module: nn.Module) -> torch.Tensor | None:
    """The bias of a module that holds a weight; None if it has none."""
    bias = module.bias
    assert bias is None or isinstance(bias, torch.Tensor), f"the bias of a {type(module).__name__} is not a tensor"
    return bias


@dataclass(frozen=True)
class Passage:
    """Where the hidden states enter a whole layer and where its output leaves it.

    enter, leave: module paths; the same one for a single layer.
    inputs: names of the arguments of `enter` that pass on if the layer goes, in the order of the outputs of `leave`.
    channels: how many of the first argument's channels (axis 1) pass on; None: all.
    """

    enter: str
    leave: str
    inputs: tuple[str, ...]
    channels: int | None = None


@dataclass(frozen=True)
class Place:
    """Where a drawing of the model shows a whole layer, in a row of layers that run one after another.

    side: down the "left" side, in the "middle" below, or up the "right" side; models without skips use the left one.
    row: from the top. letter: what kind of layer it is; see `Denoiser.legend`.
    """

    side: Literal["left", "middle", "right"]
    row: int
    letter: str
