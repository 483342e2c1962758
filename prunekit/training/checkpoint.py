"""Checkpoints of a training: numbered folders of tensors and JSON."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunekit.runtime.files import ASIDE, read_json, restore_killed, write_folder, write_json


class Checkpoints:
    """The numbered checkpoints in a folder; only the last `keep` are kept."""

    def __init__(self, folder: Path, keep: int = 1):
        self.folder, self.keep = folder, keep

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Save the state after `step` steps atomically, and delete older checkpoints beyond `keep`."""

        def write(temporary: Path) -> None:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary / "state.safetensors")
            write_json(temporary / "state.json", {"step": step, **state})

        write_folder(self.folder / f"step-{step:08d}", write)
        for old in self._all()[: -self.keep]:
            shutil.rmtree(old)

    def latest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return (tensors, state with `step`) of the newest checkpoint, or None."""
        folders = self._all()
        if not folders:
            return None
        return load_file(folders[-1] / "state.safetensors"), read_json(folders[-1] / "state.json")

    def clear(self) -> None:
        """Remove all checkpoints, once their training has its result."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        for aside in self.folder.glob(f".step-*{ASIDE}"):
            restore_killed(self.folder / aside.name[1:].partition(".")[0])
        return sorted(self.folder.glob("step-*"))


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's state as tensors by the names `optimizer.INDEX.NAME`."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{index}.{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for index, entry in state.items()
        for name, value in entry.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load the tensors of `flatten_optimizer` into an optimizer; tensors with other names are ignored."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
