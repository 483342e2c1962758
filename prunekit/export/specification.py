"""The specification of an export, in the header of its safetensors files: its architecture and hashes.

The header stays with the weights, so that a changed config, or weights of another cut, are detected.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from prunekit.data.fingerprint import Fingerprint
from prunekit.runtime.errors import UserError
from prunekit.runtime.files import read_json, write_json
from prunekit.runtime.tensors import save_tensors

FORMAT = 1
KEY = "prunekit"  # key of the specification in the header
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
CONFIG = "config.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_FREE = ("auto_map",)  # not hashed: config entries about how a model is loaded


def config_hash(config: Mapping[str, Any]) -> str:
    """Return the hash of a config, as in its file, without private entries and `auto_map`."""
    entries = {key: value for key, value in config.items() if not key.startswith("_") and key not in _FREE}
    return Fingerprint(json.dumps(entries, sort_keys=True)).key()


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the hash of named tensors: names, types, shapes and bytes."""
    fingerprint = Fingerprint("weights")
    for name in sorted(tensors):
        value = tensors[name]
        fingerprint.add(name, str(value.dtype), tuple(value.shape)).add_tensor(value)
    return fingerprint.key()


def stamp(folder: Path, tier: str, architecture: Mapping[str, Any] | None) -> dict[str, Any]:
    """Write the specification into the header of every weight file of a folder; return it with the hashes by file.

    architecture: kept units and removed layers, as `pruning` in a pruned model's config; None for a dense model.
    The path that the model was loaded from is deleted from the config.
    """
    common = common_specification(folder, tier, architecture)
    hashes = {}
    for path in weight_files(folder):
        tensors = load_file(path)
        hashes[path.name] = weights_hash(tensors)
        specification_json = json.dumps({**common, "weights": hashes[path.name]}, sort_keys=True)
        save_tensors(path, tensors, {"format": "pt", KEY: specification_json})
    return {**common, "weights": hashes}


def common_specification(folder: Path, tier: str, architecture: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a specification without the weights' hash; delete the path of the loaded model from the config."""
    config = read_json(folder / CONFIG)
    config.pop("_name_or_path", None)
    write_json(folder / CONFIG, config)
    common = {"format": FORMAT, "version": version("prunekit"), "tier": tier, "architecture": architecture}
    return {**common, "config": config_hash(config)}


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model's folder; raise UserError if one is missing."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        names = {Path(name).name for name in read_json(folder / INDEX)["weight_map"].values()}
        if missing := sorted(name for name in names if not (folder / name).is_file()):
            raise UserError(f"{folder} lacks the weight file {missing[0]}, which {INDEX} names; copy it again")
        return [folder / name for name in sorted(names)]
    if pickles := sorted(path.name for pattern in PICKLES for path in folder.glob(pattern)):
        raise UserError(
            f"{folder} holds pickled weights ({pickles[0]}), which can run code and are not loaded; if you "
            "trust them, convert them to safetensors"
        )
    raise UserError(f"{folder} holds no weights: {WEIGHTS} is expected")


def read_outline(path: Path) -> tuple[dict[str, Any] | None, dict[str, tuple[int, ...]]]:
    """Return a weight file's specification, or None if it has none, and its tensors' shapes; read no weights.

    Raises:
        UserError: the file is truncated or not a safetensors file, or its specification has another format.

    """
    try:
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get(KEY)
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}); copy or export it again") from error
    if header is None:
        return None, shapes
    specification = _parsed(header)
    if specification.get("format") != FORMAT:
        raise UserError(
            f"{path} has a specification of format {specification.get('format')!r}; this version of prunekit reads "
            f"format {FORMAT}: use the version that wrote it, or a newer one"
        )
    return specification, shapes


def _parsed(header: str) -> dict[str, Any]:
    try:
        content = json.loads(header)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def read_tensors(path: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return copies of a weight file's tensors, so that a result does not depend on the file's memory layout."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return {name: _copy(value, dtype) for name, value in tensors.items()}


def _copy(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value.to(dtype if dtype is not None and value.is_floating_point() else value.dtype, copy=True)
