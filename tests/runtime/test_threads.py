"""The number of CPU threads and how they wait: set by the user, else by the container's limit, before torch loads."""

import json
import os
import subprocess
import sys

import pytest

from prunekit.runtime import threads

OURS = (*threads.WAITING, *threads.COUNTING)
SHOW = """
import json, os, sys
import prunekit
before = "torch" in sys.modules
import torch
print(json.dumps([before, torch.get_num_threads(), {name: os.environ.get(name) for name in sys.argv[1:]}]))
"""


def shown(*wrapper, **given):
    """Return the number of threads and the environment variables of a new process."""
    kept = {name: value for name, value in os.environ.items() if name not in OURS}
    # Like `python -m prunekit`, this imports no library by itself.
    command = [*wrapper, sys.executable, "-c", "import sys; sys.argv[0] = 'prunekit'\n" + SHOW, *OURS]
    done = subprocess.run(command, env={**kept, **given}, capture_output=True, text=True, check=True)
    before, count, variables = json.loads(done.stdout)
    assert not before
    return count, {name: value for name, value in variables.items() if value is not None}


@pytest.mark.long
def test_a_short_spin_unless_the_user_says_otherwise():
    assert shown()[1] == {"GOMP_SPINCOUNT": threads.SPIN_TURNS}
    assert shown(OMP_WAIT_POLICY="PASSIVE")[1] == {"OMP_WAIT_POLICY": "PASSIVE"}
    assert shown(GOMP_SPINCOUNT="7")[1] == {"GOMP_SPINCOUNT": "7"}
    assert shown(OMP_NUM_THREADS="1")[0] == 1


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no CPU affinity")
def test_threads_are_those_of_the_cpus_that_the_process_may_use():
    first = str(min(os.sched_getaffinity(0)))
    assert shown("taskset", "-c", first)[0] == 1


def test_a_containers_quota_bounds_the_threads(tmp_path, monkeypatch):
    for name in OURS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "usable_cpus", lambda: 64)
    for quota, expected in ((2.5, "2"), (0.5, "1"), (64.0, None), (None, None)):
        monkeypatch.setattr(threads, "cpu_quota", lambda quota=quota: quota)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        threads.configure()
        assert os.environ.get("OMP_NUM_THREADS") == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    monkeypatch.setattr(threads, "cpu_quota", lambda: 1.0)
    threads.configure()
    assert os.environ["OMP_NUM_THREADS"] == "9"


def test_quotas_of_both_versions_of_cgroups(tmp_path):
    group = tmp_path / "user" / "job"
    group.mkdir(parents=True)
    process = tmp_path / "cgroup"
    process.write_text("0::/user/job\n")
    assert threads.cpu_quota(tmp_path, process) is None
    (group / "cpu.max").write_text("max 100000\n")
    assert threads.cpu_quota(tmp_path, process) is None
    (tmp_path / "user" / "cpu.max").write_text("150000 100000\n")  # a parent's limit applies to its children
    assert threads.cpu_quota(tmp_path, process) == 1.5
    (group / "cpu.max").write_text("50000 100000\n")
    assert threads.cpu_quota(tmp_path, process) == 0.5
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    process.write_text("4:cpu:/\n")
    assert threads.cpu_quota(tmp_path, process) is None
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("300000\n")
    assert threads.cpu_quota(tmp_path, process) == 3.0
    process.write_text("0::/../outside\n")
    assert threads.cpu_quota(tmp_path / "nowhere", process) is None
