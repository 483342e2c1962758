"""Safetensors files of tensors and JSON metadata, written whole or not at all, without pickle; copies to a device."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from prunekit.runtime.errors import UserError
from prunekit.runtime.files import replacing

FORMAT = 1
UNWAITED = ("cuda", "meta")  # devices to which `to_device` copies without a wait; meta stands for a GPU in tests


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on a device; a copy to a GPU goes through pinned memory, so that the host does not wait.

    A plain `.to` from the host's memory first waits for all work that is queued on the GPU.
    """
    device = torch.device(device)
    if tensor.device.type != "cpu" or device.type not in UNWAITED:
        return tensor.to(device)
    if device.type == "cuda":
        tensor = tensor.contiguous().pin_memory()  # the allocator keeps it until the copy is made
    return tensor.to(device, non_blocking=True)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    with replacing(path) as new:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, new, metadata)


def write_tensors(path: str | Path, what: str, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> Path:
    """Write tensors and JSON `metadata` as a file of kind `what`, creating its directory; returns the path."""
    path = Path(path)
    header = {"what": what, "format": str(FORMAT), "metadata": json.dumps(metadata, sort_keys=True)}
    save_tensors(path, tensors, header)
    return path


def read_tensors(path: str | Path, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the metadata of a file that `write_tensors` wrote.

    Raises:
        UserError: the file is of another kind, or in a format that this version does not know.
        FileNotFoundError: the file does not exist.

    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file of {what} at {path}")
    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
        if header.get("what") != what or header.get("format") != str(FORMAT):
            raise UserError(f"{path} is not a file of {what} in format {FORMAT}; its header says {header}")
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(header["metadata"])  # noqa: SIM118
