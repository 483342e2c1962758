"""How PyTorch's CPU threads wait and how many there are, decided before torch loads.

A thread that waits for its siblings spins. GNU OpenMP's default is 300,000 turns, so on a machine with one busy core
the waiting thread takes the core that the other one needs: a training step of the embedded model then takes 4 times as
long, and beside several busy processes 30 times. A short spin costs at most 5 % on an idle machine and never collapses
(docs/performance.md has the measurement).
"""

import math
import os
from pathlib import Path

SPIN = "GOMP_SPINCOUNT"
SPIN_TURNS = "500"
WAITING = (SPIN, "OMP_WAIT_POLICY")  # variables by which a user says how threads wait
COUNTING = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # variables by which a user says how many threads there are
CGROUPS = Path("/sys/fs/cgroup")


def configure() -> None:
    """Set the variables that GNU OpenMP reads when torch loads, unless the user has set them.

    Without a user's choice there are at most as many threads as the container's CPU quota has whole CPUs. CPU affinity
    needs no setting: OpenMP counts the CPUs that this process may use.
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
    """Return the CPUs' worth of time that the container grants, by cgroup version 2 or 1; None without a limit.

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
