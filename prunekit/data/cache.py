"""The encoded cache on disk: shards of rows, which any number of processes compute once and check at every start.

    DIRECTORY/latents-KEY/00000.safetensors …   the rows of a fixed range of pictures or captions
    DIRECTORY/latents-KEY/manifest.json         every shard's rows, bytes, checksum, and bad sources
    DIRECTORY/digests.jsonl, indexes/, locks/   helper files of the readers and writers; not part of the result

Shards are written atomically, and a shard's content depends on its range alone. So neither the number of processes nor
a killed process changes a byte.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor

from prunekit.data.rows import MappedRows, stored_tensors
from prunekit.runtime.digests import Digests, file_digest
from prunekit.runtime.errors import UserError
from prunekit.runtime.files import clear_killed, replacing, write_json
from prunekit.runtime.progress import console
from prunekit.runtime.work import Piece, share_and_tidy

FORMAT = 1
MANIFEST = "manifest.json"
RECORD = {"rows", "bytes", "blake2b", "bad"}  # fields of a shard's record in the manifest


@dataclass
class Batch:
    """The rows computed from a batch of sources, which are pictures or captions."""

    tensors: dict[str, Tensor]  # (n, …) each: one row per good source
    bad: dict[int, tuple[str, str]] = field(default_factory=dict)  # index of a bad source: (its name, the reason)
    sources: int = 0  # number of sources in the batch, with the bad ones


@dataclass(frozen=True)
class Part:
    """One kind of rows of a data set, such as latents: the function that computes the rows and their cache key."""

    kind: str
    key: str  # digest of everything that the rows depend on
    count: int  # number of sources, which are pictures or captions
    make: Callable[[range], Iterator[Batch]]
    precision: torch.dtype = torch.float32
    shard_size: int = 4096

    @property
    def ranges(self) -> dict[str, range]:
        """The source indices of every shard, by the name of the shard's file."""
        starts = range(0, self.count, self.shard_size)
        return {
            f"{number:05d}.safetensors": range(start, min(start + self.shard_size, self.count))
            for number, start in enumerate(starts)
        }

    @property
    def folder(self) -> str:
        """The name of the part's folder in a cache."""
        return f"{self.kind}-{self.key[:16]}"


def collect(batches: Iterator[Batch], most: int, precision: torch.dtype, progress: Callable[[int], None]) -> Batch:
    """Concatenate batches into one batch of at most `most` rows, in dtype `precision`."""
    whole, filled = Batch({}), 0
    for batch in batches:
        rows = 0
        for name, values in batch.tensors.items():
            rows = len(values)
            target = whole.tensors.setdefault(name, torch.empty(most, *values.shape[1:], dtype=precision))
            target[filled : filled + rows] = values
        filled += rows
        whole.bad |= batch.bad
        whole.sources += batch.sources
        progress(batch.sources)
    whole.tensors = {name: values[:filled] for name, values in whole.tensors.items()}
    return whole


class Manifest:
    """The records of the shards in a part's folder, in a JSON file that all processes share."""

    def __init__(self, folder: Path, key: str, lock: Path):
        self.path, self.key, self.lock = folder / MANIFEST, key, lock
        self._records: dict[str, dict[str, Any]] = {}
        self._read_at: tuple[int, ...] | None = None

    def records(self) -> dict[str, dict[str, Any]]:
        """Return each shard's record by file name; nothing if the file is missing, damaged, or of another key."""
        try:
            stat = self.path.stat()
            read_at = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if read_at != self._read_at:
                self._read_at, self._records = read_at, {}
                content = json.loads(self.path.read_text(encoding="utf-8"))
                if any(set(record) != RECORD for record in content.get("shards", {}).values()):
                    raise UserError("not a manifest of shards")
                if content["key"] == self.key and content["format"] == FORMAT:
                    self._records = dict(content["shards"])
                else:
                    _say(f"{self.path} is of another format or key; the folder is computed again")
        except FileNotFoundError:
            self._read_at, self._records = None, {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            _say(f"{self.path} cannot be read ({type(error).__name__}); the folder is computed again")
        return self._records

    def add(self, name: str, record: dict[str, Any]) -> None:
        """Add a shard's record to the file."""
        self.lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.lock):
            clear_killed(self.path)
            records = dict(sorted({**self.records(), name: record}.items()))
            write_json(self.path, {"format": FORMAT, "key": self.key, "shards": records})


