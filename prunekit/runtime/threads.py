"""The number of PyTorch's CPU threads and the way in which they wait, set before torch loads.

A thread that waits for other threads spins; GNU OpenMP's default is 300,000 turns. On a machine with one busy core, the
waiting thread then occupies the core that a working thread needs: a training step of the embedded model takes 4 times
as long, and 30 times as long beside several busy processes. A short spin costs at most 5 % on an idle machine and
prevents this slowdown (docs/performance.md has the measurement).
"""

import math
import os
from pathlib import Path

SPIN = "GOMP_SPINCOUNT"
SPIN_TURNS = "500"
WAITING = (SPIN, "OMP_WAIT_POLICY")  # environment variables with which a user sets how threads wait
COUNTING = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # environment variables with which a user sets the number of threads
CGROUPS = Path("/sys/fs/cgroup")


def configure() -> None:
    """Set the variables that GNU OpenMP reads when torch loads, unless the user has set them.

    If the user sets no number of threads, it is at most the container's CPU quota, rounded down to whole CPUs. CPU
    affinity needs no setting: OpenMP counts the CPUs that this process may use.
    """
    if not any(os.environ.get(name) for name in WAITING):
        os.environ[SPIN] = SPIN_TURNS
    quota = cpu_quota()
    if quota is not None and not any(os.environ.get(name) for name in COUNTING) and quota < usable_cpus():
        os.environ[COUNTING[0]] = str(max(1, math.floor(quota)))


def usable_cpus() -> int:
    """Return how many CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(root: Path = CGROUPS, process: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return the container's CPU quota in CPUs, from cgroup version 2 or 1; None without a limit.

    root: where cgroups are mounted. process: the file that names this process's group.
    """
    quotas = [_version_1(root / "cpu")]
    for line in _text(process).splitlines():
        if line.startswith("0::/"):
            group = root / line.removeprefix("0::/").strip()
            quotas += [_version_2(folder) for folder in (group, *group.parents) if folder.is_relative_to(root)]
    known = [quota for quota in (*quotas, _version_2(root)) if quota is not None]
    return min(known, default=None)


def _version_2(folder: Path) -> float | None:
    words = _text(folder / "cpu.max").split()
    return _share(*words) if len(words) == 2 else None


def _version_1(folder: Path) -> float | None:
    return _share(_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us"))


def _share(quota: str, period: str) -> float | None:
    try:
        share = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max", or no such file
        return None
    return share if share > 0 else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
