"""Call: the arguments of one denoiser call. The library calls a denoiser in no other way."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Fill = Callable[[str, tuple[int, ...]], Tensor]  # (role of an argument, such as "text", shape) -> values

TIMESTEP = 500  # timestep of an example call


class Call(Mapping[str, Any]):
    """The keyword arguments of one denoiser call, by name: tensors, or mappings or lists of them; immutable.

    A list holds one tensor per sample, such as texts of different lengths. Any other tensor has one row per sample
    along its first axis. Two kinds of tensors hold for all samples instead: tensors without axes, such as a scalar
    timestep, and arguments named in `shared`, such as positions. A `Denoiser` makes calls (`call`, `example`), because
    the argument names depend on the model. Run a call with `predict(model, call)` or `model(**call)`.
    """

    __slots__ = ("_arguments", "finish", "grid", "shared")

    def __init__(
        self,
        arguments: Mapping[str, Any],
        shared: Collection[str] = (),
        grid: tuple[int, int] | None = None,
        finish: Callable[[Any], Tensor] | None = None,
    ):
        """Keep the arguments; the tensors are not copied.

        shared: names of arguments that have no row per sample.
        grid: rows and columns of the latent's tokens, if the latent is passed as tokens.
        finish: function that turns the model's output into the prediction for the latents, (B, C, h, w); None: the
            output is that prediction.

        Raises:
            ValueError: the tensors disagree on the number of samples.

        """
        self.grid, self.finish = grid, finish
        self.shared = frozenset(shared) & arguments.keys()
        self._arguments = {name: _mapped(value, lambda tensor: tensor) for name, value in arguments.items()}
        counts = sorted(set(self._rows()))
        if len(counts) > 1:
            raise ValueError(
                f"a call's tensors have {' and '.join(map(str, counts))} rows; every tensor needs one row per sample"
            )

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
        """Yield all tensors in order, including nested ones."""
        yield from _leaves(self._arguments)

    @property
    def batch(self) -> int:
        """The number of samples; 1 where no tensor has rows."""
        return next(self._rows(), 1)

    @property
    def device(self) -> torch.device:
        """The device of the first tensor."""
        return next(self.tensors()).device

    def map(self, function: Callable[[Tensor], Tensor]) -> Call:
        """Return the call with `function` applied to every tensor."""
        return Call(_mapped(self._arguments, function), **self._rest)

    def take(self, rows: Tensor | slice) -> Call:
        """Return the call with only some of the samples.

        rows: indices (n,), which may repeat; a boolean mask (B,); or a slice.
        """

        def rows_of(samples: list[Tensor]) -> list[Tensor]:
            return [samples[index] for index in torch.arange(len(samples))[_on_host(rows)].tolist()]

        return self._map_rows(lambda tensor: tensor[rows], rows_of)

    def to(self, device: torch.device | str | Tensor | nn.Module, dtype: torch.dtype | None = None) -> Call:
        """Return the call on a device, with its floating-point tensors in a dtype; other tensors keep their dtype.

        device: a device; or a tensor or a model, whose device and dtype are used. For a model in several dtypes,
            float32 is used if it is among them.
        dtype: None keeps the dtype of each tensor, unless `device` is a tensor or a model.
        """
        like = _typical(device) if isinstance(device, nn.Module) else device
        place = like.device if isinstance(like, Tensor) else torch.device(like)
        kind = like.dtype if isinstance(like, Tensor) and dtype is None else dtype
        return self.map(lambda tensor: tensor.to(place, kind if tensor.is_floating_point() else None))

    def repeat(self, times: int) -> Call:
        """Return the call with all samples repeated `times` times, in the order 0, 1, …, B - 1, 0, 1, …"""
        return self._map_rows(
            lambda tensor: tensor.repeat(times, *[1] * (tensor.dim() - 1)), lambda samples: samples * times
        )

    def replace(self, **arguments: Any) -> Call:
        """Return the call with new values for some of its arguments.

        Raises:
            KeyError: an argument that the call does not have.

        """
        if unknown := arguments.keys() - self.keys():
            raise KeyError(f"the call has no {', '.join(sorted(unknown))}; it has {', '.join(self)}")
        return Call({**self._arguments, **arguments}, **self._rest)

    @staticmethod
    def cat(calls: Sequence[Call]) -> Call:
        """Concatenate the samples of several calls, which have the same arguments, into one call.

        Tensors without rows must be equal in all calls; otherwise ValueError is raised.
        """
        shared = calls[0].shared
        arguments = {name: _joined([call[name] for call in calls], name in shared) for name in calls[0]}
        return Call(arguments, **calls[0]._rest)

    @property
    def _rest(self) -> dict[str, Any]:
        """The constructor's arguments besides `arguments`."""
        return {"shared": self.shared, "grid": self.grid, "finish": self.finish}

    def _rows(self) -> Iterator[int]:
        """Yield the number of samples of every list, and of every tensor with rows."""
        for name, value in self._arguments.items():
            if _is_list(value):
                yield len(value)
            elif name not in self.shared:
                yield from (len(tensor) for tensor in _leaves(value) if tensor.dim())

    def _map_rows(self, function: Callable[[Tensor], Tensor], of_list: Callable[[list[Tensor]], list[Tensor]]) -> Call:
        """Return the call with `function` applied to every tensor with rows, and `of_list` to every list."""

        def mapped(tensor: Tensor) -> Tensor:
            return function(tensor) if tensor.dim() else tensor

        changed = {
            name: of_list(value) if _is_list(value) else value if name in self.shared else _mapped(value, mapped)
            for name, value in self._arguments.items()
        }
        return Call(changed, **self._rest)


