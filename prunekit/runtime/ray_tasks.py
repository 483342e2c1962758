"""A task of a Ray cluster, on its node: where it works, what it says, and the piece of work that it does."""

import os
import signal
import socket
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from prunekit.runtime.companions import LAUNCHED
from prunekit.runtime.errors import UserError
from prunekit.runtime.executors import Call, OnePiece
from prunekit.runtime.progress import console, peak_memory
from prunekit.runtime.termination import REQUEUE, graceful
from prunekit.runtime.work import is_held

DONE, TAKEN, STOPPED = "done", "taken", "stopped"  # how a task ends
PASSED_ON = "PRUNEKIT_"  # what the names of variables begin with that tasks get from the command
PACKAGES = ("prunekit", "torch", "diffusers", "transformers")  # of one version on all nodes


@dataclass(frozen=True)
class Place:
    """Where a command works, which its tasks check: that they see it, and that its locks hold between nodes."""

    directory: str  # the current one, which relative paths of recipes are of
    guard: str  # a lock file that the command holds
    variables: dict[str, str]  # of its environment
    versions: dict[str, str]  # of packages

    @classmethod
    def here(cls, guard: Path) -> "Place":
        """Return where this process works."""
        variables = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        return cls(str(Path.cwd()), str(guard), variables, {name: version(name) for name in PACKAGES})

    def enter(self) -> None:
        """Go there; UserError, which names this node, where that is not possible."""
        node, guard = socket.gethostname(), Path(self.guard)
        if different := {name: own for name in PACKAGES if (own := version(name)) != self.versions[name]}:
            theirs = ", ".join(f"{name} {self.versions[name]}" for name in different)
            ours = ", ".join(f"{name} {own}" for name, own in different.items())
            raise UserError(
                f"node {node} has {ours}, and this command {theirs}: install the same versions on all nodes"
            )
        if not guard.is_file() or not Path(self.directory).is_dir():
            missing = guard.parent if Path(self.directory).is_dir() else self.directory
            raise UserError(f"node {node} does not see {missing}: work in a directory that all nodes share")
        if not is_held(guard):
            raise UserError(
                f"a lock on {guard.parent} does not hold on node {node}: use a file system whose locks hold between "
                "nodes, such as NFS 4 or Lustre with -o flock"
            )
        os.chdir(self.directory)
        os.environ.update(self.variables)


class Mailbox:
    """The actor that keeps what tasks say until the command asks for it."""

    def __init__(self) -> None:
        self._letters: list[tuple[str, Any]] = []

    def put(self, kind: str, content: Any) -> None:
        """Keep a letter: a "line" to show, a text to "say", or a "row" of the log."""
        self._letters.append((kind, content))

    def take(self) -> list[tuple[str, Any]]:
        """Return the letters since the last call."""
        letters, self._letters = self._letters, []
        return letters


class TaskLog:
    """What takes the lines and rows of a task, and the console's: they go to the command's mailbox."""

    def __init__(self) -> None:
        self.mailbox: Any = None  # of the command whose task runs now

    def log(self, row: dict[str, Any]) -> None:
        """Send a row of the log, with the memory of this process."""
        self._send("row", {**row, "memory": peak_memory()} if "step" in row else row)

    def say(self, text: str) -> None:
        """Send a line of the log."""
        self._send("say", text)

    def write(self, text: str) -> None:
        """Send what the console prints, such as the progress of a training."""
        if text.strip():
            self._send("line", text.rstrip())

    def flush(self) -> None:
        """Return when the mailbox has everything."""
        import ray

        if self.mailbox is not None:
            ray.get(self._send("line", None))

    def _send(self, kind: str, content: Any) -> Any:
        return self.mailbox.put.remote(kind, content)


_task_log = TaskLog()


def perform(call: Call, name: str, position: int, place: Place, threads: int, mailbox: Any) -> str:
    """Do one piece, in a worker process of Ray; return how it ended.

    A process that is asked to end, by a signal or by the command, saves first; see `termination`.
    """
    _task_log.mailbox = mailbox
    for variable in LAUNCHED:  # of the launch that started this node
        os.environ.pop(variable, None)
    with graceful(signal.SIGTERM, signal.SIGINT):  # Ray cancels a task by the second one
        try:
            place.enter()
            torch.set_num_threads(threads)
            console.file = _task_log  # type: ignore[assignment]  # which has what rich calls
            one = OnePiece(name, position, _task_log)
            call(one)
            return TAKEN if one.taken else DONE
        except SystemExit as end:
            if end.code != REQUEUE:
                raise
            return STOPPED
        finally:
            _task_log.flush()
