"""Start the processes of one launch as torchrun does: several processes on one machine, connected by gloo.

The processes are forked from a process that has already imported everything, so they start fast.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "prunekit.cli",
        "prunekit.jobs.compare.comparing",
        "prunekit.evaluation.clip",
        "prunekit.jobs.run",
        "prunekit.serving.bulk",
    ]
)


def environment(rank: int = 0, count: int = 1, port: int = 0) -> dict[str, str]:
    """Return the environment of process `rank` of `count`; a single process gets no variables of a launcher."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE", "MASTER_"))}
    own |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parent)}
    if count > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        own |= {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"}
    return own


def free_port() -> int:
    """Return a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Started:
    """A process that runs `python ARGUMENTS`; ARGUMENTS start with a script, `-m MODULE` or `-c CODE`."""

    def __init__(self, arguments: list[str], variables: dict[str, str]):
        self._printed = tempfile.NamedTemporaryFile()  # noqa: SIM115 - gone with this object
        self._process = _FORKS.Process(target=_run, args=(arguments, variables, self._printed.name), daemon=True)
        self._process.start()

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.is_alive()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        with contextlib.suppress(ProcessLookupError):  # the process has just ended
            os.kill(self._process.pid, number)

    def wait(self, timeout: float = 240) -> int:
        """Wait until the process ends; return its exit code, or the negative number of the signal that ended it."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(str(self._process), timeout, self.printed())
        return self._process.exitcode

    def printed(self) -> str:
        """Return the output so far, of standard output and standard error."""
        return Path(self._printed.name).read_text(encoding="utf-8")


def launch(arguments: list[str], count: int = 1, variables: dict[str, str] | None = None) -> list[Started]:
    """Start `python ARGUMENTS` in `count` processes of one launch. variables: more environment variables."""
    port, more = free_port(), variables or {}
    words = [str(text) for text in arguments]
    return [Started(words, environment(rank, count, port) | more) for rank in range(count)]


def finish(processes: list[Started], timeout: float = 240) -> list[str]:
    """Wait for all processes and return their outputs; raise AssertionError with the output of one that failed."""
    codes = [process.wait(timeout) for process in processes]
    for process, code in zip(processes, codes, strict=True):
        assert code == 0, process.printed()
    return [process.printed() for process in processes]


def run_recipe(recipe: Path, directory: Path) -> list[str]:
    """Return the arguments that run a recipe in a directory."""
    return ["-m", "prunekit", "run", str(recipe), "--directory", str(directory)]


def _run(arguments: list[str], variables: dict[str, str], printed: str) -> None:
    """Run `python ARGUMENTS` in this forked process, in which everything is imported."""
    file = os.open(printed, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))  # torch was imported before the variable was set
    kind = arguments[0] if arguments[0] in ("-m", "-c") else None
    program, *rest = arguments[1:] if kind else arguments
    sys.argv = [program, *rest]
    if kind == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(program, run_name="__main__")
