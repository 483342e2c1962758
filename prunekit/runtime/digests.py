"""Content digests of files, cached by path, size and modification time, so that unchanged files are not read again."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prunekit.runtime.files import append_row
from prunekit.runtime.work import Piece, share_and_tidy

GROUP_FILES = 1024  # consecutive small files share one entry, so that millions of pictures need thousands of entries
GROUP_BYTES = 64 * 2**20
READ_BYTES = 2**20


@dataclass(frozen=True)
class FileGroup:
    """Consecutive files of a list, and a stamp that differs after a file has changed."""

    files: tuple[str, ...]
    stamp: str  # digest of all files' absolute paths, sizes and modification times

    def digest(self) -> str:
        """Read the files; return the digest of a single file, or the digest of several files' digests."""
        digests = [file_digest(file) for file in self.files]
        return (
            digests[0] if len(digests) == 1 else hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()
        )


class Digests:
    """Digests of files' contents, cached in `digests.jsonl` of a directory; without a directory, nothing is cached.

    Several processes may use one directory: they share the reading, and each uses the digests that the others found.
    """

    def __init__(self, directory: Path | None = None):
        self.directory = directory
        self._known: dict[str, str] = {}  # stamp: digest
        self._read = 0  # bytes of `digests.jsonl` that were read

    def of(self, files: Sequence[str]) -> list[str]:
        """Return one digest of contents per group of files (see `file_groups`); the files' paths do not affect it.

        A missing file counts as empty.
        """
        groups = file_groups(files)
        if self.directory is None:
            return [group.digest() for group in groups]

        def known(group: FileGroup) -> bool:
            return self._find(group) is not None

        def learn(group: FileGroup) -> None:
            self._remember(group, group.digest())

        pieces = [Piece(f"digest-{group.stamp}", partial(known, group), partial(learn, group)) for group in groups]
        share_and_tidy(pieces, self.directory / "locks")
        return [self._find(group) or group.digest() for group in groups]

    def of_file(self, path: Path, verify: bool = False) -> str:
        """Return the digest of one file's content; with `verify`, read the file even if its digest is cached.

        Processes do not share this work: several that call it at once may all read the file.
        """
        (group,) = file_groups([str(path)])
        known = None if verify else self._find(group)
        return known or self.learn(path, group.digest())

    def learn(self, path: Path, digest: str) -> str:
        """Cache the digest of a file that was just written or read; return the digest."""
        if self.directory is not None:
            self._remember(file_groups([str(path)])[0], digest)
        return digest

    def _find(self, group: FileGroup) -> str | None:
        self._refresh()
        return self._known.get(group.stamp)

    def _refresh(self) -> None:
        """Read the lines that `digests.jsonl` gained since the last call; skip damaged lines."""
        if self.directory is None:
            return
        path = self.directory / "digests.jsonl"
        size = path.stat().st_size if path.is_file() else 0
        if size < self._read:
            self._known, self._read = {}, 0
        if size == self._read:
            return
        with path.open("rb") as file:
            file.seek(self._read)
            whole, end, _ = file.read().rpartition(b"\n")
        self._read += len(whole) + len(end)
        for line in whole.splitlines():
            with suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                self._known[str(row["stamp"])] = str(row["digest"])

    def _remember(self, group: FileGroup, digest: str) -> None:
        assert self.directory is not None
        self.directory.mkdir(parents=True, exist_ok=True)
        row = {"first": group.files[0], "files": len(group.files), "stamp": group.stamp, "digest": digest}
        append_row(self.directory / "digests.jsonl", row)


def file_groups(files: Sequence[str]) -> list[FileGroup]:
    """Return consecutive files in groups; a group ends at 1,024 files, or once its files' sizes add up to 64 MiB."""
    groups: list[FileGroup] = []
    group_files: list[str] = []
    stats: list[tuple[str, int, int]] = []
    total = 0
    for number, file in enumerate(files, 1):
        try:
            stat = Path(file).stat()
            size, changed = stat.st_size, stat.st_mtime_ns
        except OSError:
            size, changed = 0, 0
        group_files.append(file)
        stats.append((str(Path(file).absolute()), size, changed))
        total += size
        if total >= GROUP_BYTES or len(group_files) == GROUP_FILES or number == len(files):
            groups.append(
                FileGroup(tuple(group_files), hashlib.blake2b(repr(stats).encode(), digest_size=16).hexdigest())
            )
            group_files, stats, total = [], [], 0
    return groups


def file_digest(path: str | Path) -> str:
    """Return the digest of a file's content, 32 hexadecimal digits; a missing file counts as empty."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with Path(path).open("rb") as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
    except FileNotFoundError:
        pass
    return digest.hexdigest()
