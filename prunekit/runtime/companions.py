"""Start one process per CPU core for a command, because a small model's steps gain little from a second thread.

A command that runs a recipe starts the other processes itself, as `torchrun` would. In a search, the processes share
the batch of each step. In later stages, where models and pictures are independent, each process takes whole models and
pictures (docs/performance.md has the measurement).
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch

from prunekit.runtime.errors import UserError
from prunekit.runtime.processes import COMPANION, current, is_companion
from prunekit.runtime.progress import console

COUNT = "PRUNEKIT_PROCESSES"  # environment variable with which a user sets the number of processes
LAUNCHED = ("WORLD_SIZE", "MASTER_PORT", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
START_SECONDS = 180.0  # in which all processes must connect to each other
END_SECONDS = 60.0  # for a process to save its work and exit
SHOWN = re.compile(r"\[ *\d+:\d\d\] |\S.*: \d+/\d+ ")  # log and progress lines of a companion, which the user sees


@contextmanager
def companions(count: int) -> Iterator[None]:
    """Run the body of the context in `count` processes of this command; the others end when this one ends.

    If the other processes do not start, restart the command in one process.

    Raises:
        UserError: another process ended while all processes worked together.

    """
    if is_companion():
        _end_with_parent()
        yield
        return
    if count == 1:
        yield
        return
    threads = max(1, torch.get_num_threads() // count)
    with _environment(_launch_variables(count)), _threads(threads):
        others = [_Companion(rank, threads) for rank in range(1, count)]
        try:
            _meet(others)
            yield
        except RuntimeError as error:
            lost = next((other for other in others if other.lost), None)
            if lost is None or isinstance(error, UserError):
                raise
            raise UserError(f"{lost}; start the same command again, with {COUNT}=1 if memory is short") from error
        finally:
            for other in others:
                other.end(finished=sys.exc_info()[0] is None)


class _Companion:
    """Another process that runs the same command; this process prints the log and progress lines of its stderr."""

    def __init__(self, rank: int, threads: int):
        variables = {COMPANION: "1", "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": threads, "COLUMNS": 1000}
        self._process = subprocess.Popen(
            _command(),
            env={**os.environ, **{name: str(value) for name, value in variables.items()}},
            stdin=subprocess.PIPE,  # it closes when this process ends, even by SIGKILL
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self._last: deque[str] = deque(maxlen=1)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __str__(self) -> str:
        said = f": {self._last[0]}" if self._last else ""
        return f"another process of this command ended with status {self._process.returncode}{said}"

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if SHOWN.match(line):
                console.print(line.rstrip(), highlight=False, markup=False)
            elif line.strip():
                self._last.append(line.strip())

    @property
    def lost(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def end(self, finished: bool) -> None:
        """Wait up to 60 s for the process to end, then kill it; unless this one has `finished`, send SIGTERM first."""
        if not finished and not self.lost:
            self._process.terminate()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._reader.join()

    def kill(self) -> None:
        """Kill the process, and wait for its end."""
        self._process.kill()
        self._process.wait()


def _meet(others: list[_Companion]) -> None:
    """Wait until all processes have connected; if that fails, restart the command in one process."""
    met = threading.Event()

    def watch() -> None:
        deadline = time.monotonic() + START_SECONDS
        while not met.wait(0.1):
            lost = next((other for other in others if other.lost), None)
            if lost is not None or time.monotonic() > deadline:
                _alone(others, str(lost or f"no second process within {START_SECONDS:.0f} seconds"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    current()
    met.set()
    watcher.join()


def _alone(others: list[_Companion], reason: str) -> NoReturn:
    """Kill the other processes, and replace this process with the same command in one process."""
    console.print(f"continuing in one process: {reason}", highlight=False, markup=False)
    for other in others:
        other.kill()
    kept = {name: value for name, value in os.environ.items() if name not in _launch_variables(1)}
    os.execve(sys.executable, _command(), {**kept, COUNT: "1"})


def _command() -> list[str]:
    """Return the command line that starts this process's command again."""
    script = Path(sys.argv[0])
    started = ["-m", "prunekit"] if script.name == "__main__.py" else [str(script)]
    return [sys.executable, *started, *sys.argv[1:]]


def _launch_variables(count: int) -> dict[str, str]:
    """Return the environment variables of rank 0 in a launch of `count` processes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    return {**{name: str(value) for name, value in values.items()}, "MASTER_ADDR": "127.0.0.1"}


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _end_with_parent() -> None:
    """Kill this process when its parent process ends, which closes this process's stdin."""

    def wait() -> None:
        sys.stdin.buffer.read()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
