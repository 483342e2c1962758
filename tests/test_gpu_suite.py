"""The GPU suite: a reduced run on a CPU, and its verdicts on results that differ or are missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_suite import requirements
from benchmarks.gpu_suite.__main__ import STEPS
from benchmarks.gpu_suite.summary import FAILED, RESUME, summarize

ROOT = Path(__file__).parent.parent
EQUAL = {"what": "a call", "error": 1e-5, "tolerance": 1e-4, "holds": True}


def written(folder: Path, missing=(), state="made", comparisons=(EQUAL,)) -> Path:
    """Write the record of the step "smoke" with one piece, and return the folder."""
    piece = {"state": state, "seconds": 1.0, "rows": [], "comparisons": list(comparisons), "left_out": ["an error"]}
    content = {"missing": list(missing), "pieces": {"calls": piece}}
    (folder / "smoke.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("record", "status", "expected", "verdict"),
    [
        ({}, 0, 0, "whole"),
        ({"missing": ["steps"]}, RESUME, RESUME, "unfinished"),
        ({"comparisons": []}, 0, FAILED, "nothing was compared"),
        ({"comparisons": [EQUAL, {**EQUAL, "error": 0.2, "holds": False}]}, 0, FAILED, "a call is off by 2.0e-01"),
        ({"missing": ["calls"], "state": "failed"}, RESUME, FAILED, "calls: an error"),
        ({}, -11, FAILED, "ended with status -11"),
    ],
)
def test_the_status_of_a_call(record, status, expected, verdict, tmp_path, capsys):
    assert summarize(written(tmp_path, **record), ["smoke"], {"smoke": status}) == expected
    assert verdict in capsys.readouterr().out


def test_versions_that_are_too_old_are_refused_by_name(monkeypatch):
    assert requirements.refuse_old() is None
    here = requirements.version
    monkeypatch.setattr(requirements, "version", lambda name: "4.57.1" if name == "transformers" else here(name))
    assert "transformers 4.57.1 is installed, and transformers>=5.0 is needed" in requirements.refuse_old()


def test_constraints_leave_out_what_a_machine_has():
    lines = requirements.constraints("2.11.0", {"torch", "numpy"}).splitlines()
    assert [line for line in lines if line.startswith(("torch==", "numpy=="))] == ["torch==2.11.0+image"]
    assert any(line.startswith("diffusers==") for line in lines)


@pytest.mark.long
def test_the_whole_suite_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--reduced", "--minutes", "9", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for step in STEPS:
        record = json.loads((tmp_path / f"{step}.json").read_text())
        comparisons = [one for piece in record["pieces"].values() for one in piece["comparisons"]]
        assert comparisons and all(one["holds"] for one in comparisons) and not record["missing"], step
        assert (tmp_path / f"{step}.md").read_text().count("\n## ") == len(record["pieces"])
