"""How models are held: activations recomputed or kept, the layout of convolutions, frozen weights' dtype and place;
how many samples a training takes at once, and the same training made small.
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

CAST = (nn.Conv2d, nn.Linear)  # whose weights autocast casts on every call; norms stay as they are
C = TypeVar("C", bound=TrainerConfig)
M = TypeVar("M", bound=ModelMixin)
LOWERED = "_held_in_bfloat16"  # attribute of a model that `lower` has prepared
_OFFLOADING = "group_offloading"  # diffusers' name of the hook
SMOKE = {"steps": 2, "batch_size": 4, "micro_batch": 2, "warmup_steps": 1, "checkpoint_steps": 2}  # at most
STEPS = 2  # of a training that is only tried: the first also warms up, so that the second is the one that counts


@contextmanager
def held(config: TrainerConfig, trained: ModelMixin, *others: ModelMixin) -> Iterator[None]:
    """Hold UNets as a training's settings say; on exit they are as before.

    Frozen weights are held in the precision of forward passes, so what runs under them runs under autocast.

    trained: the one that gradients go through, to its weights or to the gates on it; it alone recomputes activations.
    """
    models = (trained, *others)
    if config.channels_last:
        for model in models:
            model.to(memory_format=torch.channels_last)
    if config.gradient_checkpointing:
        trained.enable_gradient_checkpointing()
    try:
        with ExitStack() as stack:
            dtype = LOWER.get(resolve_precision(config.precision, trained.device))
            if dtype is not None:
                for model in models:
                    stack.enter_context(cast_frozen(model, dtype))
            yield
    finally:
        if config.gradient_checkpointing:
            trained.disable_gradient_checkpointing()
        if config.channels_last:
            for model in models:
                model.to(memory_format=torch.contiguous_format)


@contextmanager
def preserved(*modules: nn.Module) -> Iterator[None]:
    """A context after which modules are in the mode that they were in, and their parameters train as they did."""
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
    """Hold the frozen float32 weights of convolutions and linear layers in autocast's dtype; on exit the old are back.

    Autocast keeps its casts of weights that are trained for the length of its context, and casts frozen ones again at
    every call. The numbers are the same, bit by bit. Both copies are in memory.
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
        device = model.device  # where it computes now: it may have moved since, or its weights are in host memory
        self.contexts.append(torch.autocast(device.type, torch.bfloat16))
        self.contexts[-1].__enter__()

    def leave(self, *_: Any) -> None:
        self.contexts.pop().__exit__(None, None, None)


def lower(model: M) -> M:
    """Hold a frozen model's convolutions and linear layers in bfloat16 from now on; return it.

    Norms, tables and what else there is stay, or become, float32, and every forward pass runs under bfloat16 autocast:
    the outputs are those of float32 weights under autocast, bit by bit, if bfloat16 holds the weights exactly.
    A slice of such a model has its dtypes; lower it too, or make it `float()` to train it.
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
    """Whether `lower` holds a model."""
    return hasattr(model, LOWERED)


def held_like(cut: M, dense: nn.Module) -> M:
    """Hold a slice of a model as that model is held, and return the slice."""
    return lower(cut) if is_lowered(dense) else cut


def offload(module: nn.Module, device: torch.device) -> None:
    """Keep a frozen module's weights in host memory; each layer's are copied to the device while it runs.

    diffusers' group offloading, with prefetching on a GPU. On the CPU itself nothing moves.
    """
    streams = device.type == "cuda"
    apply_group_offloading(module, device, torch.device("cpu"), "leaf_level", use_stream=streams)


@contextmanager
def offloaded(module: nn.Module, device: torch.device) -> Iterator[None]:
    """A context in which a frozen module is offloaded; afterwards it is on the device again."""
    offload(module, device)
    try:
        yield
    finally:
        HookRegistry.check_if_exists_or_initialize(module).remove_hook(_OFFLOADING)
        module.to(device)


def is_number(value: Any) -> bool:
    """Whether a setting is a number, which a boolean is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def capped(settings: Mapping[str, Any], most: Mapping[str, int]) -> dict[str, Any]:
    """Return settings with no number above its entry in `most`."""
    lower = {key: min(value, most[key]) for key, value in settings.items() if key in most and is_number(value)}
    return {**settings, **lower}


def samples_at_once(config: TrainerConfig, devices: int) -> int:
    """Return the samples of one forward pass on one of the devices that share a batch."""
    per_device = math.ceil(config.batch_size / devices)
    return min(config.micro_batch or per_device, per_device)


def two_steps(config: C, devices: int) -> C:
    """Return a training of two steps, with as many samples at once as one of the devices has."""
    changes = {"steps": STEPS, "warmup_steps": 0, "decay_share": 0.0, "log_every": 1}
    return config.model_copy(update={**changes, "micro_batch": samples_at_once(config, devices)})
