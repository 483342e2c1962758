"""Real processes of one launch, as torchrun starts them: gloo on one machine.

They are forked from a process that has imported everything, so that a start takes no seconds.
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
    """The environment of process `rank` of `count`; of one alone without a launcher's variables."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE", "MASTER_"))}
    own |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parent)}
    if count > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        own |= {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"}
    return own


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Started:
    """A process that runs `python ARGUMENTS` for a script, `-m MODULE` or `-c CODE`."""

    def __init__(self, arguments: list[str], variables: dict[str, str]):
        self._printed = tempfile.NamedTemporaryFile()  # noqa: SIM115 - gone with this object
        self._process = _FORKS.Process(target=_run, args=(arguments, variables, self._printed.name), daemon=True)
        self._process.start()

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.is_alive()

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(self._process.pid, number)

    def wait(self, timeout: float = 240) -> int:
        """Wait for its end; the exit code, negative for a signal."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(str(self._process), timeout, self.printed())
        return self._process.exitcode

    def printed(self) -> str:
        """What it has written to standard output and standard error so far."""
        return Path(self._printed.name).read_text(encoding="utf-8")


def launch(arguments: list[str], count: int = 1, variables: dict[str, str] | None = None) -> list[Started]:
    """Start `python ARGUMENTS` in `count` processes that know of each other; variables: more of the environment."""
    port, more = free_port(), variables or {}
    words = [str(text) for text in arguments]
    return [Started(words, environment(rank, count, port) | more) for rank in range(count)]


def finish(processes: list[Started], timeout: float = 240) -> list[str]:
    """Wait for all; return what each said. AssertionError with its output where one failed."""
    codes = [process.wait(timeout) for process in processes]
    for process, code in zip(processes, codes, strict=True):
        assert code == 0, process.printed()
    return [process.printed() for process in processes]


def run_recipe(recipe: Path, directory: Path) -> list[str]:
    """Arguments that run a recipe in a directory."""
    return ["-m", "prunekit", "run", str(recipe), "--directory", str(directory)]


def _run(arguments: list[str], variables: dict[str, str], printed: str) -> None:
    """Be the process: what `python ARGUMENTS` would be, with everything imported before."""
    file = os.open(printed, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))  # which torch, imported before, has not read
    kind = arguments[0] if arguments[0] in ("-m", "-c") else None
    program, *rest = arguments[1:] if kind else arguments
    sys.argv = [program, *rest]
    if kind == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(program, run_name="__main__")
