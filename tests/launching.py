"""Real processes of one launch, as torchrun starts them: gloo on one machine, without torchrun's own start-up time."""

import os
import socket
import subprocess
import sys
from pathlib import Path


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


def launch(arguments: list[str], count: int = 1) -> list[subprocess.Popen]:
    """Start `python ARGUMENTS` in `count` processes that know of each other."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=environment(rank, count, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]


def finish(processes: list[subprocess.Popen], timeout: float = 240) -> list[str]:
    """Wait for all; return what each said. AssertionError with its output where one failed."""
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def run_recipe(recipe: Path, directory: Path) -> list[str]:
    """Arguments that run a recipe in a directory."""
    return ["-m", "prunekit", "run", str(recipe), "--directory", str(directory)]
