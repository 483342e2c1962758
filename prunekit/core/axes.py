"""The description of a denoiser's layers: which rows and columns of which weights each unit owns.

Gates, cuts, exact costs, importance scores, LoRA matrices and latency keys are all loops over axes, so each of them is
written once for all models.
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
    """A unit group's channels along one side of a weight: `copies` consecutive runs of all its channels, from `start`.

    layer: path, inside the layer, of the module that holds the weight.
    side: "out": rows (and elements of the bias); "in": columns; "each": channels that a norm or a depthwise convolution
        handles one by one. An RMS norm computes its statistic over all these channels; under gates, over the kept ones.
    """

    layer: str
    side: Side
    start: int = 0
    copies: int = 1

    def channels(self, kept: list[int], group: UnitGroup) -> list[int]:
        """Return the positions, along the weight, of the kept units' channels, in order."""
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

    needed: when it costs. "unit": each kept unit of the layer adds an equal share; "any": while any unit is left;
        "always".
    """

    channels: int
    stream: str
    needed: Literal["unit", "any", "always"] = "always"


@dataclass(frozen=True)
class Layer:
    """A part of a denoiser that has a cost, or that contains such parts.

    kind: such as "attention"; with a group, the group's kind.
    path: path of the module; "" for everything that lies in no other layer (both ends of the model, its embeddings).
    stream: stream on whose positions the layer's modules run; "" if `streams` must name the stream of every module.
    streams: exceptions to `stream`, by the path, inside the layer, of a module or of a module that contains it.
    group: the units that can be removed from the layer one by one; None if nothing is left to remove.
    axes: the axes that these units own.
    products: for attention: the streams of the queries and of the keys. A linear attention sums its keys up in one
        matrix per head; a stream with as many positions as this matrix has rows then stands for the keys.
    feeds: paths (in the model) of modules, such as norms, that only feed this layer and are removed with its last unit.
    activations: the layer's elementwise activations.
    tables: names of parameters that shift or scale hidden states and cost no MACs; their modules hold no other
        parameters.
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
        """Return the stream on whose positions the module at path `name` inside the layer runs; "" if it is unknown."""
        while name:
            if name in self.streams:
                return self.streams[name]
            name = name.rpartition(".")[0]
        return self.stream

    def place(self, axis: Axis) -> str:
        """Return the path, in the model, of the module that holds an axis's weight."""
        return f"{self.path}.{axis.layer}"

    def module(self, model: nn.Module, axis: Axis) -> nn.Module:
        """Return the module that holds an axis's weight."""
        return model.get_submodule(self.place(axis))


def weight_of(module: nn.Module) -> torch.Tensor:
    """Return the weight of a module that has one."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor), f"a {type(module).__name__} has no weight"
    return weight


def bias_of(module: nn.Module) -> torch.Tensor | None:
    """Return the bias of a module with a weight; None if it has no bias."""
    bias = module.bias
    assert bias is None or isinstance(bias, torch.Tensor), f"the bias of a {type(module).__name__} is not a tensor"
    return bias


@dataclass(frozen=True)
class Passage:
    """Where the hidden states enter a whole layer and where its output leaves it.

    enter, leave: module paths; the same one for a single layer.
    inputs: names of the arguments of `enter` that are passed on if the layer is removed, in the order of `leave`'s
        outputs.
    channels: number of leading channels (axis 1) that are passed on; None: all.
    """

    enter: str
    leave: str
    inputs: tuple[str, ...]
    channels: int | None = None


@dataclass(frozen=True)
class Place:
    """Where a diagram of the model shows a whole layer; the layers of one row run one after another.

    side: "left" on the way down, "middle" at the bottom, "right" on the way up; models without skips use "left".
    row: row number, from the top.
    letter: letter for the kind of layer; see `Denoiser.legend`.
    """

    side: Literal["left", "middle", "right"]
    row: int
    letter: str
