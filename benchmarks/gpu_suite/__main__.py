"""Run each step of the GPU suite in a separate process, the most valuable step first, within a time budget.

python -m benchmarks.gpu_suite [--minutes 9] [--steps smoke,table] [--output runs/gpu_suite] [--reduced]
"""

import argparse
import importlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_suite.requirements import refuse_old
from benchmarks.gpu_suite.summary import FAILED, RESUME, summarize

STEPS = {  # step: its module; the most valuable step comes first
    "smoke": "smoke",
    "table": "latency",
    "widths": "latency",
    "training": "training",
    "emoji": "jobs",
    "transformers": "latency",
    "serving": "serving",
}
MOST_MINUTES = 9.0  # limit of one step in one call
LEAST_SECONDS = 30.0  # no step starts with less time left
GRACE = 25.0  # seconds between SIGTERM and SIGKILL, in which a step saves its results


def main() -> int:
    """Run the requested steps in child processes, or in this process with --child; return the exit status."""
    given = _arguments()
    if problem := refuse_old():
        print(f"gpu_suite: {problem}", file=sys.stderr)
        return FAILED
    if given.child:
        return _work(given)
    import torch

    if not torch.cuda.is_available() and not given.reduced:
        print("gpu_suite: torch finds no CUDA device; --reduced runs small models on the CPU", file=sys.stderr)
        return FAILED
    deadline = time.monotonic() + 60 * given.minutes
    states = {}
    for steps in [given.steps] if given.reduced else [[step] for step in given.steps]:  # imports are slow on a CPU
        left = deadline - time.monotonic()
        before = _processor_seconds()
        status = _start(steps, given, min(left, 60 * MOST_MINUTES)) if left > LEAST_SECONDS else RESUME
        states |= dict.fromkeys(steps, status)
        print(f"== {', '.join(steps)}: {_processor_seconds() - before:.0f} s of CPU time", flush=True)
    return summarize(given.output, given.steps, states)


def _processor_seconds() -> float:
    """Return the CPU time in seconds of the child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="python -m benchmarks.gpu_suite")
    parser.add_argument("--minutes", type=float, default=MOST_MINUTES, help="minutes for this call; default 9")
    parser.add_argument("--steps", default=",".join(STEPS), help=f"comma-separated steps; default: {','.join(STEPS)}")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_suite"), help="folder of the results")
    parser.add_argument("--reduced", action="store_true", help="run every step with small models, on the CPU")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.steps = [step for step in given.steps.split(",") if step]
    if unknown := [step for step in given.steps if step not in STEPS]:
        parser.error(f"unknown step {unknown[0]!r}; the steps are {', '.join(STEPS)}")
    return given


def _start(steps: list[str], given: argparse.Namespace, seconds: float) -> int:
    """Run steps in a separate process and return its exit status.

    A process that exceeds `seconds` gets SIGTERM, and SIGKILL after GRACE seconds more.
    """
    print(f"== {', '.join(steps)}: at most {seconds / 60:.1f} minutes", flush=True)
    command = [sys.executable, "-m", __package__, "--child", "--steps", ",".join(steps), "--output", str(given.output)]
    command += ["--minutes", str(seconds / 60), *(["--reduced"] if given.reduced else [])]
    variables = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if given.reduced:
        variables |= {"CUDA_VISIBLE_DEVICES": "", "PRUNEKIT_PRECISION": "float32", "PRUNEKIT_PROCESSES": "1"}
    process = subprocess.Popen(command, env={**os.environ, **variables})
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return RESUME


def _work(given: argparse.Namespace) -> int:
    """Run steps in this process, one after another; return the exit status."""
    import torch

    from benchmarks.gpu_suite.record import Record, Settings
    from prunekit.models import quiet_libraries
    from prunekit.runtime.termination import graceful

    quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() and not given.reduced else "cpu")
    settings = Settings(device, given.reduced, given.output, time.monotonic() + 60 * given.minutes)
    are_whole = True
    with graceful():
        for step in given.steps:
            module: Any = importlib.import_module(f"{__package__}.{STEPS[step]}")
            title, pieces = module.step(step, settings)
            is_whole = Record(step, title, settings).work(pieces, lambda text: print(f"   {text}", flush=True))
            are_whole = are_whole and is_whole
    return 0 if are_whole else RESUME


if __name__ == "__main__":
    sys.exit(main())
