"""Work that several processes share through the file system: whoever comes first takes a piece, whoever dies frees it.

No process talks to another, so that one can be lost, or join late, without the rest noticing.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

POLL_SECONDS = 0.5  # between looks at pieces that others are making


@dataclass(frozen=True)
class Piece:
    """A piece of work: its result appears whole or not at all, and `done` says whether it is there."""

    name: str  # of its lock file
    done: Callable[[], bool]
    do: Callable[[], None]


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


def share(pieces: Sequence[Piece], locks: Path, wait: bool = True) -> None:
    """Do the pieces that are not done and that no other process is doing; with `wait`, return when all are done.

    locks: the folder of the lock files, the same for all processes. While it waits, a process takes over what the
    others leave when they die. An error in a piece is raised here; the pieces of other processes go on.
    """
    while True:
        taken = False
        for piece in pieces:
            if piece.done():
                continue
            with claimed(locks / f"{piece.name}.lock") as mine:
                if not mine:
                    taken = True
                elif not piece.done():
                    piece.do()
        if not (taken and wait):
            return
        time.sleep(POLL_SECONDS)
