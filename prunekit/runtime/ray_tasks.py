"""The part of a Ray task that runs on its node: it enters the directory, does one piece of work and sends messages."""

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
PASSED_ON = "PRUNEKIT_"  # prefix of the environment variables that tasks receive from the command
PACKAGES = ("prunekit", "torch", "diffusers", "transformers")  # packages that must have the same version on all nodes


@dataclass(frozen=True)
class Place:
    """Where a command works; its tasks check that they see the directory and that locks hold between nodes."""

    directory: str  # the current directory, to which relative paths in recipes refer
    guard: str  # a lock file that the command holds
    variables: dict[str, str]  # the command's environment variables whose names begin with PASSED_ON
    versions: dict[str, str]  # by name of the package

    @classmethod
    def here(cls, guard: Path) -> "Place":
        """Return the place where this process works; `guard` is a lock file that it holds."""
        variables = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        return cls(str(Path.cwd()), str(guard), variables, {name: version(name) for name in PACKAGES})

    def enter(self) -> None:
        """Change to the directory and set the variables; UserError, which names this node, if it cannot work there."""
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
    """The actor that keeps the messages of tasks until the command takes them."""

    def __init__(self) -> None:
        self._letters: list[tuple[str, Any]] = []

    def put(self, kind: str, content: Any) -> None:
        """Keep a message; `kind` is "line" (a console line to show), "say" (a log line) or "row" (a row of the log)."""
        self._letters.append((kind, content))

    def take(self) -> list[tuple[str, Any]]:
        """Return the messages since the last call, as (kind, content)."""
        letters, self._letters = self._letters, []
        return letters


class TaskLog:
    """The log of a task, and the file of its console; it sends lines and rows to the command's mailbox."""

    def __init__(self) -> None:
        self.mailbox: Any = None  # the mailbox of the command whose task runs now

    def log(self, row: dict[str, Any]) -> None:
        """Send a row of the log; a row of a training step gets this process's peak memory."""
        self._send("row", {**row, "memory": peak_memory()} if "step" in row else row)

    def say(self, text: str) -> None:
        """Send a line of the log."""
        self._send("say", text)

    def write(self, text: str) -> None:
        """Send text that the console prints, such as progress lines."""
        if text.strip():
            self._send("line", text.rstrip())

    def flush(self) -> None:
        """Wait until the mailbox has received all messages."""
        import ray

        if self.mailbox is not None:
            ray.get(self._send("line", None))

    def _send(self, kind: str, content: Any) -> Any:
        return self.mailbox.put.remote(kind, content)


_task_log = TaskLog()


def perform(call: Call, name: str, position: int, place: Place, threads: int, mailbox: Any) -> str:
    """Do one piece in a worker process of Ray; return DONE, TAKEN (another process is doing it) or STOPPED.

    A process that a signal or the command asks to end saves first; see `termination`.
    """
    _task_log.mailbox = mailbox
    for variable in LAUNCHED:  # environment variables of the launch that started this node
        os.environ.pop(variable, None)
    with graceful(signal.SIGTERM, signal.SIGINT):  # Ray cancels a task with SIGINT
        try:
            place.enter()
            torch.set_num_threads(threads)
            console.file = _task_log  # type: ignore[assignment]  # it has the methods that rich calls
            one = OnePiece(name, position, _task_log)
            call(one)
            return TAKEN if one.taken else DONE
        except SystemExit as end:
            if end.code != REQUEUE:
                raise
            return STOPPED
        finally:
            _task_log.flush()
