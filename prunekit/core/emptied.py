"""Layers that lost all their units: each still adds the bias of its output layer.

An emptied layer holds the bias itself. It has no module where the dense layer has its output layer, because PEFT and
attention processors would take such a module for a linear or convolution layer. In files the bias keeps the dense
model's name: `LAYER.bias` in memory is `LAYER.conv2.bias` in a file, where `conv2` is the output layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

NO_OUTPUTS: Mapping[str, str] = MappingProxyType({})


class Emptied(nn.Module):
    """A layer without units; a subclass for each kind names the dense layer's output layers and defines `forward`.

    outputs: by the name of a bias in this module, the path, inside the dense layer, of the output layer that it comes
        from.
    """

    outputs: Mapping[str, str] = NO_OUTPUTS
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Module):
        super().__init__()
        for name, path in self.outputs.items():
            bias = layer.get_submodule(path).bias
            assert bias is None or isinstance(bias, nn.Parameter)
            self.register_parameter(name, bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Load like the stock method, but also accept a bias under its name in files."""
        for name, path in self.outputs.items():
            in_file = f"{prefix}{_bias(path)}"
            if in_file in state_dict:
                state_dict[f"{prefix}{name}"] = state_dict.pop(in_file)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class EmptiedLayer(Emptied):
    """An emptied layer whose output has the shape of its first argument, such as a feed-forward."""

    def __init__(self, layer: nn.Module, output: str):
        self.outputs = {"bias": output}
        super().__init__(layer)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the bias at every position: (B, q, C) -> (B, q, C)."""
        return spread(self.bias, hidden_states)


class EmptiedOutput(Emptied):
    """The bias of an output layer that several branches share, after all of them lost their units."""

    def __init__(self, layer: nn.Linear):
        self.outputs = {"bias": ""}
        super().__init__(layer)
        self.out_features = layer.out_features

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the bias at every position: (B, q, 0) -> (B, q, C)."""
        return spread(self.bias, hidden_states.new_zeros(*hidden_states.shape[:-1], self.out_features))


def spread(bias: torch.Tensor | None, hidden_states: torch.Tensor) -> torch.Tensor:
    """Return the bias (C,), or zeros if there is none, at every position of (B, q, C).

    The result is a sum, because module trackers cannot handle a bare view of a leaf tensor.
    """
    zero = hidden_states.new_zeros(1)
    return (zero if bias is None else zero + bias).expand(hidden_states.shape)


def names_in_files(model: nn.Module) -> dict[str, str]:
    """Return {name in memory: name in files} for the parameters whose two names differ."""
    return {
        f"{path}.{name}": f"{path}.{_bias(output)}"
        for path, module in model.named_modules()
        if isinstance(module, Emptied)
        for name, output in module.outputs.items()
        if getattr(module, name) is not None
    }


def _bias(path: str) -> str:
    """Return the name of the bias of the layer at a path, "" for the layer itself."""
    return f"{path}.bias" if path else "bias"


def renamed(state: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Return tensors under the names that `names` gives them, in the same order."""
    return {names.get(name, name): value for name, value in state.items()}


def state_in_files(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's state dict under the names in files."""
    return renamed(model.state_dict(), names_in_files(model))
