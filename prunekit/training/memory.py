"""Memory use of a training: recomputed activations, layout of convolutions, dtype and device of frozen weights.

Also the number of samples per forward pass, and the settings of shortened trial trainings.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from diffusers import ModelMixin
from diffusers.hooks import HookRegistry, apply_group_offloading
from torch import nn

from prunekit.runtime.precision import LOWER, resolve_precision
from prunekit.training.trainer import TrainerConfig

CAST = (nn.Conv2d, nn.Linear)  # layers whose weights autocast casts on every call; norms are not cast
C = TypeVar("C", bound=TrainerConfig)
M = TypeVar("M", bound=ModelMixin)
LOWERED = "_held_in_bfloat16"  # attribute that marks a model prepared by `lower`
_OFFLOADING = "group_offloading"  # diffusers' name of the hook
SMOKE = {"steps": 2, "batch_size": 4, "micro_batch": 2, "warmup_steps": 1, "checkpoint_steps": 2}  # upper limits
STEPS = 2  # steps of a trial training: the first also warms up, so only the second is measured


@contextmanager
def held(config: TrainerConfig, trained: ModelMixin, *others: ModelMixin) -> Iterator[None]:
    """Prepare models for a training as its settings say; on exit undo what changed.

    Frozen weights are converted to the precision of forward passes, so forward passes within must run under autocast.

    trained: the model that gradients go through, to its weights or to its gates; only this model recomputes
        activations.
    """
    dtype = LOWER.get(resolve_precision(config.precision, trained.device))
    with ExitStack() as stack:
        if config.gradient_checkpointing and not trained.is_gradient_checkpointing:
            trained.enable_gradient_checkpointing()
            stack.callback(trained.disable_gradient_checkpointing)
        for model in (trained, *others):
            if config.channels_last:
                stack.enter_context(in_channels_last(model))
            if dtype is not None:
                stack.enter_context(cast_frozen(model, dtype))
        yield


@contextmanager
def in_channels_last(model: nn.Module) -> Iterator[None]:
    """Convert a model's contiguous weights of 4 axes to the layout channels_last; convert them back on exit."""
    weights = [weight for weight in model.parameters() if weight.dim() == 4 and weight.is_contiguous()]
    for weight in weights:
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for weight in weights:
            weight.data = weight.data.contiguous()


@contextmanager
def preserved(*modules: nn.Module) -> Iterator[None]:
    """Restore, on exit, the modules' training modes and which of their parameters require gradients."""
    parts = [part for module in modules for part in module.modules()]
    modes = [(part, part.training) for part in parts]
    flags = [(parameter, parameter.requires_grad) for module in modules for parameter in module.parameters()]
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def cast_frozen(model: ModelMixin, dtype: torch.dtype) -> Iterator[None]:
    """Convert frozen float32 weights of convolutions and linear layers to autocast's dtype; restore them on exit.

    Autocast caches its casts of trained weights within its context, but casts frozen weights again at every call. The
    results are bitwise the same. Both copies are in memory.
    """
    layers = (module for module in model.modules() if isinstance(module, CAST))
    weights = {id(weight): weight for layer in layers for weight in layer.parameters(recurse=False)}.values()
    full = [(weight, weight.data) for weight in weights if not weight.requires_grad and weight.dtype is torch.float32]
    for weight, data in full:
        weight.data = data.to(dtype)
    try:
        yield
    finally:
        for weight, data in full:
            weight.data = data


class _Autocast:
    """Hooks that run a module's forward under bfloat16 autocast, whoever calls it."""

    def __init__(self) -> None:
        self.contexts = list[torch.autocast]()

    def enter(self, model: ModelMixin, *_: Any) -> None:
        device = model.device  # its current device: it may have moved since, or have its weights in host memory
        self.contexts.append(torch.autocast(device.type, torch.bfloat16))
        self.contexts[-1].__enter__()

    def leave(self, *_: Any) -> None:
        self.contexts.pop().__exit__(None, None, None)


def lower(model: M) -> M:
    """Convert a frozen model's convolutions and linear layers to bfloat16, in place; return the model.

    All other parameters become float32, and every forward pass runs under bfloat16 autocast. The outputs equal bitwise
    those of float32 weights under autocast, if bfloat16 represents the weights exactly.
    A slice of such a model has the same dtypes: call `lower` on it too, or `float()` to train it.
    """
    cast = {id(layer.weight): layer for layer in model.modules() if isinstance(layer, CAST)}
    biases = {id(layer.bias) for layer in cast.values()}
    for parameter in model.parameters():
        lowered = id(parameter) in cast or id(parameter) in biases
        parameter.data = parameter.data.to(torch.bfloat16 if lowered else torch.float32)
    if not is_lowered(model):
        hooks = _Autocast()
        setattr(model, LOWERED, hooks)
        model.register_forward_pre_hook(hooks.enter, prepend=True)
        model.register_forward_hook(hooks.leave, always_call=True)
    return model


def is_lowered(model: nn.Module) -> bool:
    """Return whether a model was prepared by `lower`."""
    return hasattr(model, LOWERED)


def held_like(cut: M, dense: nn.Module) -> M:
    """Call `lower` on a slice of a model if the model was prepared by `lower`; return the slice."""
    return lower(cut) if is_lowered(dense) else cut


def offload(module: nn.Module, device: torch.device) -> None:
    """Keep a frozen module's weights in host memory; each layer's weights are copied to the device while it runs.

    This is diffusers' group offloading, with prefetching on a GPU. If the device is the CPU, nothing moves.
    """
    streams = device.type == "cuda"
    apply_group_offloading(module, device, torch.device("cpu"), "leaf_level", use_stream=streams)


@contextmanager
def offloaded(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Open a context in which a frozen module is offloaded; on exit it moves to the device."""
    offload(module, device)
    try:
        yield
    finally:
        HookRegistry.check_if_exists_or_initialize(module).remove_hook(_OFFLOADING)
        module.to(device)


def is_number(value: Any) -> bool:
    """Return whether a setting is a number; a boolean is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def capped(settings: Mapping[str, Any], most: Mapping[str, int]) -> dict[str, Any]:
    """Return settings in which no number is above its entry in `most`."""
    lower = {key: min(value, most[key]) for key, value in settings.items() if key in most and is_number(value)}
    return {**settings, **lower}


def samples_at_once(config: TrainerConfig, devices: int) -> int:
    """Return the number of samples per forward pass on each of the devices that share a batch."""
    per_device = math.ceil(config.batch_size / devices)
    return min(config.micro_batch or per_device, per_device)


def two_steps(config: C, devices: int) -> C:
    """Return the settings of a two-step training whose forward passes have the samples of one of `devices` devices."""
    changes = {"steps": STEPS, "warmup_steps": 0, "decay_share": 0.0, "log_every": 1}
    return config.model_copy(update={**changes, "micro_batch": samples_at_once(config, devices)})
