"""Inputs for comparing a denoiser with its export: random, and the same in every process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from prunekit.core.call import Call, normal
from prunekit.core.registry import denoiser_of
from prunekit.export.fresh import first_output, gathered
from prunekit.runtime.randomness import generator

MOST_TOKENS = 77


@dataclass(frozen=True)
class Inputs:
    """A call, split into parts that can be passed to a graph or to another process.

    tensors: tensors by name; a tensor inside a nested argument has its own name.
    nested: name of the nested argument that holds a tensor, by the tensor's name.
    plain: arguments without tensors, as JSON values. shared: names of tensors that have no row for each sample.
    """

    tensors: dict[str, Tensor]
    nested: dict[str, str]
    plain: dict[str, Any]
    shared: frozenset[str]

    @classmethod
    def of(cls, call: Call) -> Inputs:
        """Split a call into its parts."""
        tensors: dict[str, Tensor] = {}
        nested: dict[str, str] = {}
        plain: dict[str, Any] = {}
        for name, value in call.items():
            if isinstance(value, Mapping):
                tensors |= {key: part.contiguous() for key, part in value.items()}
                nested.update(dict.fromkeys(value, name))
            elif isinstance(value, Tensor):
                tensors[name] = value.contiguous()  # files hold no views
            else:
                plain[name] = value
        return cls(tensors, nested, plain, call.shared)


class Called(nn.Module):
    """A denoiser that takes named tensors and returns one tensor, for graphs.

    inputs: an example call, which names the tensors and the nested arguments that hold them.
    """

    def __init__(self, model: ModelMixin, inputs: Inputs):
        super().__init__()
        self.model, self.nested, self.plain = model, inputs.nested, inputs.plain
        named = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in inputs.tensors]

        def forward(**tensors: Tensor) -> Tensor:
            return self._called(tensors)

        vars(forward)["__signature__"] = Signature(named)  # the names of a graph's inputs come from the signature
        self.forward = forward

    def _called(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return first_output(self.model, gathered(tensors, self.nested, self.plain))


def example_inputs(model: ModelMixin, batch: int, size: tuple[int, int], text_length: int, seed: int = 0) -> Inputs:
    """Return the inputs of an example call on the model's device and in its dtype; size is the latent's (h, w)."""
    known = (model.config.get("folding") or {}).get("timesteps")  # a table of modulations has no other timesteps
    timesteps = known or range(501, 131, -37)
    steps = torch.tensor([timesteps[(index * len(timesteps) // 10) % len(timesteps)] for index in range(batch)])
    draw = normal(generator(seed, "export"))

    def fill(name: str, shape: tuple[int, ...]) -> Tensor:
        return 16 + draw(name, shape).abs() if name == "sizes" else draw(name, shape)

    return Inputs.of(denoiser_of(model).example(model, batch, size, text_length, fill, steps).to(model))


def relative_error(a: Tensor, b: Tensor) -> float:
    """Return the L2 error of `a` relative to `b`; infinite where shapes differ or a value is not finite."""
    if a.shape != b.shape or not bool(a.isfinite().all()):
        return float("inf")
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
