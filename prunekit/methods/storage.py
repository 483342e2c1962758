"""Named tensors with JSON beside them in one safetensors file: no pickle, and complete or absent."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from prunekit.errors import UserError
from prunekit.training.checkpoint import save_tensors

FORMAT = 1


def write_tensors(path: str | Path, what: str, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> Path:
    """Write tensors and JSON `metadata` as a file of kind `what`, creating its directory; returns the path."""
    path = Path(path)
    header = {"what": what, "format": str(FORMAT), "metadata": json.dumps(metadata, sort_keys=True)}
    save_tensors(path, tensors, header)
    return path


def read_tensors(path: str | Path, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file that `write_tensors` wrote.

    Raises:
        ValueError: a file of another kind, or of a format that this version does not know.
        FileNotFoundError: no such file.

    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file of {what} at {path}")
    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
        if header.get("what") != what or header.get("format") != str(FORMAT):
            raise UserError(f"{path} is not a file of {what} in format {FORMAT}; its header says {header}")
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(header["metadata"])  # noqa: SIM118
