"""Run a stock denoiser under Architectures, hard or soft, one per sample, by forward hooks that are removed on exit."""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from prunekit.runtime.errors import UserError

from .axes import RMS_NORMS, Axis, weight_of
from .discovery import match, width_layers
from .registry import denoiser_of
from .space import Architecture, UnitGroup, UnitSpace

LEAST = 1e-12  # smallest sum of gates by which a norm's statistic is divided
_Read = Callable[[tuple[Any, ...], dict[str, Any]], list[torch.Tensor]]  # (args, kwargs) of a forward pass -> arguments


class _Token:
    """An object that lives as long as an autograd graph, or a checkpoint to recompute, needs the gates of one `set`."""


class _Track(torch.autograd.Function):
    """The identity; its node in the autograd graph holds a token until the backward pass is done."""

    @staticmethod
    def forward(ctx: Any, gates: torch.Tensor, token: _Token) -> torch.Tensor:
        ctx.token = token
        return gates.view_as(gates)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.token = None
        return gradient, None


@dataclass
class _State:
    """The gates of one `set`, expanded to channels."""

    batch: int | None  # batch size that the gates are for; None: any
    masks: list[torch.Tensor] | None  # per width group (rows, channels); per depth group (rows,); None: all are open
    token: _Token
    entered: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # by depth group: its inputs, per stream


