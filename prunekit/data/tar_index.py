"""Indexes of WebDataset shards: the place of every part of every sample, and the captions; made once and cached."""

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from prunekit.data.bad_samples import MOST_BYTES
from prunekit.data.tar import members
from prunekit.runtime.files import write_text
from prunekit.runtime.work import Piece, share_and_tidy

FORMAT = 2  # of a cached index
MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")  # key and suffix; the key ends at the base name's first dot
Part = tuple[int, int]  # offset and bytes in the archive


@dataclass
class Shard:
    """The index of one archive: the place of every sample's parts, by key and suffix, in the archive's order."""

    path: Path
    parts: dict[str, dict[str, Part]] = field(default_factory=dict)
    repeated: list[tuple[str, str]] = field(default_factory=list)  # (key, suffix) of members that repeat another
    contents: dict[tuple[str, str], bytes] = field(default_factory=dict)  # of the parts that `index_shard` reads
    fault: str | None = None  # why the archive could not be read to its end


def index_shard(path: Path, read: tuple[str, ...] = ("txt",)) -> Shard:
    """Return the index of an archive; if the archive is damaged, the index of the part before the damage.

    read: suffixes of the parts whose contents are read, if they have at most MOST_BYTES. If several members have the
    same name, the first is used.
    """
    shard = Shard(path)
    if path.exists() and not path.is_file():  # a device or a pipe may have no end
        shard.fault = "is not a file"
        return shard
    try:
        with path.open("rb") as file:
            for member in members(file):
                matched = MEMBER.fullmatch(member.name)
                if matched:
                    _add(shard, matched[1], matched[2].lower(), (member.offset, member.size), file, read)
    except (tarfile.ReadError, OSError) as error:
        shard.fault = f"is truncated or damaged ({error})"
    if not shard.parts and shard.fault is None:
        shard.fault = "holds no sample"
    return shard


def _add(shard: Shard, key: str, suffix: str, part: Part, file: Any, read: tuple[str, ...]) -> None:
    parts = shard.parts.setdefault(key, {})
    if suffix in parts:
        shard.repeated.append((key, suffix))
        return
    parts[suffix] = part
    if suffix in read and part[1] <= MOST_BYTES:
        file.seek(part[0])
        shard.contents[key, suffix] = file.read(part[1])


def index_shards(shards: list[Path], read: tuple[str, ...], indexes: Path | None = None) -> Iterator[Shard]:
    """Yield the index of each archive, as `index_shard` returns it.

    indexes: folder that caches the indexes by the archive's path, size and modification time, so that an archive is
    opened once. Processes that use one folder share the work. A damaged archive is indexed again at every start.
    """
    if indexes is None:
        yield from (index_shard(path, read) for path in shards)
        return
    faulty: dict[Path, Shard] = {}

    def make(path: Path, file: Path) -> None:
        shard = index_shard(path, read)
        if shard.fault:
            faulty[path] = shard
            return
        for stale in file.parent.glob(f"{file.name.split('-')[0]}-*"):
            stale.unlink()
        write_text(file, json.dumps(_packed(shard)))

    def is_indexed(path: Path, file: Path) -> bool:
        return path in faulty or file.is_file()

    files = {path: indexes / _file_name(path, read) for path in shards}
    pieces = [
        Piece(f"index-{file.stem}", partial(is_indexed, path, file), partial(make, path, file))
        for path, file in files.items()
    ]
    share_and_tidy(pieces, indexes.parent / "locks")
    for path, file in files.items():
        yield faulty.get(path) or _unpacked(path, file) or index_shard(path, read)


def _file_name(path: Path, read: tuple[str, ...]) -> str:
    """Return the name of an archive's index file: a digest of path and `read`, and of size and modification time."""
    stat = path.stat() if path.exists() else None
    parts = ((str(path.absolute()), read), stat and (FORMAT, stat.st_size, stat.st_mtime_ns))
    return "-".join(hashlib.blake2b(repr(part).encode(), digest_size=8).hexdigest() for part in parts) + ".json"


def _packed(shard: Shard) -> dict[str, Any]:
    contents = [(*name, content.decode("utf-8", "surrogateescape")) for name, content in shard.contents.items()]
    return {"parts": shard.parts, "repeated": shard.repeated, "contents": contents}


def _unpacked(path: Path, file: Path) -> Shard | None:
    """Return the shard that `_packed` stored in a file; if the file is damaged, remove it and return None."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        parts = {
            key: {suffix: (place[0], place[1]) for suffix, place in places.items()}
            for key, places in content["parts"].items()
        }
        contents = {(key, suffix): text.encode("utf-8", "surrogateescape") for key, suffix, text in content["contents"]}
        return Shard(path, parts, [(key, suffix) for key, suffix in content["repeated"]], contents)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        file.unlink(missing_ok=True)
        return None
