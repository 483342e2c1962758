"""Files that appear whole or not at all, and one error for a full disk; imports nothing heavy."""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

FREE_SPACE = "free some space and start again"
NO_ROOM = {  # errors of a write for which there is no room, and what helps
    errno.ENOSPC: FREE_SPACE,
    errno.EDQUOT: FREE_SPACE,
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or use another file system",
}
IN_WORDS = re.compile(r"(?:os error |code: )(\d+)")  # how safetensors says an error of the operating system
TEMPORARY = ".tmp"  # the ending of a file or folder that is being written


def temporary_for(path: Path) -> Path:
    """Return a hidden name beside `path` that no other process uses, here or on another machine."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file to write, which then becomes `path` in one step; a kill leaves the old file or the new one.

    It is alone in a hidden folder, so that what a library writes beside it (safetensors does) is as easy to find.
    """
    folder = temporary_for(path)
    try:
        with full_disk_named(path):
            folder.mkdir(parents=True)
            yield folder / "new"
            share_with_others(folder / "new")
            (folder / "new").replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Raise one error for a full disk, whichever library finds it: the operating system's, which names a file.

    The file is the one that the error names, the second one of a copy or a move, or `path`: Python's own error of a
    write names none, or a temporary one, and safetensors raises an error of its own.
    """
    try:
        yield
    except Exception as error:
        number = no_room(error)
        if number is None:
            raise
        file = str(getattr(error, "filename2", None) or getattr(error, "filename", None) or path)
        is_temporary = any(part.endswith(TEMPORARY) for part in Path(file).parts)
        name = str(path) if is_temporary else file
        raise OSError(number, f"{os.strerror(number)}: {NO_ROOM[number]}", name) from error


def no_room(error: BaseException) -> int | None:
    """Return the system's number of an error that says that the disk has no room for a file; None for any other."""
    from safetensors import SafetensorError

    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, SafetensorError) and (said := IN_WORDS.search(str(error))):
        number = int(said[1])
    return number if number in NO_ROOM else None


def share_with_others(path: Path) -> None:
    """Give a file, or all files in a folder, the rights of any new file: safetensors makes files private."""
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        file.chmod(0o666 & ~_umask())


@lru_cache(maxsize=1)
def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write a text atomically, in UTF-8."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8", errors=errors)
