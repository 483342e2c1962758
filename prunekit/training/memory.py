"""How a training holds its UNets: activations recomputed or kept, the layout of convolutions, frozen weights' dtype."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from diffusers import ModelMixin
from torch import nn

from prunekit.precision import LOWER, resolve_precision
from prunekit.training.trainer import TrainerConfig

CAST = (nn.Conv2d, nn.Linear)  # whose weights autocast casts on every call; norms stay as they are


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
