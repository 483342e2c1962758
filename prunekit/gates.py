"""Run a stock UNet UNDER Architectures, hard or soft, one per sample: forward hooks only, gone on exit."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from prunekit.errors import UserError

from .units import Architecture, UnitGroup, UnitSpace, attention, depth, feedforward, resnet
from .units.discovery import match

_WIDTH_KINDS = {"resnet": resnet, "attention": attention, "feedforward": feedforward}


class _Token:
    """Lives as long as an autograd graph, or a checkpoint that is to be recomputed, needs the gates of one `set`."""


class _Track(torch.autograd.Function):
    """The identity; its node in the graph holds a token until backward has passed."""

    @staticmethod
    def forward(ctx, gates: torch.Tensor, token: _Token) -> torch.Tensor:
        ctx.token = token
        return gates.view_as(gates)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.token = None
        return gradient, None


@dataclass
class _State:
    """The gates of one `set`, expanded to channels."""

    batch: int | None  # the batch they are for; None: any
    masks: list[torch.Tensor] | None  # per width group (rows, channels); per depth group (rows,); None: all are open
    token: _Token
    entered: dict[int, torch.Tensor] = field(default_factory=dict)  # the hidden states that entered open stages


class Gates:
    """The handle that `gated` yields: `set` says under which Architectures the next forward passes run."""

    def __init__(self, unet: UNet2DConditionModel, space: UnitSpace):
        self.space = space
        self._unet = unet
        self._state: _State | None = None
        self._token: weakref.ref[_Token] | None = None
        groups = space.width_groups
        self._widths = [group.size * group.channels for group in groups]
        unit_of_channel = [
            space.slice(group).start + channel // group.channels
            for group in groups
            for channel in range(group.size * group.channels)
        ]
        self._unit_of_channel = torch.tensor(unit_of_channel, dtype=torch.long, device=unet.conv_in.weight.device)

    def set(self, g: Architecture | torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """Gates for the forward passes that follow.

        g: an Architecture or (D,): every sample runs under it, whatever the batch. (G, D): sample b runs under row b,
            and the batch must be G; or, with rows (batch,) of integers, under row rows[b]. Under `space.full()` the
            UNet runs as it is, without a mask.
        RuntimeError where a forward pass under the previous gates still waits for its backward.
        """
        opens = isinstance(g, Architecture) and g.is_boolean and all(g.values.tolist())  # they lie on the host
        if isinstance(g, Architecture):
            g = g.on(self.space).values if g.space is not self.space else g.values
        if g.dim() not in (1, 2) or g.shape[-1] != self.space.size:
            raise UserError(f"gates have shape ({self.space.size},) or (G, {self.space.size}), got {tuple(g.shape)}")
        parameter = self._unet.conv_in.weight
        g = g.to(parameter.device)
        g = g if g.is_floating_point() else g.to(parameter.dtype)
        batch = None
        if g.dim() == 1:
            if rows is not None:
                raise UserError("rows choose among the rows of (G, D) gates; these gates are one (D,) vector")
            g = g[None]
        else:
            if rows is not None:
                g = g.index_select(0, _checked_rows(rows, len(g)).to(g.device))
            batch = len(g)
        self._release("set again")
        token = _Token()
        if g.requires_grad and torch.is_grad_enabled():
            g = _Track.apply(g, token)
        self._state = _State(batch, None if opens else self._masks(g), token)
        self._token = weakref.ref(token)

    def _masks(self, g: torch.Tensor) -> list[torch.Tensor]:
        channels = g.index_select(1, self._unit_of_channel)  # (rows, all channels)
        return list(channels.split(self._widths, dim=1)) + list(g[:, self.space.num_width :].unbind(dim=1))

    def _release(self, action: str) -> None:
        """Let the state go, unless something else still holds it, which is then an unfinished backward."""
        self._state = None
        if self._token is not None and self._token() is not None:
            raise RuntimeError(
                f"the gates were {action} while a forward pass under them waits for its backward, which would "
                "see other gates; call backward first, drop its output, or run it under no_grad"
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
        unet, handles = self._unet, [self._unet.register_forward_pre_hook(self._before, with_kwargs=True)]
        for index, group in enumerate(self.space.groups):
            if group.kind == "stage":
                enter, leave = unet.get_submodule(group.covers[0]), unet.get_submodule(group.covers[-1])
                handles.append(enter.register_forward_pre_hook(self._stage_enters(index)))
                handles.append(leave.register_forward_hook(self._stage_leaves(index)))
                continue
            module = unet.get_submodule(group.path)
            if group.is_depth:
                handles.append(module.register_forward_hook(self._mixes(index, group), with_kwargs=True))
            else:
                layer = _WIDTH_KINDS[group.kind].gated_layer(module)
                handles.append(layer.register_forward_pre_hook(self._multiplies(index)))
        return handles

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        sample = args[0] if args else kwargs["sample"]
        if self._state is None:
            raise RuntimeError("no gates are set; call gates.set(...) first (space.full() runs the UNet as it is)")
        if self._state.batch not in (None, sample.shape[0]):
            raise UserError(
                f"the gates are for a batch of {self._state.batch}, the UNet got {sample.shape[0]}; pass rows=, which "
                "gate row each sample uses (for a pipeline: prunekit.pipeline_rows)"
            )

    def _mask(self, index: int, batch: int) -> torch.Tensor | None:
        if self._state.masks is None:
            return None
        mask = self._state.masks[index]
        if mask.shape[0] not in (1, batch):
            raise UserError(f"the gates have {mask.shape[0]} rows, a layer got a batch of {batch}")
        return mask

    def _multiplies(self, index: int) -> Callable:
        def hook(module: nn.Module, args: tuple) -> tuple:
            x = args[0]
            mask = self._mask(index, x.shape[0])  # (rows, channels)
            if mask is None:
                return args
            shape = (-1, mask.shape[1], 1, 1) if isinstance(module, nn.Conv2d) else (-1, 1, mask.shape[1])
            return (x * mask.to(x.dtype).view(shape), *args[1:])

        return hook

    def _mixes(self, index: int, group: UnitGroup) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
            entered = args[0] if args else kwargs["hidden_states"]
            if entered.dim() == 4:
                entered = entered[:, : group.channels]  # in up blocks without the skip
            return self._mixed(index, entered, output)

        return hook

    def _mixed(self, index: int, entered: torch.Tensor, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        mask = self._mask(index, entered.shape[0])  # (rows,)
        return output if mask is None else depth.mix(entered, output, mask)

    def _stage_enters(self, index: int) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            self._state.entered[index] = args[0]

        return hook

    def _stage_leaves(self, index: int) -> Callable:
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            return self._mixed(index, self._state.entered.pop(index), output)

        return hook


@contextlib.contextmanager
def gated(unet: UNet2DConditionModel, space: UnitSpace) -> Iterator[Gates]:
    """A context in which a UNet runs under Architectures: `gates.set(g, rows)`, then call the UNet as ever.

    Gates are differentiable. One set, forward, backward happens inside the context: setting again or leaving while a
    forward pass waits for its backward is a RuntimeError. On exit no hook is left.
    Gradient checkpointing recomputes under the gates of its own forward pass. What torch.compile has made of the UNet
    stays for later, and under gates another graph is made once; nothing else is compiled again.
    """
    unet = getattr(unet, "_orig_mod", unet)  # torch.compile's wrapper
    match(unet, space)
    gates = Gates(unet, space)
    with contextlib.ExitStack() as stack:
        for handle in gates._attach():
            stack.callback(handle.remove)
        hooked = [module for module in unet.modules() if module._forward_hooks or module._forward_pre_hooks]
        stack.enter_context(_seen_by_compiled_code(hooked))
        stack.enter_context(_checkpoints_under(gates))
        yield gates
        gates._release("left")


@contextlib.contextmanager
def _seen_by_compiled_code(modules: list[nn.Module]) -> Iterator[None]:
    """Give modules a `forward` in their instance's dict, which does what it did.

    torch.compile does not look whether hooks were added to a module or removed; but its code for a module holds only
    while that entry is as it was (torch/_dynamo/variables/nn_module.py, guard_to_detect_forward_monkeypatching).
    """

    def passing_on(forward: Callable) -> Callable:
        @functools.wraps(forward)
        def under_gates(*args, **kwargs):
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
    """Make gradient checkpointing, switched on before or inside the context, recompute under its forward's gates."""
    originals: list[tuple[nn.Module, Callable]] = []
    modules = [module for module in gates._unet.modules() if hasattr(module, "gradient_checkpointing")]

    def wrap(original: Callable) -> Callable:
        def checkpoint(module: nn.Module, *args):
            state = gates._state

            def run(*args):
                with gates._using(state):
                    return module(*args)

            return original(run, *args)

        checkpoint.under_gates = True
        return checkpoint

    def before(module: nn.Module, args: tuple) -> None:
        for module in modules:
            function = getattr(module, "_gradient_checkpointing_func", None)
            if module.gradient_checkpointing and not getattr(function, "under_gates", False):
                originals.append((module, function))
                module._gradient_checkpointing_func = wrap(function)

    handle = gates._unet.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()
        for module, function in originals:
            module._gradient_checkpointing_func = function


def _checked_rows(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    rows = torch.as_tensor(rows)
    if rows.dim() != 1 or rows.is_floating_point() or rows.dtype == torch.bool:
        raise UserError(f"rows is (batch,) of integers, got {tuple(rows.shape)} of {rows.dtype}")
    on_host = rows.device.type == "cpu"  # on a GPU looking would make the host wait, and indexing checks by itself
    if on_host and len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= num_rows):
        raise UserError(f"rows name gate rows 0 to {num_rows - 1}, got {int(rows.min())} to {int(rows.max())}")
    return rows


def pipeline_rows(num_prompts: int, images_per_prompt: int = 1, guidance: bool = True) -> torch.Tensor:
    """The rows of a diffusers pipeline's batch, int64: which prompt's gates each sample of the UNet's batch uses.

    Images of a prompt are neighbours; with classifier-free guidance the unconditional half comes first.
    """
    rows = torch.arange(num_prompts).repeat_interleave(images_per_prompt)
    return rows.repeat(2) if guidance else rows
