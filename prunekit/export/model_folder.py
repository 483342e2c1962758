"""Loading a denoiser from a folder that is checked before a weight is used; every fault raises UserError."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors.torch import load_file

from prunekit.core.emptied import state_in_files
from prunekit.core.registry import denoiser_of
from prunekit.core.slicing import backbone_of, slice_member
from prunekit.core.timesteps import TimestepModel, read_bins, slice_folder
from prunekit.export.specification import (
    CONFIG,
    config_hash,
    read_outline,
    read_tensors,
    weight_files,
    weights_hash,
)
from prunekit.models.names import read_object
from prunekit.models.shapes import unet_from_config
from prunekit.runtime.errors import UserError


def load_denoiser(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    verify: bool = False,
) -> ModelMixin:
    """Load a stock or pruned denoiser from a folder, in evaluation mode with frozen weights.

    A folder of slices for bins of timesteps gives a `TimestepModel`.

    Args:
        folder: folder that prunekit or diffusers saved.
        dtype: dtype of the weights; by default, the dtype in the files.
        device: device of the weights.
        verify: also hash the weights, which reads them a second time.

    Raises:
        UserError: the folder has no config or no weights, pickled weights, a truncated file, a changed config or one
            of a newer format, or weights of another model or architecture.

    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is not the folder of a UNet or transformer: it has no {CONFIG}")
    if (bins := read_bins(folder)) is not None:
        slices = [load_denoiser(slice_folder(folder, index), dtype, device, verify) for index in range(len(bins))]
        return TimestepModel(slices, bins).eval().requires_grad_(False)
    if (backbone := backbone_of(folder)) is not None:
        dense = load_denoiser(backbone, dtype, device, verify)
        kind: Any = denoiser_of(dense).pruned_class()
        return slice_member(kind, dense, folder).eval().requires_grad_(False)
    config = read_object(folder / CONFIG)
    files = weight_files(folder)
    model = unet_from_config({key: value for key, value in config.items() if key != "auto_map"}, folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        specification, file_shapes = read_outline(path)
        shapes |= file_shapes
        if specification is not None:
            _check_specification(folder, config, specification)
    check_shapes(folder, model, shapes)
    state: dict[str, torch.Tensor] = {}
    for path in files:
        specification = read_outline(path)[0] if verify else None
        if specification is not None and weights_hash(load_file(path)) != specification["weights"]:
            raise UserError(f"the weights in {path} differ from the exported ones (hash)")
        state |= read_tensors(path, dtype)
    model.load_state_dict(state, assign=True)
    denoiser_of(model).fill_tables(model)
    return model.to(device).eval().requires_grad_(False)


def num_weights(folder: str | Path) -> int:
    """Return the number of weights that `load_denoiser` would load, from the folder's file headers and config."""
    folder = Path(folder)
    if (bins := read_bins(folder)) is not None:
        return sum(num_weights(slice_folder(folder, index)) for index in range(len(bins)))
    if backbone_of(folder) is not None:
        config = {key: value for key, value in read_object(folder / CONFIG).items() if key != "auto_map"}
        return sum(parameter.numel() for parameter in unet_from_config(config, folder).parameters())
    shapes = (shape for path in weight_files(folder) for shape in read_outline(path)[1].values())
    return sum(math.prod(shape) for shape in shapes)


def _check_specification(folder: Path, config: Mapping[str, Any], specification: Mapping[str, Any]) -> None:
    pruning = config.get("pruning")
    if specification["tier"] != "stock" and pruning != specification["architecture"]:
        raise UserError(
            f"the architecture in {folder / CONFIG} does not match the weights beside it; the file was changed, "
            "or comes from another export: copy both again"
        )
    if config_hash(config) != specification["config"]:
        raise UserError(f"{folder / CONFIG} was changed after its weights were written; copy both again")


def check_shapes(folder: Path, model: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError, with the first difference, if the files' tensors do not match the model's."""
    expected = {name: tuple(value.shape) for name, value in state_in_files(model).items()}
    faults = [f"they lack {name}" for name in expected if name not in shapes]
    faults += [f"they have {name}, which the model does not have" for name in shapes if name not in expected]
    faults += [
        f"{name} is {shapes[name]} there and {expected[name]} in the model"
        for name in expected
        if name in shapes and shapes[name] != expected[name]
    ]
    if faults:
        rest = f" ({len(faults)} differences in all)" if len(faults) > 1 else ""
        raise UserError(f"the weights in {folder} do not belong to its config's model: {faults[0]}{rest}")
