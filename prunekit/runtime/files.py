"""Files and folders that appear whole or not at all."""

import errno
import glob
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from prunekit.runtime.errors import UserError

FREE_SPACE = "free some space and start again"
NO_ROOM = {  # numbers of the errors of a write without room, and what the user can do
    errno.ENOSPC: FREE_SPACE,
    errno.EDQUOT: FREE_SPACE,
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or use another file system",
}
IN_WORDS = re.compile(r"(?:os error |code: )(\d+)")  # in a safetensors error: the operating system's number
TEMPORARY = ".tmp"  # the ending of a file or folder that is being written
ASIDE = ".old"  # the ending of a folder that is about to be replaced


def temporary_for(path: Path) -> Path:
    """Return a hidden name beside `path` that no other process uses, here or on another machine."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file to write, then move it to `path` in one step; a kill leaves the old file or the new one.

    The temporary file is in its own hidden folder, so that `clear_killed` also finds the files that a library, such as
    safetensors, writes beside it.
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
    """Replace any library's error for a full disk by one OSError that names a file and says what to do.

    The OSError names the target of a copy or a move, or else the file that the original error names. It names `path` if
    the original error names no file, as safetensors' error and Python's error of a write do, or names a temporary file.
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
    """Return the errno of an error that says that there is no room for a file; None for any other error."""
    from safetensors import SafetensorError

    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, SafetensorError) and (said := IN_WORDS.search(str(error))):
        number = int(said[1])
    return number if number in NO_ROOM else None


def share_with_others(path: Path) -> None:
    """Give a file, or all files in a folder, the default permissions of new files: safetensors makes files private."""
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


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """Yield a temporary folder, and move it to `directory` at the end; an error or an interrupt removes it.

    The folder's files get the default permissions of new files.

    Raises:
        UserError: the directory is not empty, or is a file.
        OSError: the disk is full; the error names a file or the directory.

    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} is not empty; give a new or empty directory")
    temporary = temporary_for(directory.absolute())
    try:
        with full_disk_named(directory):
            temporary.mkdir(parents=True)
            yield temporary
            share_with_others(temporary)
            if directory.exists():
                directory.rmdir()
            temporary.replace(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def clear_killed(path: Path) -> None:
    """Remove the temporary files that killed writers of `path` left; no other process may write `path` meanwhile."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{TEMPORARY}"):
        shutil.rmtree(left, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append one row to a JSON Lines file; if the disk has no room for the row, leave the file as it was."""
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


def write_folder(folder: Path, write: Any) -> None:
    """Call `write(temporary folder)`, then move that folder to `folder`; a kill leaves the old folder or the new one.

    Only one process at a time may write a folder, because the call removes the temporary folders of killed processes.
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
    """Put back the old folder that a killed process had moved aside; if the new folder is in place, remove the old."""
    for aside in sorted(folder.parent.glob(f".{glob.escape(folder.name)}.*{ASIDE}")):
        if folder.exists():
            shutil.rmtree(aside)
        else:
            aside.replace(folder)
