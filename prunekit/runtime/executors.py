"""Executors do independent pieces of work: in the processes that share a directory, or on a Ray cluster.

The caller builds a list of pieces from objects that it has already loaded. The list comes with a `Call`, a function's
name and JSON arguments, from which another node builds the same list. Only the call is sent; no model is pickled.
"""

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from prunekit.runtime.progress import Log
from prunekit.runtime.work import Piece, share, take

SETTING = "engine"  # name of the setting in recipes and commands


@dataclass(frozen=True)
class Call:
    """A function's name, "module:function", and its JSON arguments; the function builds lists of pieces on any node.

    The function's first argument is a `OnePiece`. It calls `OnePiece.map` with the same list of pieces that
    `Executor.map` received together with this call.
    """

    function: str
    arguments: dict[str, Any]

    @classmethod
    def of(cls, function: Callable[..., None], **arguments: Any) -> "Call":
        """Return the call of a module's function."""
        return cls(f"{function.__module__}:{function.__qualname__}", arguments)

    def __call__(self, executor: "OnePiece") -> None:
        """Call the function in this process, with `executor` as its first argument."""
        module, _, name = self.function.partition(":")
        getattr(importlib.import_module(module), name)(executor, **self.arguments)


class Executor(Protocol):
    """An object that does lists of pieces; only one process at a time does a piece, and holds the piece's lock file."""

    def map(self, pieces: Sequence[Piece], locks: Path, call: Call, wait: bool = True) -> None:
        """Do the pieces that are not done; raise the error of a piece that fails.

        Args:
            pieces: the list; the result of each piece appears whole or not at all.
            locks: folder of the pieces' lock files, which all processes and nodes see.
            call: builds the same list on another node.
            wait: whether to wait for the pieces that another command is doing.

        """

    def together(self) -> AbstractContextManager[Any]:
        """Return a context in which the executor may collect lists and do them together; it ends when all are done."""


class LocalExecutor:
    """Executor for processes that share a directory, on one machine or several; they share work by lock files alone."""

    def map(self, pieces: Sequence[Piece], locks: Path, call: Call, wait: bool = True) -> None:
        """Do the pieces as `share` does."""
        share(pieces, locks, wait)

    def together(self) -> AbstractContextManager[Any]:
        """Return a context without effect: `map` does each list at once."""
        return nullcontext()


class OnePiece:
    """The executor that a call receives on another node: it does one piece of the call's list, and no other piece.

    Attributes:
        log: receives the lines and rows of the call.

    """

    def __init__(self, name: str, position: int, log: Log):
        self.log, self._name, self._position = log, name, position
        self._done: list[bool] = []  # for each list that has the piece (there is one): whether this process did it

    def map(self, pieces: Sequence[Piece], locks: Path, call: Call | None = None, wait: bool = True) -> None:
        """Do the piece, if it is in this list."""
        if self._position < len(pieces) and pieces[self._position].name == self._name:
            self._done.append(take(pieces[self._position], locks))

    @property
    def taken(self) -> bool:
        """Whether this process left the piece because another process was doing it."""
        assert len(self._done) == 1, f"piece {self._position}, {self._name}, is in {len(self._done)} lists of the call"
        return not self._done[0]

    def together(self) -> AbstractContextManager[Any]:
        """Return a context without effect."""
        return nullcontext()
