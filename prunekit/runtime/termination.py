"""SIGTERM as a request: training saves first; then the process exits with a status that makes schedulers restart it."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: a temporary failure; try again


@dataclass
class Termination:
    """Whether this process was asked to end, and whether something must be saved before it does."""

    requested: bool = False
    deferred: bool = False

    def leave(self) -> None:
        """Print how to resume, and exit with status 75, which asks for a restart."""
        print(
            f"prunekit: stopped by a signal; start the same command again to resume (status {REQUEUE})", file=sys.stderr
        )
        raise SystemExit(REQUEUE)


_termination = Termination()


def _handle(number: int, frame: FrameType | None) -> None:
    _termination.requested = True
    if not _termination.deferred:
        _termination.leave()


@contextmanager
def graceful(*signals: signal.Signals) -> Iterator[None]:
    """Let SIGTERM raise SystemExit(75) within the context: at once, or when a `deferred` context calls `leave`.

    signals: the signals that have this effect; by default SIGTERM alone.
    """
    before = {number: signal.signal(number, _handle) for number in signals or (signal.SIGTERM,)}
    _termination.requested = False
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[Termination]:
    """Let SIGTERM only set `requested` within the context; the code in the context then saves and calls `leave`."""
    before, _termination.deferred = _termination.deferred, True
    try:
        yield _termination
    finally:
        _termination.deferred = before
