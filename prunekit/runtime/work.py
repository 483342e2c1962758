"""Work that several processes share through the file system: whoever comes first takes a piece, whoever dies frees it.

No process talks to another, so that one can be lost, or join late, without the rest noticing.
"""

import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from prunekit.runtime.errors import UserError
from prunekit.runtime.processes import threads_of

T = TypeVar("T")
USERS = ".users"  # in a directory: a lock file for each process that works in it
POLL_SECONDS = 0.5  # between looks at pieces that others are making


@dataclass(frozen=True)
class Piece:
    """A piece of work: its result appears whole or not at all, and `done` says whether it is there."""

    name: str  # of its lock file
    done: Callable[[], bool]
    do: Callable[[], None]
    ready: Callable[[], bool] = lambda: True  # whether what it needs is there


Sharing = Callable[[Sequence[Piece]], None]  # makes pieces together with other processes, as `share` does


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Hold a lock file, and say whether this process has it; the lock goes with its process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@contextmanager
def occupied(folder: Path, enter: Callable[[bool], T], leave: Callable[[], None] = lambda: None) -> Iterator[T]:
    """Work in a directory as one of its users, from the first look at what it holds until the context ends.

    Args:
        folder: the directory; it is made where it is missing.
        enter: called with whether other processes work in the directory, while none can come or go; its result is
            the context's.
        leave: called when the last user leaves, while none can come.

    Raises:
        UserError: the directory was removed, or replaced by another, while this process worked in it.

    """
    users = folder / USERS
    mine = FileLock(users / f"{secrets.token_hex(8)}.user")
    path = Path(mine.lock_file)
    with _at_door(users):
        try:
            result = enter(any(map(is_held, users.glob("*.user"))))
            mine.acquire(timeout=0)
        except BaseException:
            _remove_if_unused(users)
            raise
    try:
        yield result
        if not path.exists():
            raise UserError(f"{folder} was removed while this process worked in it; start the command again")
    finally:
        mine.release()
        if users.is_dir():
            with _at_door(users):
                path.unlink(missing_ok=True)
                if not any(map(is_held, users.glob("*.user"))):
                    leave()
                    _remove_if_unused(users)


@contextmanager
def _at_door(users: Path) -> Iterator[None]:
    """Hold the lock that a process holds while it comes or goes, in a folder that the last user removes."""
    door = FileLock(users / "door")
    while not door.is_locked:
        with suppress(FileNotFoundError, FileExistsError):  # the folder is removed at this moment
            users.mkdir(parents=True, exist_ok=True)
            door.acquire()
    try:
        yield
    finally:
        door.release()


def refuse_foreign(folder: Path, is_ours: bool, what: str, option: str = "--output") -> None:
    """Raise UserError where a directory holds files and they are not those of what a command writes there.

    Empty folders are nobody's: a command that finds no room for its first file leaves some. what: what the command
    writes, in the error. option: by which the user chooses another directory.
    """
    if is_ours or not folder.is_dir():
        return
    files = (path for path in folder.rglob("*") if not path.is_dir())
    if any(path.parent != folder / USERS for path in files):
        raise UserError(f"{folder} is not empty and has no {what}; choose another directory with {option}")


def is_held(path: Path) -> bool:
    """Whether the process that made a lock file still lives; the file of a dead one is removed."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    path.unlink(missing_ok=True)
    lock.release()
    return False


def _remove_if_unused(users: Path) -> None:
    """Remove the folder of locks; a process that waits at the door then makes it anew."""
    if not list(users.glob("*.user")):
        shutil.rmtree(users, ignore_errors=True)


def take(piece: Piece, locks: Path) -> bool:
    """Do a piece unless it is done, and return True; return False where another process is doing it."""
    with claimed(locks / f"{piece.name}.lock") as mine:
        if mine and not piece.done():
            piece.do()
    return mine


def share(pieces: Sequence[Piece], locks: Path, wait: bool = True) -> None:
    """Do the pieces that are ready, not done, and not another process's; with `wait`, return when all are done.

    locks: the folder of the lock files, the same for all processes. While it waits, a process takes over what the
    others leave when they die. An error in a piece is raised here; the pieces of other processes go on.
    """
    while True:
        taken = False
        for piece in pieces:
            if piece.done():
                continue
            if not (piece.ready() and take(piece, locks)):
                taken = True
        if not (taken and wait):
            return
        time.sleep(POLL_SECONDS)


def share_and_tidy(pieces: Sequence[Piece], locks: Path) -> None:
    """Do the pieces as `share` does, wait until all are done, and remove their lock files.

    A process that still waits for one looks whether its piece is done before it does it, so none is made twice.
    """
    with threads_of(max(1, len(pieces))):  # not of those that are left, so that a resumed run computes the same
        share(pieces, locks)
    for piece in pieces:
        (locks / f"{piece.name}.lock").unlink(missing_ok=True)
