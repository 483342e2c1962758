"""A disk that gets full at a chosen file: a small file system of its own, or a limit on the size of files."""

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import pytest

from prunekit.training import checkpoint

LEFT = 4096  # bytes that a full disk still takes, so that larger files are there in part
SIZE = "64m"
BALLAST = "ballast"  # the file that fills a disk


class SmallDisk:
    """A tmpfs of 64 MiB, which a ballast file fills. CalledProcessError or OSError where mounting is not allowed."""

    full = "No space left on device"

    def __init__(self, folder: Path):
        self.folder, self._ballast = folder, folder / BALLAST
        command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
        subprocess.run(command, check=True, capture_output=True)

    def fill(self, left: int = LEFT) -> None:
        """Leave no room but for some bytes."""
        status = os.statvfs(self.folder)
        with self._ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - left)

    def free(self) -> None:
        """Make room again."""
        self._ballast.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the file system."""
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True, capture_output=True)


class LimitedFiles:
    """Any folder; in its place a full disk is a limit on the size of this process's files, which all writers meet."""

    full = "File too large"

    def __init__(self, folder: Path):
        self.folder, self._before = folder, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, left: int = LEFT) -> None:
        """Let no file grow beyond some bytes."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (left, self._before[1]))

    def free(self) -> None:
        """Lift the limit."""
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)

    close = free


@contextmanager
def small_disk(folder: Path, kind: type = SmallDisk) -> Iterator[SmallDisk | LimitedFiles]:
    """A disk at `folder`; one of limited files where a file system cannot be mounted."""
    try:
        disk = kind(folder)
    except (subprocess.CalledProcessError, OSError):
        disk = LimitedFiles(folder)
    try:
        yield disk
    finally:
        disk.close()


@contextmanager
def full_at(disk: SmallDisk | LimitedFiles, pattern: str) -> Iterator[list[Path]]:
    """A context in which the disk gets full when the first file or folder that matches is about to be written.

    pattern: of fnmatch, from the disk's folder on. Yields the list of those files.
    """
    found, temporary_for = [], checkpoint.temporary_for

    def full_at_once(path: Path) -> Path:
        if fnmatch(str(path), f"{disk.folder}/{pattern}"):
            found.append(path)
            if len(found) == 1:
                disk.fill()
        return temporary_for(path)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(checkpoint, "temporary_for", full_at_once)
        try:
            yield found
        finally:
            disk.free()