class StoredPart:
    """A part in a cache's directory."""

    def __init__(self, part: Part, directory: Path, digests: Digests, verify: bool = False):
        self.part, self.digests, self.verify = part, digests, verify
        self.folder, self.locks = directory / part.folder, directory / "locks"
        self.manifest = Manifest(self.folder, part.key, self.locks / f"{part.folder}.lock")
        self._good: dict[str, dict[str, Any]] = {}  # records of the shards that passed the check
        self._told: set[str] = set()

    def is_whole(self) -> bool:
        """Return whether every shard is present and undamaged."""
        return all(self._is_good(name) for name in self.part.ranges)

    def complete(self, progress: Callable[[int], None]) -> None:
        """Compute the missing and damaged shards together with other processes, and wait until all are done."""
        pieces = [
            Piece(f"{self.part.folder}-{name}", partial(self._is_good, name), partial(self._make, name, progress))
            for name in self.part.ranges
        ]
        share_and_tidy(pieces, self.locks)
        self.manifest.lock.unlink(missing_ok=True)

    @property
    def bad(self) -> dict[int, tuple[str, str]]:
        """The sources without rows: {index: (name, reason)}."""
        records = self.manifest.records().values()
        return {int(source): (name, why) for record in records for source, (name, why) in record["bad"].items()}

    def rows(self) -> dict[str, MappedRows]:
        """Return the rows of every tensor, by the tensor's name."""
        paths = [self.folder / name for name, record in self.manifest.records().items() if record["bytes"] is not None]
        if not paths:
            return {}
        return {name: MappedRows(paths, name) for name in stored_tensors(paths[0])}

    def _is_good(self, name: str) -> bool:
        record = self.manifest.records().get(name)
        if record is None or self._good.get(name) == record:
            return record is not None
        fault = self._fault(self.folder / name, record)
        if fault is None:
            self._good[name] = record
        elif name not in self._told:
            self._told.add(name)
            _say(f"{self.folder / name} {fault}; it is computed again")
        return fault is None

    def _fault(self, path: Path, record: dict[str, Any]) -> str | None:
        if record["bytes"] is None:  # the shard has no file, only the list of its bad sources
            return None
        try:
            size = path.stat().st_size
            if size != record["bytes"]:
                return f"has {size:,} bytes of {record['bytes']:,}"
            if self.digests.of_file(path, self.verify) != record["blake2b"]:
                return "differs from the written file (checksum)"
            if any(tensor.shape[0] != record["rows"] for tensor in stored_tensors(path).values()):
                return f"does not hold {record['rows']:,} rows"
        except (OSError, ValueError, KeyError) as error:
            return f"cannot be read ({error})"
        return None

    def _make(self, name: str, progress: Callable[[int], None]) -> None:
        path, sources = self.folder / name, self.part.ranges[name]
        clear_killed(path)
        batch = collect(self.part.make(sources), len(sources), self.part.precision, progress)
        record: dict[str, Any] = {"rows": len(sources) - len(batch.bad), "bytes": None, "blake2b": None}
        if batch.tensors:
            with replacing(path) as new:
                save_file(batch.tensors, new)
                record |= {"bytes": new.stat().st_size, "blake2b": file_digest(new)}
                with new.open("rb") as file:
                    os.fsync(file.fileno())
            self.digests.learn(path, record["blake2b"])
        record["bad"] = {str(source): list(why) for source, why in sorted(batch.bad.items())}
        self.manifest.add(name, record)


def _say(text: str) -> None:
    console.print(f"cache: {text}", highlight=False, markup=False, soft_wrap=True)
