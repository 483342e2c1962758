"""Time training steps of the embedded model under settings of how CPU threads wait, on an idle and a busy machine.

    python benchmarks/threads.py            the table of docs/performance.md, about 6 minutes on 2 cores

Each setting runs in a separate process, because OpenMP reads it when torch loads. Steps are interleaved. The busy
processes are endless loops of Python.
"""

import os
import statistics
import subprocess
import sys

STEPS, SAMPLES = 7, 32
BUSY = {"idle": 0, "one core busy": 1, "four busy processes": 4}
SETTINGS = {
    "default": {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "300000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    **{f"GOMP_SPINCOUNT={turns}": {"GOMP_SPINCOUNT": str(turns)} for turns in (500, 1000, 2000, 10_000)},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
MOST_COLLAPSED = 2  # steps of the default setting beside busy processes, where a step takes up to half a minute


def worker() -> None:
    """Make one step for each line on stdin, and print its seconds."""
    import time

    import torch

    from prunekit.measuring.clock import timed_inputs
    from prunekit.models import load_pipeline

    unet = load_pipeline("emoji").unet.train().requires_grad_(True)
    inputs = timed_inputs(unet, SAMPLES, unet.config.sample_size, 16)

    def step() -> None:
        unet(**inputs).sample.square().mean().backward()
        unet.zero_grad()

    step()
    print(torch.get_num_threads(), flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        step()
        print(time.perf_counter() - started, flush=True)


def main() -> None:
    """Measure, and print a Markdown table."""
    workers = {}
    for name, variables in SETTINGS.items():
        environment = {**os.environ, **variables, "HF_HUB_OFFLINE": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
        workers[name] = subprocess.Popen([sys.executable, __file__, "worker"], **pipes)
    for process in workers.values():
        process.stdout.readline()
    medians: dict[str, list[float]] = {name: [] for name in workers}
    for busy in BUSY.values():
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for number in range(STEPS):
            for name, process in workers.items():
                if name == "default" and busy > 1 and number >= MOST_COLLAPSED:
                    continue
                process.stdin.write("step\n")
                process.stdin.flush()
                seconds[name].append(float(process.stdout.readline()))
        for other in others:
            other.kill()
        for name, own in seconds.items():
            medians[name].append(statistics.median(own))
    print(f"| setting | {' | '.join(BUSY)} |\n|---|{'---:|' * len(BUSY)}")
    for name, row in medians.items():
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in row)} |")
    for process in workers.values():
        process.kill()


if __name__ == "__main__":
    worker() if sys.argv[1:] == ["worker"] else main()
