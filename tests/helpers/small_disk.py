"""A disk that gets full at a chosen file: a small file system of its own, or a limit on the size of files."""

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
def full_at(
    disk: SmallDisk | LimitedFiles, pattern: str, past: Collection[str] = (), left: int = LEFT
) -> Iterator[list[Path]]:
    """A context in which the disk gets full when the first file or folder that matches is about to be written.

    pattern: of fnmatch, from the disk's folder on. past: files at which it stays as it is, as `below` names them.
    left: bytes that the full disk still takes. Yields the list of the files that match, from the first on.
    """
    found, temporary_for = [], files.temporary_for

    def full_at_once(path: Path) -> Path:
        if fnmatch(str(path), f"{disk.folder}/{pattern}") and (found or below(disk, path) not in past):
            found.append(path)
            if len(found) == 1:
                disk.fill(left)
        return temporary_for(path)

    with pytest.MonkeyPatch.context() as patches:
        for module in (files, files):
            patches.setattr(module, "temporary_for", full_at_once)
        try:
            yield found
        finally:
            disk.free()


def below(disk: SmallDisk | LimitedFiles, path: Path) -> str:
    """Return a file's name from the disk's folder on, where each folder has its final name."""
    return re.sub(r"\.([^/]+)\.[0-9a-f]{8}\.tmp", r"\1", path.relative_to(disk.folder).as_posix())


def check_whole(directory: Path) -> None:
    """Every file that is there can be read, and none is hidden."""
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
    """A text without the line breaks of a narrow terminal."""
    return text.replace("\n", "").replace(" ", "")
