"""Rows of a data set that are read from memory-mapped files on demand, so that memory holds only one batch."""

import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunekit.runtime.errors import UserError

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
}  # by their names in safetensors files


class Rows:
    """Rows that are read or computed on demand, with `shape`, `len()` and `rows[index]` as for a tensor (n, …).

    An index is an integer, a slice, or a tensor of integers or booleans; the result is float32 on the CPU. Subclasses
    implement `_take`.
    """

    def __init__(self, count: int, row_shape: tuple[int, ...]):
        self.shape = torch.Size((count, *row_shape))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Tensor:
        """Return the rows at an index; raise IndexError if the index is out of range."""
        if not isinstance(index, Tensor) or index.dtype == torch.bool:
            index = torch.arange(len(self))[index]
        flat = index.reshape(-1).long().cpu()
        if len(flat) and not -len(self) <= int(flat.min()) <= int(flat.max()) < len(self):
            raise IndexError(f"rows {int(flat.min())} to {int(flat.max())} were requested; there are {len(self)} rows")
        taken = self._take(torch.where(flat < 0, flat + len(self), flat))
        return taken.view((*index.shape, *self.shape[1:]))

    def _take(self, index: Tensor) -> Tensor:
        """Return the rows (k, …), float32, at the indices (k,), which are from 0 to len(self) - 1."""
        raise NotImplementedError


@dataclass(frozen=True)
class StoredTensor:
    """Dtype, shape and position of a tensor in a safetensors file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int  # bytes from the file's start


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file; raise ValueError if it is damaged or does not match the file."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise UserError(f"the header of {path} is truncated")
        header = json.loads(file.read(length))
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (start, stop) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if stop - start != dtype.itemsize * int(np.prod(shape)) or 8 + length + stop > size:
            raise UserError(f"{path} does not have the {shape} of {name} that its header names")
        tensors[name] = StoredTensor(dtype, shape, 8 + length + start)
    return tensors


class MappedRows(Rows):
    """The rows of one tensor that is split over several safetensors files, in the order of the files.

    Raises ValueError for files whose rows differ in shape or type, or that lack the tensor.
    """

    def __init__(self, paths: list[Path], name: str):
        self.name = name
        self._maps: list[mmap.mmap] = []
        self._arrays: list[np.ndarray] = []
        for path in paths:
            tensors = stored_tensors(path)
            if name not in tensors:
                raise UserError(f"{path} holds {', '.join(tensors)}, no {name}")
            tensor = tensors[name]
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            count = int(np.prod(tensor.shape))
            array = np.frombuffer(mapped, tensor.dtype, count, tensor.offset).reshape(tensor.shape)
            if self._arrays and (array.shape[1:], array.dtype) != (self._arrays[0].shape[1:], self._arrays[0].dtype):
                raise UserError(f"{path} has rows {array.shape[1:]} of {array.dtype}, unlike the files before it")
            self._maps.append(mapped)
            self._arrays.append(array)
            self._offsets = [*getattr(self, "_offsets", []), tensor.offset]
        self._ends = np.cumsum([len(array) for array in self._arrays])  # (files,)
        super().__init__(int(self._ends[-1]), self._arrays[0].shape[1:])

    def _take(self, index: Tensor) -> Tensor:
        wanted = index.numpy()
        files = np.searchsorted(self._ends, wanted, side="right")
        taken = torch.empty(len(wanted), *self.shape[1:])
        out = taken.numpy()
        order = np.argsort(files, kind="stable")
        parts = np.split(order, np.flatnonzero(np.diff(files[order])) + 1) if len(order) else []
        owners = [(int(files[places[0]]), places) for places in parts]
        for file, places in owners:
            self._announce(file, wanted[places] - self._start(file))
        for file, places in owners:
            out[places] = self._arrays[file][wanted[places] - self._start(file)]
            self._maps[file].madvise(mmap.MADV_DONTNEED)  # release this process's pages; they stay in the file cache
        return taken

    def _start(self, file: int) -> int:
        return int(self._ends[file]) - len(self._arrays[file])

    def _announce(self, file: int, rows: np.ndarray) -> None:
        """Tell the kernel to read all the rows ahead, with one request per row."""
        size = self._arrays[file].itemsize * int(np.prod(self.shape[1:]))
        for row in rows.tolist():
            start = self._offsets[file] + row * size
            first = start - start % mmap.PAGESIZE
            self._maps[file].madvise(mmap.MADV_WILLNEED, first, start + size - first)
