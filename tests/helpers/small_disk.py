"""A disk that becomes full at a chosen file: a small file system, or a limit on the size of files."""

import json
import os
import re
import resource
import subprocess
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from prunekit.runtime import files

LEFT = 4096  # bytes of free space on a full disk, so that larger files are written in part
SIZE = "64m"
BALLAST = "ballast"  # the file that fills a disk


class SmallDisk:
    """A tmpfs of 64 MiB, which a ballast file fills.

    Raises CalledProcessError or OSError if mounting is not allowed.
    """

    full = "No space left on device"

    def __init__(self, folder: Path):
        self.folder, self._ballast = folder, folder / BALLAST
        command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
        subprocess.run(command, check=True, capture_output=True)

    def fill(self, left: int = LEFT) -> None:
        """Fill the disk except for `left` bytes."""
        status = os.statvfs(self.folder)
        with self._ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - left)

    def free(self) -> None:
        """Free the space again."""
        self._ballast.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the file system."""
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True, capture_output=True)


class LimitedFiles:
    """Any folder, where a limit on the size of this process's files replaces a full disk; it affects all writers."""

    full = "File too large"

    def __init__(self, folder: Path):
        self.folder, self._before = folder, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, left: int = LEFT) -> None:
        """Limit files to `left` bytes."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (left, self._before[1]))

    def free(self) -> None:
        """Lift the limit."""
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)

    close = free


@contextmanager
def small_disk(folder: Path, kind: type = SmallDisk) -> Iterator[SmallDisk | LimitedFiles]:
    """Yield a disk at `folder`: a SmallDisk, or LimitedFiles if a file system cannot be mounted."""
    try:
        disk = kind(folder)
    except (subprocess.CalledProcessError, OSError):
        disk = LimitedFiles(folder)
    try:
        yield disk
    finally:
        disk.close()


@contextmanager
def full_at(
    disk: SmallDisk | LimitedFiles, pattern: str, past: Collection[str] = (), left: int = LEFT
) -> Iterator[list[Path]]:
    """Fill the disk when the first matching file or folder is about to be written; free it on exit.

    pattern: fnmatch pattern of the path relative to the disk's folder. past: files that are skipped, named by `below`.
    left: free bytes of the full disk. Yields the list of matching files, from the one that filled the disk on.
    """
    found, temporary_for = [], files.temporary_for

    def full_at_once(path: Path) -> Path:
        if fnmatch(str(path), f"{disk.folder}/{pattern}") and (found or below(disk, path) not in past):
            found.append(path)
            if len(found) == 1:
                disk.fill(left)
        return temporary_for(path)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(files, "temporary_for", full_at_once)
        try:
            yield found
        finally:
            disk.free()


def below(disk: SmallDisk | LimitedFiles, path: Path) -> str:
    """Return a file's path relative to the disk's folder, with the final names of temporary folders."""
    return re.sub(r"\.([^/]+)\.[0-9a-f]{8}\.tmp", r"\1", path.relative_to(disk.folder).as_posix())


def check_whole(directory: Path) -> None:
    """Check that every file can be read and that no file is hidden or temporary."""
    for path in directory.rglob("*"):
        assert not path.name.startswith(".") and path.suffix not in (".tmp", ".old"), path
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            assert all(isinstance(json.loads(line), dict) for line in path.read_text().splitlines())
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                assert list(file.keys())


def one_line(text: str) -> str:
    """Return a text without spaces and line breaks, as a narrow terminal adds line breaks."""
    return text.replace("\n", "").replace(" ", "")
