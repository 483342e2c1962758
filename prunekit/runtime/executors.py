"""Where independent pieces of work are done: by the processes that share a directory, or on a Ray cluster.

A list of pieces is made in place, from objects that are loaded already. So that another node can make the same list, it
also has a `Call`: a function by name, with arguments in JSON. Nothing else travels; no model is pickled.
"""

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from prunekit.runtime.progress import Log
from prunekit.runtime.work import Piece, share, take

SETTING = "engine"  # of recipes and commands


@dataclass(frozen=True)
class Call:
    """A function by name, "module:function", which makes a list of pieces from JSON arguments on any node.

    It is called with a `OnePiece` first, and gives it the same lists as `Executor.map` was given with this call.
    """

    function: str
    arguments: dict[str, Any]

    @classmethod
    def of(cls, function: Callable[..., None], **arguments: Any) -> "Call":
        """Return the call of a module's function."""
        return cls(f"{function.__module__}:{function.__qualname__}", arguments)

    def __call__(self, executor: "OnePiece") -> None:
        """Call the function here."""
        module, _, name = self.function.partition(":")
        getattr(importlib.import_module(module), name)(executor, **self.arguments)


class Executor(Protocol):
    """What does lists of pieces; each piece is done by one process at a time, which holds its lock file."""

    def map(self, pieces: Sequence[Piece], locks: Path, call: Call, wait: bool = True) -> None:
        """Do the pieces that are not done; an error in one is raised here.

        Args:
            pieces: each with a result that appears whole or not at all.
            locks: the folder of their lock files, which all processes and nodes see.
            call: makes the same list on another node.
            wait: return when all are done; else leave those that another command is doing.

        """

    def together(self) -> AbstractContextManager[Any]:
        """Return a context in which lists may be done at once; they are done when it ends."""


class LocalExecutor:
    """The processes that share a directory, on one machine or several, by lock files alone."""

    def map(self, pieces: Sequence[Piece], locks: Path, call: Call, wait: bool = True) -> None:
        """Do the pieces as `share` does."""
        share(pieces, locks, wait)

    def together(self) -> AbstractContextManager[Any]:
        """Return a context that changes nothing: each list is done when it is given."""
        return nullcontext()


class OnePiece:
    """The executor of a call on another node: it does one piece of the lists that it is given.

    Attributes:
        log: takes what the call says.

    """

    def __init__(self, name: str, position: int, log: Log):
        self.log, self._name, self._position = log, name, position
        self._done: list[bool] = []  # of each list with the piece: there is one

    def map(self, pieces: Sequence[Piece], locks: Path, call: Call | None = None, wait: bool = True) -> None:
        """Do the piece, if it is in this list."""
        if self._position < len(pieces) and pieces[self._position].name == self._name:
            self._done.append(take(pieces[self._position], locks))

    @property
    def taken(self) -> bool:
        """Whether another process was doing the piece, which was left."""
        assert len(self._done) == 1, f"piece {self._position}, {self._name}, is in {len(self._done)} lists of the call"
        return not self._done[0]

    def together(self) -> AbstractContextManager[Any]:
        """Return a context that changes nothing."""
        return nullcontext()
