"""A script: kill runs of two processes again and again, starting them by fork, so that a start takes no second.

python killed.py RECIPE FOLDER KILLS SEED runs RECIPE once undisturbed to FOLDER/straight, then to FOLDER/killed, where
both processes get SIGKILL at KILLS random moments. Then, in FOLDER/lost, one of two processes is killed while models
are fine-tuned, and the other goes on alone; and FOLDER/ended gets SIGTERM during the search, and is started again.
Prints one JSON object: the kills delivered, and the exit codes.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from launching import environment, free_port

import prunekit.compare.comparison
import prunekit.evaluation.clip
import prunekit.run
from prunekit.training.termination import graceful


def start(recipe: str, directory: Path, count: int) -> list[int]:
    """Start a run's processes; return their ids."""
    port, children = free_port(), []
    for rank in range(count):
        child = os.fork()
        if not child:
            code = 1
            try:
                os.environ.update(environment(rank, count, port))
                with graceful():
                    prunekit.run.start(recipe, (), directory)
                code = 0
            except SystemExit as left:
                code = left.code
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return children


def finish(children: list[int]) -> list[int]:
    """Wait for all; return their exit codes, negative for signals."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def alive(child: int) -> bool:
    """Whether a child runs still; it stays to be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def kill_again_and_again(recipe: str, directory: Path, kills: int, seed: int, seconds: float) -> int:
    """Kill a run at random moments, starting it again each time; return how often it was killed before its end."""
    draw, delivered = random.Random(seed), 0
    for _ in range(kills):
        children = start(recipe, directory, 2)
        time.sleep(draw.uniform(0.1, 1) * seconds)
        running = all(map(alive, children))
        for child in children:
            os.kill(child, signal.SIGKILL)
        finish(children)
        delivered += running
    return delivered


def until(path: Path, pattern: str, child: int) -> None:
    """Wait until a file is there, or the child has ended."""
    while alive(child) and not list(path.glob(pattern)):
        time.sleep(0.002)


def main(recipe: str, folder: Path, kills: int, seed: int) -> None:
    """Run, kill, and print."""
    report: dict[str, object] = {}
    began = time.monotonic()
    report["straight"] = finish(start(recipe, folder / "straight", 2))
    seconds = time.monotonic() - began
    report["kills"] = kill_again_and_again(recipe, folder / "killed", kills, seed, 0.4 * seconds)
    report["after kills"] = finish(start(recipe, folder / "killed", 2))

    first, second = start(recipe, folder / "lost", 2)
    until(folder / "lost", "methods/*/experts/*/checkpoints/step-*", second)
    os.kill(second, signal.SIGKILL)
    report["lost"] = finish([first, second])

    children = start(recipe, folder / "ended", 2)
    until(folder / "ended", "methods/aptp/checkpoints/step-*", children[0])
    os.kill(children[1], signal.SIGTERM)
    report["ended"] = finish(children)
    report["kept"] = len(list((folder / "ended").glob("methods/aptp/checkpoints/step-*")))
    report["after end"] = finish(start(recipe, folder / "ended", 2))
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
