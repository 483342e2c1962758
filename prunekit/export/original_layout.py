"""Saving a model as a single file, with the names and layout in which models of its class were published.

diffusers reads such files (`from_single_file`) with a converter for each class. To invert the conversion, this module
runs the converter on tensors with the original names and numbered rows, and looks up where each row arrives. So the
written file is what diffusers reads, row for row; otherwise nothing is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor

from prunekit.core.registry import denoiser_of
from prunekit.export.original_names import NAMES
from prunekit.export.specification import KEY, common_specification, weights_hash
from prunekit.export.tiers import SINGLE_FILE, architecture_of
from prunekit.runtime.errors import UserError, first_line
from prunekit.runtime.tensors import save_tensors

FILE = "model.safetensors"
ENDINGS = (".weight", ".bias")


def save_single_file(model: ModelMixin, folder: Path) -> dict[str, Any]:
    """Save a model's weights in the original layout, and its config beside them; return the specification.

    Args:
        model: stock or pruned model.
        folder: folder for `config.json`, which diffusers' reader needs, and `model.safetensors`.

    Raises:
        UserError: a cut that no stock config expresses, or a class that diffusers cannot read from a single file.

    """
    stock: Any = denoiser_of(model).stock(model)
    if stock is None:
        raise UserError(
            "tier single-file is for models in their stock form, and no stock config expresses this cut; remove whole "
            "blocks alone (of Stable Diffusion 3 all but the last), or use tier class"
        )
    tensors = original_layout(stock)
    stock.save_config(folder)
    specification = common_specification(folder, SINGLE_FILE, architecture_of(model))
    specification["weights"] = weights_hash(tensors)
    save_tensors(folder / FILE, tensors, {"format": "pt", KEY: json.dumps(specification, sort_keys=True)})
    return specification


def original_layout(model: ModelMixin) -> dict[str, Tensor]:
    """Return a copy of a stock model's weights, with the names and the layout of the original code.

    Raises:
        UserError: a class that diffusers cannot read from a single file, or a model that its reader changes.

    """
    kind, state = type(model).__name__, model.state_dict()
    if kind not in NAMES or kind not in SINGLE_FILE_LOADABLE_CLASSES:
        raise UserError(f"tier single-file is for {', '.join(NAMES)}; of a {kind}, use tier stock")
    originals = {other: original for original, others in NAMES[kind].items() for other in others}
    parts: dict[str, list[str]] = {}
    for key in state:
        parts.setdefault(_original(key, originals), []).append(key)
    marks: dict[str, Tensor] = {}
    first: dict[str, int] = {}
    num_rows = 0
    for name, keys in parts.items():
        first[name], num_rows = num_rows, num_rows + sum(len(state[key]) for key in keys)
        marks[name] = torch.arange(first[name], num_rows).reshape(-1, *[1] * (state[keys[0]].dim() - 1))
    arrived = _converted(kind, marks, model)
    came_back = torch.cat([mark.flatten() for mark in arrived.values()]).sort()[0]
    lengths = {key: len(mark) for key, mark in arrived.items()}
    if lengths != {key: len(value) for key, value in state.items()} or not came_back.equal(torch.arange(num_rows)):
        raise UserError(f"diffusers' reader of single files does not give this {kind} back; use tier stock")
    tensors = {}
    for name, keys in parts.items():
        tensors[name] = state[keys[0]].new_empty(len(marks[name]), *state[keys[0]].shape[1:])
        for key in keys:
            rows = arrived[key].flatten() - first[name]
            assert rows.min() >= 0 and rows.max() < len(tensors[name]), f"{key} lies in another tensor than {name}"
            tensors[name][rows] = state[key].detach()
    return tensors


def _original(key: str, originals: Mapping[str, str]) -> str:
    """Return the name in `originals` of the tensor that holds the rows of the tensor `key`."""
    index = re.search(r"(?<=\.)\d+(?=\.)", key)  # index of the block
    template = key if index is None else f"{key[: index.start()]}*{key[index.end() :]}"
    for whole in (key, template):
        for ending in ("", *ENDINGS):
            if whole.endswith(ending) and (original := originals.get(whole.removesuffix(ending))) is not None:
                return original.replace("*", index[0] if index else "") + ending
    return key


def _converted(kind: str, marks: Mapping[str, Tensor], model: ModelMixin) -> dict[str, Tensor]:
    """Return the result of diffusers' converter for tensors with the original names."""
    convert: Any = SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"]
    try:
        return convert(checkpoint=dict(marks), config=dict(model.config))
    except (RuntimeError, KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"diffusers' reader of single files does not take this {kind}: {first_line(error)}; use tier stock"
        ) from error
