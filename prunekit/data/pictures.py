"""Compressed pictures that stay on disk: sequences that read a picture's bytes on demand."""

import hashlib
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from prunekit.data.bad_samples import DataError, printable, read_file
from prunekit.data.tar import members


class Pictures(Sequence):
    """Pictures by file and place in the file; no picture is in memory.

    files: paths of the files that hold the pictures. places: (n, 3) int64, each picture's index in `files` and two
    numbers that say where in the file it is; each subclass defines these numbers.
    """

    def __init__(self, files: list[str], places: np.ndarray):
        self.files, self.places = files, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        """Return the picture's bytes, empty if its file has none; raise DataError if they cannot be read."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        file, first, second = self.places[index].tolist()
        try:
            return self._read(self.files[file], first, second)
        except OSError as error:
            raise DataError(f"cannot be read ({self.files[file]}: {error.strerror or error})") from error

    def take(self, indices: list[int]) -> "Pictures":
        """Return the pictures with these indices, in this order."""
        return type(self)(self.files, self.places[np.asarray(indices, dtype=np.int64)])

    def where(self, index: int) -> tuple[str, str]:
        """Return (a picture's name for messages, its file)."""
        raise NotImplementedError

    def file_of(self, index: int) -> str:
        """Return the file that holds a picture."""
        return self.files[int(self.places[index, 0])]

    def identity(self) -> tuple[Any, ...]:
        """Return values that identify the pictures, together with the contents of their files."""
        return (hashlib.blake2b(self.places.tobytes(), digest_size=16).hexdigest(),)

    def _read(self, file: str, first: int, second: int) -> bytes:
        raise NotImplementedError


class FilePictures(Pictures):
    """Pictures that are files, or members of uncompressed tar archives; a place is (offset, size), in bytes."""

    def where(self, index: int) -> tuple[str, str]:
        """Return (a picture's name for messages, its file); in an archive the name is SHARD:MEMBER."""
        file, offset, _ = self.places[index].tolist()
        path = Path(self.files[file])
        if path.suffix != ".tar":
            return printable(path.name), str(path)
        return printable(f"{path.name}:{_member_names(path).get(offset, offset)}"), str(path)

    def _read(self, file: str, first: int, second: int) -> bytes:
        with Path(file).open("rb") as opened:
            opened.seek(first)
            content = opened.read(second)
        if len(content) < second:
            raise DataError(f"cannot be read ({file} ends before byte {first + second})")
        return content


@lru_cache(maxsize=1)
def _member_names(path: Path) -> dict[int, str]:
    """Return the names of an archive's members by content offset; cached, as bad pictures are named shard by shard."""
    names: dict[int, str] = {}
    with suppress(tarfile.ReadError, OSError), path.open("rb") as file:
        names.update((member.offset, member.name) for member in members(file))
    return names


class ParquetPictures(Pictures):
    """Pictures in a column of Parquet files; a place is (row group, row in the group). The last group is cached."""

    def __init__(self, files: list[str], places: np.ndarray, column: str = "image"):
        super().__init__(files, places)
        self.column = column
        self._group: tuple[Any, Any] = (None, None)  # (file, row group), values

    def identity(self) -> tuple[Any, ...]:
        """Return the identity as in Pictures, and the column's name."""
        return (*super().identity(), self.column)

    def take(self, indices: list[int]) -> "ParquetPictures":
        """Return the pictures with these indices, in this order."""
        return ParquetPictures(self.files, self.places[np.asarray(indices, dtype=np.int64)], self.column)

    def where(self, index: int) -> tuple[str, str]:
        """Return (a picture's name for messages, its file); the name counts the row within its row group."""
        file, group, row = self.places[index].tolist()
        name = printable(Path(self.files[file]).name)
        return f"{name}: row {row} of row group {group}", self.files[file]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_group": (None, None)}

    def _read(self, file: str, first: int, second: int) -> bytes:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._group[0] != (file, first):
            try:
                with pq.ParquetFile(file) as opened:
                    values = opened.read_row_group(first, columns=[self.column]).column(self.column)
            except (pa.ArrowException, OSError, KeyError) as error:
                raise DataError(f"cannot be read ({file}, row group {first}: {error})") from error
            self._group = ((file, first), values)
        try:
            value = self._group[1][second].as_py()
        except ValueError as error:  # for example a text that is not UTF-8
            raise DataError(f"cannot be read ({file}: {error})") from error
        path: Any = None
        if isinstance(value, dict):
            path = value.get("path")
            value = value.get("bytes")
        if value is None and path and isinstance(path, str):
            try:
                value = read_file(Path(file).parent / path)
            except DataError as error:
                raise DataError(f"cannot be read ({error})") from error
        if not isinstance(value, bytes | None):
            raise DataError(f"cannot be read (it is of type {type(value).__name__}, not bytes)")
        return value or b""
