"""Low-rank fine-tuning (LoRA, arXiv 2106.09685): train low-rank changes of frozen layers, then merge them.

peft adds a change to every linear layer and convolution, except to depthwise and other grouped convolutions, whose
changes it cannot merge. A merged model has its plain layers again, and is saved, sliced and compared like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from prunekit.core.axes import weight_of
from prunekit.runtime.errors import MissingPackageError
from prunekit.runtime.randomness import generator

ADAPTER = "recovery"
LAYERS = (nn.Linear, nn.Conv2d)


class LoraConfig(BaseModel):
    """Low-rank changes of a model's layers."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    rank: int = Field(16, gt=0, le=4096, description="Rank of each layer's change; the scale alpha / rank is 1.")
    learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate of the changes; unset: fine_tune.learning_rate."
    )


def require_peft() -> None:
    """Raise MissingPackageError if peft is not installed."""
    if find_spec("peft") is None:
        raise MissingPackageError(
            "fine_tune.lora needs peft; it comes with the extra `lora`: pip install 'prunekit[lora]'"
        )


def attach(model: nn.Module, config: LoraConfig, seed: int) -> None:
    """Freeze a model and add float32 low-rank changes, which start at zero, to its linear layers and convolutions.

    seed: keys the random first factor of each change; the second factor starts at zero.
    """
    require_peft()
    import peft

    targets = [name for name, module in model.named_modules() if _is_changed(module)]
    settings = peft.LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=targets)
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(generator(seed, ADAPTER).initial_seed())
        peft.inject_adapter_in_model(settings, model, adapter_name=ADAPTER)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
        parameter.requires_grad_("lora_" in name)


def num_changes(model: nn.Module, config: LoraConfig) -> int:
    """Return the number of parameters of a model's low-rank changes; the model may be on the meta device."""
    weights = (weight_of(module) for module in model.modules() if _is_changed(module))
    return sum(config.rank * (weight[0].numel() + len(weight)) for weight in weights)


def _is_changed(module: nn.Module) -> bool:
    """Return whether a layer gets a change; a grouped convolution gets none, because peft cannot merge it."""
    return isinstance(module, LAYERS) and getattr(module, "groups", 1) == 1


def merge(model: nn.Module) -> None:
    """Add a model's changes to the weights of its layers, in place, and put the plain layers back."""
    for parent, name, layer in list(_adapted(model)):
        layer.merge()
        setattr(parent, name, layer.get_base_layer())
    vars(model).pop("peft_config", None)


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Merge a model's changes inside the context; on exit, or if merging fails, restore the model, bit by bit."""
    adapted = list(_adapted(model))
    weights = [layer.get_base_layer().weight.detach().clone() for _, _, layer in adapted]
    try:
        for parent, name, layer in adapted:
            layer.merge()
            setattr(parent, name, layer.get_base_layer())
        yield
    finally:
        for (parent, name, layer), weight in zip(adapted, weights, strict=True):
            layer.merged_adapters.clear()
            layer.get_base_layer().weight.data.copy_(weight)
            setattr(parent, name, layer)


def _adapted(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yield each layer that has a change, with its parent and its name there."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for parent in model.modules():
        for name, layer in parent.named_children():
            if isinstance(layer, BaseTunerLayer):
                yield parent, name, layer
