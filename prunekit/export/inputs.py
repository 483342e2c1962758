"""What a denoiser is called with where it is compared with its export: random, and the same in every process."""

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
    """A call, taken apart: what a graph, or another process, can be given.

    tensors: by name; those of a nested argument by their own names. nested: the argument that each of these lies in.
    plain: arguments without tensors, as JSON has them. shared: names of tensors that have no row for each sample.
    """

    tensors: dict[str, Tensor]
    nested: dict[str, str]
    plain: dict[str, Any]
    shared: frozenset[str]

    @classmethod
    def of(cls, call: Call) -> Inputs:
        """Take a call apart."""
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
    """A denoiser with named tensors in and one tensor out, for graphs.

    inputs: an example of a call, which names the tensors and says where they go.
    """

    def __init__(self, model: ModelMixin, inputs: Inputs):
        super().__init__()
        self.model, self.nested, self.plain = model, inputs.nested, inputs.plain
        named = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in inputs.tensors]

        def forward(**tensors: Tensor) -> Tensor:
            return self._called(tensors)

        vars(forward)["__signature__"] = Signature(named)  # a graph's inputs are named by it
        self.forward = forward

    def _called(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return first_output(self.model, gathered(tensors, self.nested, self.plain))


def example_inputs(model: ModelMixin, batch: int, size: tuple[int, int], text_length: int, seed: int = 0) -> Inputs:
    """Return the inputs of an example call on the model's device and in its type; size is the latent's (h, w)."""
    known = (model.config.get("folding") or {}).get("timesteps")  # of a table, which knows no others
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