class NamedCalls:
    """The methods of a `Denoiser` that handle inputs, for models whose config gives the shapes; see `Denoiser`.

    arguments: the names of the forward pass's arguments, by role: "noisy", "timestep", and the conditions.
    """

    arguments: ClassVar[Mapping[str, str]]

    @property
    def latent(self) -> str:
        """Name of the argument that holds the noisy latent."""
        return self.arguments["noisy"]

    @property
    def timestep(self) -> str:
        """Name of the argument that holds the timestep."""
        return self.arguments["timestep"]

    def taken(self, timesteps: Tensor) -> Tensor:
        """Return timesteps of the noise process in the model's unit; here they are the same."""
        return timesteps

    def call(self, noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Call:
        """Return the call that predicts for noisy latents."""
        given = {"noisy": noisy, "timestep": self.taken(timesteps), **conditions}
        return Call({self.arguments[role]: value for role, value in given.items()})

    def example(
        self,
        model: Any,
        batch: int,
        latent: tuple[int, int],
        text_length: int,
        fill: Fill,
        timesteps: Tensor | None = None,
    ) -> Call:
        """Return an example call with tensors of the right shapes."""
        noisy = fill("noisy", (batch, self.latent_channels(model), *latent))
        conditions = self.example_conditions(model, batch, text_length, fill)
        timesteps = torch.tensor(TIMESTEP, device=noisy.device) if timesteps is None else timesteps
        return self.call(noisy, timesteps, conditions)

    def example_conditions(self, model: Any, batch: int, text_length: int, fill: Fill) -> dict[str, Tensor]:
        """Return the conditions of an example call, by role."""
        conditions = {"text": fill("text", (batch, text_length, self.text_width(model)))}
        if pooled := self.pooled_width(model):
            conditions["pooled"] = fill("pooled", (batch, pooled))
        return conditions

    def at(self, call: Call, noisy: Tensor, timesteps: Tensor) -> Call:
        """Return the call with the same conditions, but other noisy latents and timesteps."""
        return call.replace(**{self.latent: noisy, self.timestep: self.taken(timesteps)})

    def noisy(self, call: Call) -> Tensor:
        """Return the noisy latents of a call."""
        return call[self.arguments["noisy"]]

    def starting(self, call: Call) -> Tensor:
        """Return the noisy latents of a call in the form in which a pipeline takes its initial latents."""
        latents: Tensor = call[self.latent]
        return latents

    def text_length(self, call: Call) -> int:
        """Return the number of text tokens of a call."""
        return int(call[self.arguments["text"]].shape[1])

    def hidden(self, output: Any) -> Tensor:
        """Return the hidden states from a block's output: the first item, if the output is a tuple."""
        return output[0] if isinstance(output, tuple) else output

    def latent_channels(self, model: Any) -> int:
        """Return the number of channels of the latents."""
        return int(model.config.in_channels)

    def latent_size(self, model: Any) -> tuple[int, int] | None:
        """Return the latent size (h, w) that a model was made for; None if its config does not say."""
        size = model.config.sample_size
        return None if size is None else (size, size) if isinstance(size, int) else tuple(size)

    def text_width(self, model: Any) -> int:
        """Return the width of the text states."""
        return int(model.config.cross_attention_dim)

    def pooled_width(self, model: Any) -> int:
        """Return the width of the pooled text embedding; 0 where the model takes none."""
        return 0


def predict(model: nn.Module, call: Call) -> Tensor:
    """Run a denoiser; return its prediction, (B, C, h, w)."""
    output = model(**call, return_dict=False)[0]
    return output if call.finish is None else call.finish(output)


def normal(generator: torch.Generator) -> Fill:
    """Return a function that fills arguments, one after another, with Gaussian values on the generator's device."""
    return lambda name, shape: torch.randn(shape, generator=generator, device=generator.device)


def zeros(device: torch.device | str = "cpu") -> Fill:
    """Return a function that fills arguments with zeros."""
    return lambda name, shape: torch.zeros(shape, device=device)


def _typical(model: nn.Module) -> Tensor:
    """Return a parameter with the device and the dtype that a model's inputs should have."""
    first = next(model.parameters())
    return next((parameter for parameter in model.parameters() if parameter.dtype is torch.float32), first)


def _is_list(value: Any) -> bool:
    """Return whether a value is a list with one tensor for each sample."""
    return isinstance(value, list) and len(value) > 0 and all(isinstance(part, Tensor) for part in value)


def _on_host(rows: Tensor | slice) -> Tensor | slice:
    return rows if isinstance(rows, slice) else rows.cpu()


def _mapped(value: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Mapping):
        return {name: _mapped(part, function) for name, part in value.items()}
    if _is_list(value):
        return [function(part) for part in value]
    return function(value) if isinstance(value, Tensor) else value


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Mapping):
        for part in value.values():
            yield from _leaves(part)
    elif _is_list(value):
        yield from value
    elif isinstance(value, Tensor):
        yield value


def _joined(values: Sequence[Any], is_shared: bool = False) -> Any:
    first = values[0]
    if isinstance(first, Mapping):
        return {name: _joined([value[name] for value in values], is_shared) for name in first}
    if _is_list(first):
        return [part for value in values for part in value]
    if isinstance(first, Tensor) and first.dim() and not is_shared:
        return torch.cat(list(values))
    if any(not (torch.equal(value, first) if isinstance(first, Tensor) else value == first) for value in values):
        raise ValueError(f"joined calls must share {first}; another call has a different value")
    return first
