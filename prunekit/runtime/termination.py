"""SIGTERM as a request: what trains saves first, then the process leaves with a code that schedulers start again on."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: a failure that passes; to be tried again


@dataclass
class Termination:
    """Whether this process was asked to end, and whether something must be saved before it does."""

    requested: bool = False
    deferred: bool = False

    def leave(self) -> None:
        """Leave the process with the code to start it again on, and say so."""
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
    """A context in which SIGTERM ends the process by SystemExit(75): at once, or after what `deferred` protects.

    signals: those that do so, instead of SIGTERM alone.
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
    """A context in which SIGTERM only sets `requested`; whoever is in it saves, and then calls `leave`."""
    before, _termination.deferred = _termination.deferred, True
    try:
        yield _termination
    finally:
        _termination.deferred = before