class Gates:
    """The handle that `gated` yields; `set` sets the gates of the next forward passes."""

    def __init__(self, model: nn.Module, space: UnitSpace):
        self.space = space
        self._model = model
        self._denoiser = denoiser_of(model)
        self._parameter = next(model.parameters())  # the gates take its device and dtype
        self._state: _State | None = None
        self._token: weakref.ref[_Token] | None = None
        groups = space.width_groups
        self._widths = [group.size * group.channels for group in groups]
        unit_of_channel = [
            space.slice(group).start + channel // group.channels
            for group in groups
            for channel in range(group.size * group.channels)
        ]
        self._unit_of_channel = torch.tensor(unit_of_channel, dtype=torch.long, device=self._parameter.device)

    def set(self, g: Architecture | torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """Set the gates of the next forward passes.

        g: an Architecture or a tensor (D,): every sample runs under it, for any batch. A tensor (G, D): sample b runs
            under row b, and the batch must be G; or, with integers rows (batch,), under row rows[b]. Under
            `space.full()` the model runs as it is, without a mask.

        Raises:
            UserError: gates or rows of a wrong shape, or rows out of range.
            RuntimeError: a forward pass under the previous gates still waits for its backward pass.

        """
        opens = isinstance(g, Architecture) and g.is_boolean and all(g.values.tolist())  # its values are on the host
        if isinstance(g, Architecture):
            values = g.on(self.space).values if g.space is not self.space else g.values
        else:
            values = g
        if values.dim() not in (1, 2) or values.shape[-1] != self.space.size:
            raise UserError(
                f"gates have shape ({self.space.size},) or (G, {self.space.size}), got {tuple(values.shape)}"
            )
        if not opens:
            values = values.to(self._parameter.device)
            values = values if values.is_floating_point() else values.to(self._parameter.dtype)
        batch = None
        if values.dim() == 1:
            if rows is not None:
                raise UserError("rows select rows of gates (G, D), but these gates are one vector (D,)")
            values = values[None]
        else:
            if rows is not None:
                values = values.index_select(0, _checked_rows(rows, len(values)).to(values.device))
            batch = len(values)
        self._release("set again")
        token = _Token()
        if values.requires_grad and torch.is_grad_enabled():
            values = _Track.apply(values, token)
        self._state = _State(batch, None if opens else self._masks(values), token)
        self._token = weakref.ref(token)

    def _masks(self, g: torch.Tensor) -> list[torch.Tensor]:
        channels = g.index_select(1, self._unit_of_channel)  # (rows, all channels)
        return list(channels.split(self._widths, dim=1)) + list(g[:, self.space.num_width :].unbind(dim=1))

    @property
    def _now(self) -> _State:
        """The state of the gates that are set."""
        assert self._state is not None, "a forward pass checks first that gates are set"
        return self._state

    def _release(self, action: str) -> None:
        """Drop the current state; raise RuntimeError if an unfinished backward pass still needs it."""
        self._state = None
        if self._token is not None and self._token() is not None:
            raise RuntimeError(
                f"the gates were {action} while a forward pass with these gates waits for its backward pass, "
                "which would use the new gates; call backward first, delete the output, or run the forward "
                "pass under no_grad"
            )

    @contextlib.contextmanager
    def _using(self, state: _State) -> Iterator[None]:
        current, self._state = self._state, state
        try:
            yield
        finally:
            self._state = current

    # hooks

    def _attach(self) -> list[torch.utils.hooks.RemovableHandle]:
        model, handles = self._model, [self._model.register_forward_pre_hook(self._before(), with_kwargs=True)]
        layers = width_layers(model)
        for index, group in enumerate(self.space.groups):
            if group.is_depth:
                handles += self._attach_depth(index, group)
                continue
            layer = layers[group.name]
            for axis in layer.axes:
                module = layer.module(model, axis)
                if axis.side == "in":
                    handles.append(module.register_forward_pre_hook(self._multiplies(index, module, axis)))
                elif axis.side == "each" and isinstance(module, RMS_NORMS):
                    handles.append(module.register_forward_hook(self._normalizes(index, module, axis)))
        return handles

    def _attach_depth(self, index: int, group: UnitGroup) -> list[torch.utils.hooks.RemovableHandle]:
        passage = self._denoiser.passage(self._model, group)
        enter, leave = self._model.get_submodule(passage.enter), self._model.get_submodule(passage.leave)
        read = _reader(enter, passage.inputs, passage.channels)
        if enter is leave:
            return [leave.register_forward_hook(self._mixes(index, read), with_kwargs=True)]
        return [
            enter.register_forward_pre_hook(self._enters(index, read), with_kwargs=True),
            leave.register_forward_hook(self._leaves(index)),
        ]

    def _before(self) -> Callable[..., None]:
        read = _reader(self._model, (self._denoiser.latent,))

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._state is None:
                raise RuntimeError("no gates are set; call gates.set(...) first (space.full() runs the dense model)")
            batch = len(read(args, kwargs)[0])  # a tensor's rows, or a list of one latent per sample
            if self._state.batch not in (None, batch):
                raise UserError(
                    f"the gates are for a batch of {self._state.batch}, but the model got {batch}; pass rows=, "
                    "the gate row of each sample (for a pipeline: prunekit.pipeline_rows)"
                )

        return hook

    def _mask(self, index: int, batch: int) -> torch.Tensor | None:
        if self._now.masks is None:
            return None
        mask = self._now.masks[index]
        if mask.shape[0] not in (1, batch):
            raise UserError(f"the gates have {mask.shape[0]} rows, but a layer got a batch of {batch}")
        return mask

    def _along(self, index: int, axis: Axis, total: int, batch: int) -> torch.Tensor | None:
        """Return the mask (rows, total) along a weight, 1 at channels of other groups; None if all gates are open."""
        mask = self._mask(index, batch)  # (rows, channels)
        if mask is None:
            return None
        mask = mask.repeat(1, axis.copies) if axis.copies > 1 else mask
        if mask.shape[1] != total:
            after = total - axis.start - mask.shape[1]
            mask = nn.functional.pad(mask, (axis.start, after), value=1.0)
        return mask

    def _multiplies(self, index: int, layer: nn.Module, axis: Axis) -> Callable[..., tuple[Any, ...]]:
        dimension = 1 if isinstance(layer, nn.Conv2d) else -1
        total = weight_of(layer).shape[1]

        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]
            mask = self._along(index, axis, total, x.shape[0])
            if mask is None:
                return args
            shape = [len(mask), *[1] * (x.dim() - 1)]
            shape[dimension] = total
            return (x * mask.to(x.dtype).view(shape), *args[1:])

        return hook

    def _normalizes(self, index: int, norm: Any, axis: Axis) -> Callable[..., torch.Tensor | None]:
        total = weight_of(norm).shape[0]
        assert getattr(norm, "bias", None) is None, "a norm's output is scaled as a whole"

        def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
            mask = self._along(index, axis, total, args[0].shape[0])
            return None if mask is None else normalized_over(mask, args[0], output, norm.eps)

        return hook

    def _mixes(self, index: int, read: _Read) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            return self._mixed(index, read(args, kwargs), output)

        return hook

    def _mixed(self, index: int, entered: Sequence[torch.Tensor], output: Any) -> Any:
        mask = self._mask(index, entered[0].shape[0])  # (rows,)
        return output if mask is None else mix(entered, output, mask)

    def _enters(self, index: int, read: _Read) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._now.entered[index] = read(args, kwargs)

        return hook

    def _leaves(self, index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return self._mixed(index, self._now.entered.pop(index), output)

        return hook


def mix(entered: Sequence[torch.Tensor], output: Any, gate: torch.Tensor) -> Any:
    """Return u·f(x) + (1 - u)·h for every stream (APTP, Eq. 23 and 24), exact at u = 0 and 1.

    entered: the hidden states h that entered the layer, one per stream.
    output: the layer's output f(x): a tensor, or a tuple whose first items belong to the streams, in this order; an
        item is None if the layer gives its stream no output.
    gate: u, (rows,).
    """
    if isinstance(output, tuple):
        mixed = [mix([h], f, gate) for h, f in zip(entered, output, strict=False)]
        return (*mixed, *output[len(mixed) :])
    if output is None:
        return None
    gate = gate.to(output.dtype).view(-1, *[1] * (output.dim() - 1))
    return torch.lerp(entered[0].to(output.dtype), output, gate)


def normalized_over(
    gates: torch.Tensor, entered: torch.Tensor, output: torch.Tensor, eps: float | None
) -> torch.Tensor:
    """Return an RMS norm's output with the statistic of the kept channels: Σ g·x² / Σ g in place of the mean of x².

    A stock norm that is cut to the kept channels gives the same output. Where all gates are 1, the result equals
    `output` bitwise; where all gates are 0, it is finite.

    gates: g, (rows, C).
    entered: input of the norm, (B, …, C).
    output: output of the norm, in the same shape.
    eps: eps of the norm; None: torch's default.
    """
    x = entered.to(torch.promote_types(entered.dtype, torch.float32))
    eps = torch.finfo(entered.dtype).eps if eps is None else eps
    gates = gates.to(x.dtype).view(len(gates), *[1] * (x.dim() - 2), -1)
    squares = x * x
    of_all = squares.sum(-1, keepdim=True) / squares.shape[-1]
    of_kept = (squares * gates).sum(-1, keepdim=True) / gates.sum(-1, keepdim=True).clamp(min=LEAST)
    return (output * ((of_all + eps) / (of_kept + eps)).sqrt()).to(output.dtype)


def _reader(module: nn.Module, names: Sequence[str], channels: int | None = None) -> _Read:
    """Return a function of a forward pass's (args, kwargs) that returns the arguments of these names.

    channels: number of channels (axis 1) to take of each argument; None: all.
    """
    order = list(inspect.signature(module.forward).parameters)
    places = [(order.index(name), name) for name in names]

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        tensors = [args[place] if place < len(args) else kwargs[name] for place, name in places]
        return tensors if channels is None else [tensor[:, :channels] for tensor in tensors]

    return read


@contextlib.contextmanager
def gated(model: nn.Module, space: UnitSpace) -> Iterator[Gates]:
    """Open a context in which a denoiser runs with gates: `gates.set(g, rows)`, then call the model as usual.

    Gates are differentiable. Set, forward and backward belong together and happen inside the context: a RuntimeError is
    raised for another `set`, or for leaving the context, between a forward pass and its backward pass. All hooks are
    removed on exit.
    Gradient checkpointing recomputes with the gates of its own forward pass. Graphs that torch.compile made before the
    context stay valid after it; gates need one more graph, which is compiled once.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    match(model, space)
    gates = Gates(model, space)
    with contextlib.ExitStack() as stack:
        for handle in gates._attach():
            stack.callback(handle.remove)
        hooked = [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
        stack.enter_context(_seen_by_compiled_code(hooked))
        stack.enter_context(_checkpoints_under(gates))
        yield gates
        gates._release("left")


@contextlib.contextmanager
def _seen_by_compiled_code(modules: list[nn.Module]) -> Iterator[None]:
    """Put a wrapper of `forward` into each module's instance dict, so that torch.compile notices the hooks.

    torch.compile does not check whether hooks were added to a module or removed. Its compiled code for a module is
    valid only while the `forward` in the instance dict is unchanged (torch/_dynamo/variables/nn_module.py,
    guard_to_detect_forward_monkeypatching).
    """

    def passing_on(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def under_gates(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

        return under_gates

    patched = {module: module.__dict__["forward"] for module in modules if "forward" in module.__dict__}
    for module in modules:
        module.forward = passing_on(patched[module]) if module in patched else module.forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward
            if module in patched:
                module.forward = patched[module]


@contextlib.contextmanager
def _checkpoints_under(gates: Gates) -> Iterator[None]:
    """Make gradient checkpointing, enabled before or inside the context, recompute with its forward pass's gates."""
    originals: list[tuple[Any, Callable[..., Any]]] = []
    modules: list[Any] = [module for module in gates._model.modules() if hasattr(module, "gradient_checkpointing")]

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def checkpoint(module: nn.Module, *args: Any) -> Any:
            state = gates._now

            def run(*args: Any) -> Any:
                with gates._using(state):
                    return module(*args)

            return original(run, *args)

        checkpoint.__dict__["under_gates"] = True
        return checkpoint

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        for owner in modules:
            function: Any = getattr(owner, "_gradient_checkpointing_func", None)
            if owner.gradient_checkpointing and not getattr(function, "under_gates", False):
                originals.append((owner, function))
                owner._gradient_checkpointing_func = wrap(function)

    handle = gates._model.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()
        for owner, function in originals:
            owner._gradient_checkpointing_func = function


def _checked_rows(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    rows = torch.as_tensor(rows)
    if rows.dim() != 1 or rows.is_floating_point() or rows.dtype == torch.bool:
        raise UserError(f"rows is (batch,) of integers, got {tuple(rows.shape)} of {rows.dtype}")
    on_host = rows.device.type == "cpu"  # on a GPU, reading would make the host wait; indexing checks anyway
    if on_host and len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= num_rows):
        raise UserError(f"rows name gate rows 0 to {num_rows - 1}, got {int(rows.min())} to {int(rows.max())}")
    return rows


def pipeline_rows(num_prompts: int, images_per_prompt: int = 1, guidance: bool = True) -> torch.Tensor:
    """Return the gate row of each sample in the denoiser batch of a diffusers pipeline, int64.

    Images of one prompt follow each other; with classifier-free guidance the unconditional half comes first.
    """
    rows = torch.arange(num_prompts).repeat_interleave(images_per_prompt)
    return rows.repeat(2) if guidance else rows
