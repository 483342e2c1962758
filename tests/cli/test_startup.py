"""Startup: commands that only list things, and errors in arguments, import no heavy library."""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers", "transformers", "sentence_transformers", "accelerate", "numpy", "pyarrow", "matplotlib")
SHOW = """
import json, sys
sys.argv = ["prunekit", *sys.argv[1:]]
from prunekit.cli import main
try:
    main()
except SystemExit as end:
    print("STATUS", end.code)
print("LOADED", json.dumps([name for name in HEAVY if name in sys.modules]))
"""
LIGHT = [
    (["--help"], 0, "Usage"),
    *(
        ([command, "--help"], 0, "Usage")
        for command in ("run", "compare", "plan", "methods", "recipes", "generate", "serve")
    ),
    (["methods"], 0, "taylor_sp: Remove the units"),
    (["recipes"], 0, "quickstart: "),
    (["recipes", "copy", "nothing"], 1, "no shipped recipe"),
    (["nothing"], 2, "No such command"),
    (["run"], 2, "RECIPE"),
    (["run", "nothing.yaml"], 1, "no recipe at nothing.yaml"),
    (["compare", "nothing.yaml"], 1, "no recipe at nothing.yaml"),
    (["plan", "nothing.yaml"], 1, "no recipe at nothing.yaml"),
    (["check", "nothing.yaml"], 1, "no recipe at nothing.yaml"),
    (["bench", "nothing.yaml"], 1, "no recipe at nothing.yaml"),
    (["generate", "run", "--steps", "0"], 2, "--steps"),
    (["methods", "nothing"], 1, "unknown method 'nothing'"),
]


def loaded_by(words, status=0):
    """Run a command; return its output and the heavy libraries that it imported."""
    program = f"HEAVY = {HEAVY}\n{SHOW}"
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert f"STATUS {status}" in lines, done.stdout + done.stderr
    return done.stdout + done.stderr, json.loads(lines[-1].removeprefix("LOADED "))


@pytest.mark.parametrize(("words", "status", "expected"), LIGHT, ids=[" ".join(words) for words, *_ in LIGHT])
def test_a_light_command_imports_nothing_heavy(words, status, expected):
    printed, loaded = loaded_by(words, status)
    assert expected in printed and loaded == []


def test_commands_about_shapes_import_no_training():
    printed, loaded = loaded_by(["units", "sd-2.1"])
    assert "1,620 units" in printed and set(loaded) <= {"torch", "diffusers", "numpy", "transformers", "accelerate"}


IMPORTED = """
import json, sys
sys.argv = json.loads(sys.argv[1])
import prunekit
print(json.dumps([sorted(name for name in sys.modules if name.partition(".")[0] in HEAVY), sorted(vars(prunekit))]))
"""


def test_the_package_is_the_same_however_python_was_started():
    """Once, the package read sys.argv, and changed diffusers in programs other than the command line."""
    seen = []
    for program in ("prunekit", "script.py"):
        command = [sys.executable, "-c", f"HEAVY = {HEAVY}\n{IMPORTED}", json.dumps([program, "-m", "prunekit"])]
        loaded, names = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert loaded == [] and "slice_unet" not in names
        seen.append(names)
    assert seen[0] == seen[1]
