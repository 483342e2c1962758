"""Call: the arguments of one denoiser call. The library calls a denoiser in no other way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Fill = Callable[
    [str, tuple[int, ...]], Tensor
]  # from what an argument is, such as "text", and its shape, to its values


class Call(Mapping[str, Any]):
    """The keyword arguments of one denoiser call, by name: tensors, or mappings of tensors. It is never changed.

    A tensor has a row for each sample along its first axis, except one without axes, which all samples share, as a
    timestep may be. A `Denoiser` makes it (`call`, `example`), since the names are the model's. Use: `predict(model,
    call)`, or `model(**call)`.
    """

    __slots__ = ("_arguments",)

    def __init__(self, arguments: Mapping[str, Any]):
        """Take the arguments; the tensors are shared, not copied.

        Raises:
            ValueError: tensors that disagree on the number of samples.

        """
        self._arguments = {name: _mapped(value, lambda tensor: tensor) for name, value in arguments.items()}
        counts = sorted({len(tensor) for tensor in self.tensors() if tensor.dim()})
        if len(counts) > 1:
            raise ValueError(f"a call's tensors have {' and '.join(map(str, counts))} rows; all need one a sample")

    def __getitem__(self, name: str) -> Any:
        return self._arguments[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arguments)

    def __len__(self) -> int:
        return len(self._arguments)

    def __repr__(self) -> str:
        shapes = _mapped(self._arguments, lambda tensor: f"{tuple(tensor.shape)} {tensor.dtype}")
        return f"Call({shapes})"

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors, nested ones in their place."""
        yield from _leaves(self._arguments)

    @property
    def batch(self) -> int:
        """The number of samples; 1 where no tensor has an axis."""
        return next((len(tensor) for tensor in self.tensors() if tensor.dim()), 1)

    @property
    def device(self) -> torch.device:
        """Where the tensors are, by the first of them."""
        return next(self.tensors()).device

    def map(self, function: Callable[[Tensor], Tensor]) -> Call:
        """Return the call whose tensors are `function` of these."""
        return Call(_mapped(self._arguments, function))

    def take(self, rows: Tensor | slice) -> Call:
        """Return the call of some samples: `rows` (n,) are indices, which may repeat, or a boolean mask; or a slice."""
        return self.map(lambda tensor: tensor[rows] if tensor.dim() else tensor)

    def to(self, device: torch.device | str | Tensor | nn.Module, dtype: torch.dtype | None = None) -> Call:
        """Return the call on a device; floating-point tensors in a dtype, all others in the dtype that they have.

        device: or a tensor or a model, whose device and dtype are taken. dtype: None leaves it as it is.
        """
        like = next(device.parameters()) if isinstance(device, nn.Module) else device
        place = like.device if isinstance(like, Tensor) else torch.device(like)
        kind = like.dtype if isinstance(like, Tensor) and dtype is None else dtype
        return self.map(lambda tensor: tensor.to(place, kind if tensor.is_floating_point() else None))

    def repeat(self, times: int) -> Call:
        """Return the call of all samples `times` times over: 0, 1, …, B - 1, 0, 1, …"""
        return self.map(lambda tensor: tensor.repeat(times, *[1] * (tensor.dim() - 1)) if tensor.dim() else tensor)

    def replace(self, **arguments: Any) -> Call:
        """Return the call with other values of some arguments, which it must have.

        Raises:
            KeyError: an argument that the call does not have.

        """
        if unknown := arguments.keys() - self.keys():
            raise KeyError(f"the call has no {', '.join(sorted(unknown))}; it has {', '.join(self)}")
        return Call({**self._arguments, **arguments})

    @staticmethod
    def cat(calls: Sequence[Call]) -> Call:
        """Return one call of the samples of several, which have the same arguments, one call's after another's.

        A tensor without axes must be equal in all of them.
        """
        return Call(_joined(calls))


def predict(model: nn.Module, call: Call) -> Tensor:
    """Run a denoiser; return its prediction, (B, C, h, w)."""
    return model(**call, return_dict=False)[0]


def normal(generator: torch.Generator) -> Fill:
    """Return what fills arguments with Gaussian values, on the generator's device, each drawn after the one before."""
    return lambda name, shape: torch.randn(shape, generator=generator, device=generator.device)


def zeros(device: torch.device | str = "cpu") -> Fill:
    """Return what fills arguments with zeros."""
    return lambda name, shape: torch.zeros(shape, device=device)


def _mapped(value: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Mapping):
        return {name: _mapped(part, function) for name, part in value.items()}
    return function(value) if isinstance(value, Tensor) else value


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Mapping):
        for part in value.values():
            yield from _leaves(part)
    elif isinstance(value, Tensor):
        yield value


def _joined(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Mapping):
        return {name: _joined([value[name] for value in values]) for name in first}
    if isinstance(first, Tensor) and first.dim():
        return torch.cat(list(values))
    if any(not (torch.equal(value, first) if isinstance(first, Tensor) else value == first) for value in values):
        raise ValueError(f"calls that are joined share {first}, and another has something else")
    return first
