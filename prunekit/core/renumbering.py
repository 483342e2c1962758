"""The stock form of a model that lost whole layers: the dense class with fewer layers, which get new indices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .denoiser import Structure
from .slicing import share_tables


def rebuilt(
    structure: Structure, dense: Any, config: Mapping[str, Any], sources: Mapping[str, str], model: nn.Module
) -> Any | None:
    """Return a pruned model in its dense class, with the same function and a copy of the weights.

    Works on the meta device. The result has the model's dtype, device, training mode, frozen parameters and attention
    processors. Returns None if the shapes differ: a width is cut, or a layer is missing that every config has.

    Args:
        structure: description of the model.
        dense: the model's dense class.
        config: config of the result.
        sources: by the path of a module in the result, its path in the model. Together these modules hold all weights,
            except the parameters that lie directly in the model.
        model: the pruned model.

    """
    state = {key: tensor for key, tensor in model.state_dict().items() if "." not in key}
    for path, source in sources.items():
        part = model.get_submodule(source).state_dict()
        state |= {f"{path}.{key}": tensor for key, tensor in part.items()}
    with torch.device("meta"):
        stock = dense(**config)
    if _shapes(stock.state_dict()) != _shapes(state):
        return None
    stock.load_state_dict(state, assign=True)
    share_tables(structure, model, stock)
    originals = {name: parameter for name, parameter in model.named_parameters() if "." not in name}
    for path, source in sources.items():
        module, original = stock.get_submodule(path), model.get_submodule(source)
        originals |= {f"{path}.{name}": parameter for name, parameter in original.named_parameters()}
        for submodule, counterpart in zip(module.modules(), original.modules(), strict=True):
            if hasattr(submodule, "set_processor"):
                submodule.set_processor(counterpart.processor)
    for name, parameter in stock.named_parameters():
        parameter.data = parameter.data.clone()
        parameter.requires_grad_(originals[name].requires_grad)
    return stock.train(model.training)


def fewer_layers(
    config: dict[str, Any],
    live: Mapping[str, list[int]],
    counts: Sequence[str],
    indices: Sequence[str],
) -> dict[str, Any] | None:
    """Return a config with only the blocks that stay; None if no config of the dense class can express them.

    Args:
        config: the dense model's config; it may be changed.
        live: by the path of a list of blocks, the indices of those that stay.
        counts: the settings that hold the number of blocks of each list, in the order of `live`; lists may share one.
        indices: settings that hold indices of blocks in the first list.

    """
    stated: dict[str, int] = {}
    if len(counts) != len(live):
        return None
    for setting, kept in zip(counts, live.values(), strict=True):
        if setting not in config or stated.setdefault(setting, len(kept)) != len(kept):
            return None
    first = next(iter(live.values()))
    for setting in indices:
        named = config.get(setting) or ()
        config[setting] = tuple(new for new, old in enumerate(first) if old in named)
    return {**config, **stated}


def _shapes(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in state.items()}
