"""Checkpoints of a training, and folders that appear whole or not at all."""

import errno
import glob
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunekit.files import TEMPORARY, full_disk_named, replacing, share_with_others, temporary_for, write_text

ASIDE = ".old"  # the ending of a folder that is about to be replaced


def clear_killed(path: Path) -> None:
    """Remove what processes that were killed while they wrote `path` have left; the caller alone may write it now."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{TEMPORARY}"):
        shutil.rmtree(left, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


LOG = "log.jsonl"  # of a run: a row a step, and what was said


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append one row to a JSON Lines log; of a row that the disk has no room for nothing is left."""
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        line = (json.dumps(row) + "\n").encode()
        try:
            with full_disk_named(path):
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    with replacing(path) as new:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, new, metadata)


def write_folder(folder: Path, write: Any) -> None:
    """Call `write(temporary folder)`, then move it to `folder`; a kill leaves the old folder or the new one.

    One process at a time may write a folder: what a killed one left half-written is removed.
    """
    restore_killed(folder)
    clear_killed(folder)
    temporary = temporary_for(folder)
    aside = temporary.with_suffix(ASIDE)
    try:
        with full_disk_named(folder):
            temporary.mkdir(parents=True)
            write(temporary)
            share_with_others(temporary)
            if folder.exists():
                folder.replace(aside)
            temporary.replace(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, Exception):
            restore_killed(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def restore_killed(folder: Path) -> None:
    """Put back what a process had moved aside when it was killed, before its new folder was in place."""
    for aside in sorted(folder.parent.glob(f".{glob.escape(folder.name)}.*{ASIDE}")):
        if folder.exists():
            shutil.rmtree(aside)
        else:
            aside.replace(folder)


class Checkpoints:
    """The numbered checkpoints below a folder; the last `keep` stay."""

    def __init__(self, folder: Path, keep: int = 1):
        self.folder, self.keep = folder, keep

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Save the state after `step` steps; atomic."""

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
        """Remove them all: the training they served has its result."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        for aside in self.folder.glob(f".step-*{ASIDE}"):
            restore_killed(self.folder / aside.name[1:].partition(".")[0])
        return sorted(self.folder.glob("step-*"))


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's state as `optimizer.INDEX.NAME` tensors."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{index}.{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for index, entry in state.items()
        for name, value in entry.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put `flatten_optimizer`'s tensors back."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
