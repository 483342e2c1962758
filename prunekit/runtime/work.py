"""Work that several processes share through lock files: the first process that locks a piece does it.

Processes do not communicate in any other way, so one may die or join late without an effect on the others. The locks
of a process that dies are released.
"""

import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from prunekit.runtime.errors import UserError
from prunekit.runtime.processes import current, threads_of

T = TypeVar("T")
USERS = ".users"  # folder in a shared directory, with a lock file for each process that works there
POLL_SECONDS = 0.5  # between checks of pieces that other processes are doing


@dataclass(frozen=True)
class Piece:
    """A piece of work: its result appears whole or not at all, and `done` says whether it is there."""

    name: str  # of its lock file
    done: Callable[[], bool]
    do: Callable[[], None]
    ready: Callable[[], bool] = lambda: True  # whether the inputs of the piece are there


Sharing = Callable[[Sequence[Piece]], None]  # does pieces together with other processes, as `share` does


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Try to hold a lock file within the context; yield whether it succeeded. A process that dies frees its locks."""
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
    """Register this process as a user of a directory until the context ends; yield the result of `enter`.

    Args:
        folder: the directory; it is created if it is missing.
        enter: called at the start, with whether other processes use the directory; meanwhile no process can start or
            stop using it.
        leave: called at the end if no other process uses the directory; meanwhile no process can start using it.

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
    """Hold the lock that a process needs to enter or leave a directory; the last user removes the lock's folder."""
    door = FileLock(users / "door")
    while not door.is_locked:
        with suppress(FileNotFoundError, FileExistsError):  # another process is just removing the folder
            users.mkdir(parents=True, exist_ok=True)
            door.acquire()
    try:
        yield
    finally:
        door.release()


def refuse_foreign(folder: Path, is_ours: bool, what: str, option: str = "--output") -> None:
    """Raise UserError if a directory holds files that do not come from the command that wants to write there.

    Empty folders are allowed, since a command that finds no room for its first file leaves some.

    Args:
        folder: the directory.
        is_ours: whether the directory holds files of the command.
        what: name of the command's result, for the error.
        option: option with which the user chooses another directory, for the error.

    """
    if is_ours or not folder.is_dir():
        return
    files = (path for path in folder.rglob("*") if not path.is_dir())
    if any(path.parent != folder / USERS for path in files):
        raise UserError(f"{folder} is not empty and has no {what}; choose another directory with {option}")


def is_held(path: Path) -> bool:
    """Return whether a process still holds a lock file; remove the file if none does."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    path.unlink(missing_ok=True)
    lock.release()
    return False


def _remove_if_unused(users: Path) -> None:
    """Remove the folder of locks if it has no users; a process that waits to enter then creates the folder again."""
    if not list(users.glob("*.user")):
        shutil.rmtree(users, ignore_errors=True)


def take(piece: Piece, locks: Path) -> bool:
    """Do a piece unless it is done, and return True; return False where another process is doing it."""
    with claimed(locks / f"{piece.name}.lock") as mine:
        if mine and not piece.done():
            piece.do()
    return mine


def share(pieces: Sequence[Piece], locks: Path, wait: bool = True) -> None:
    """Do the pieces that are ready, not done, and not locked by another process; with `wait`, return when all are done.

    While it waits, this process takes over the pieces of processes that die. The error of a piece that this process
    does is raised here; other processes continue with their pieces.

    locks: folder of the lock files, the same for all processes.
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


def do_together(piece: Piece, locks: Path) -> None:
    """Do a piece with all processes of this launch; if another launch is doing it, wait until it is done.

    All processes call this function. The main process holds the lock file that `share` uses too, and its view of the
    directory counts.
    """
    processes = current()
    while not processes.agree(piece.done()):
        with ExitStack() as stack:
            is_mine = processes.is_main and stack.enter_context(claimed(locks / f"{piece.name}.lock"))
            if not processes.agree(is_mine):
                time.sleep(POLL_SECONDS)
            elif not processes.agree(piece.done()):
                piece.do()


def share_and_tidy(pieces: Sequence[Piece], locks: Path) -> None:
    """Do the pieces as `share` does, wait until all are done, and remove their lock files.

    A process that locks a piece checks whether it is done before doing it, so no piece is done twice.
    """
    with threads_of(max(1, len(pieces))):  # finished pieces count too, so that a resumed run computes the same
        share(pieces, locks)
    for piece in pieces:
        (locks / f"{piece.name}.lock").unlink(missing_ok=True)
