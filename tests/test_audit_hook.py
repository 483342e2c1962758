"""prunekit writes only to its folders and uses no network, as Python's audit hook shows.

Each command runs in a new process that installs the hook before it imports any library. The working directory is
separate, and the home directory is empty and must stay empty. Writes are allowed to the working directory, the
temporary folder (torch creates an empty cache there), and matplotlib's settings folder (MPLCONFIGDIR), where matplotlib
writes a font cache on its first import. HF_HUB_OFFLINE is not set. Commands run with one process here, because several
processes communicate over the network.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import auditing
import pytest
import yaml
from fuzzing import forked
from small_model import RECIPE, write_pipeline, write_world
from small_release import write_release

import prunekit
from prunekit.models import load_pipeline

PACKAGE, TESTS = Path(prunekit.__file__).parent, Path(__file__).parent
PROGRAM = """
import auditing, json, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which background jobs of a shell ignore
seen = auditing.watch()
kind, lines = sys.argv[1], json.loads(sys.argv[2])
sys.argv[0] = "prunekit" if kind == "command" else "-c"
import prunekit
for name in prunekit.__all__ if kind == "names" else ():
    getattr(prunekit, name)
ends = []
if lines:
    from prunekit.cli import app
for words in lines:
    try:
        app(words)
    except SystemExit as end:
        ends.append(end.code)
print("SEEN", json.dumps([ends, seen]), file=sys.stderr)
"""
PROBE = ["socket.bind", "('::1', 0)"]  # urllib3 checks for IPv6 when it is imported; it sends nothing
ELSEWHERE = ("HF_", "XDG_", "MPL", "PRUNEKIT", "TORCH", "TRITON")  # variables that may set other folders
QUIET = ("ORT_", "CI", "GITHUB_", "TF_BUILD")  # variables that turn off onnxruntime's telemetry
LIMIT = 300  # time limit in seconds
HERE = ("127.0.0.1", "localhost", "0.0.0.0", "::1")  # addresses of the demo's page and of the API
SERVERS = ("demo", "serve")


@dataclass(frozen=True)
class Ran:
    """Results of commands: exit codes, files written outside the allowed folders, and network use."""

    ends: list[int]
    elsewhere: list
    network: list
    printed: str


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a process whose home and temporary folder are in `folder`."""
    own = {name: value for name, value in os.environ.items() if not name.startswith((*ELSEWHERE, *QUIET))}
    for name in ("home", "temporary", "matplotlib", "work"):
        (folder / name).mkdir(exist_ok=True)
    own |= {"HOME": str(folder / "home"), "TMPDIR": str(folder / "temporary"), "OMP_NUM_THREADS": "1"}
    own |= {
        "MPLCONFIGDIR": str(folder / "matplotlib"),
        "PYTHONPATH": f"{PACKAGE.parent}{os.pathsep}{TESTS / 'helpers'}",
    }
    return own | {"PYTHONUNBUFFERED": "1", "PRUNEKIT_PROCESSES": "1", "PRUNEKIT_PRECISION": "float32"}


def package_files() -> dict[str, float]:
    """Return the modification time of each file of the package, without Python's caches."""
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path): path.stat().st_mtime for path in files}


def audited(folder: Path, kind: str, *lines: list[str], until: str | None = None) -> Ran:
    """Run command lines in `folder`/work, in one process.

    kind: "command": run as the command line does; "import": import prunekit first; "names": also access all its names.
    until: text; the process gets SIGINT after an output line that contains it. A process that does not end is killed
    after LIMIT seconds, and its exit code is the signal's negative number.
    """
    variables, before = environment(folder), package_files()
    command = [sys.executable, "-c", PROGRAM, kind, json.dumps(lines)]
    with (folder / "printed").open("w+") as printed:
        process = subprocess.Popen(
            command, cwd=folder / "work", env=variables, stdout=subprocess.PIPE, stderr=printed, text=True
        )
        overdue, lines = threading.Timer(LIMIT, process.kill), []
        overdue.start()
        try:
            for line in process.stdout:
                lines.append(line)
                if until is not None and until in line:
                    process.send_signal(signal.SIGINT)
            process.wait()
        finally:
            overdue.cancel()
            process.kill()
        printed.seek(0)
        told = printed.read().splitlines()
    shown = "".join(lines) + "\n".join(told)
    if process.returncode < 0:
        return Ran([process.returncode], [], [], shown)
    found = [line for line in told if line.startswith("SEEN ")]
    assert found, shown
    ends, seen = json.loads(found[-1].removeprefix("SEEN "))
    seen = [tuple(one) for one in seen if one != PROBE]
    allowed = [str(folder / name) for name in ("work", "temporary", "matplotlib")]
    elsewhere = auditing.outside(seen, allowed)
    network = [one for one in elsewhere if one[0] in auditing.NETWORK]
    written = [one for one in elsewhere if one not in network]
    written += [("found", str(path)) for path in (folder / "home").rglob("*")]
    written += [("changed", path) for path in dict(package_files().items() ^ before.items())]
    return Ran(ends, sorted(set(written)), network, shown)


def clean(ran: Ran, *ends: int) -> None:
    assert ran.ends == list(ends), ran.printed
    assert ran.elsewhere == [] and ran.network == []


def test_importing_prunekit_writes_nothing(tmp_path):
    clean(audited(tmp_path, "import", ["units", "sd-1.5"], ["macs", "sd-1.5"], ["bench", "nothing"]), 0, 0, 1)
    assert not any((tmp_path / "work").iterdir())


def test_light_commands_write_nothing_elsewhere(tmp_path):
    lines = [["--help"], ["methods"], ["recipes"], ["recipes", "copy", "aptp_cc3m_base"]]
    clean(audited(tmp_path, "command", *lines, ["run", "nothing.yaml"], ["plan", "x.yaml"]), *[0] * 4, 1, 1)
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"aptp_cc3m_base.yaml", "base"}


def test_the_hook_sees_writing_and_network(tmp_path):
    def work() -> None:
        import shutil
        import socket

        (tmp_path / "a" / "b").mkdir(parents=True)
        (tmp_path / "a" / "c").write_text("c")
        (tmp_path / "a" / "c").rename(tmp_path / "d")
        shutil.rmtree(tmp_path / "a")
        (tmp_path / "link").symlink_to(tmp_path / "d")
        (tmp_path / "d").read_text()
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))

    seen = forked(work, 10).seen
    expected = [("os.mkdir", "a"), ("os.mkdir", "a/b"), ("open", "a/c"), ("os.rename", "a/c"), ("os.rename", "d")]
    expected += [("os.rmdir", "a/b"), ("os.rmdir", "a"), ("os.symlink", "link")]
    found = {(event, str(Path(path).relative_to(tmp_path))) for event, path in seen[:-1]}
    assert found == set(expected)
    assert seen[-1][0] == "socket.bind" and auditing.outside(seen, [str(tmp_path)]) == seen[-1:]


def test_onnxruntime_leaves_no_identifier_and_sends_nothing(tmp_path):
    """diffusers imports it with any pipeline; by default it writes to the home directory and sends telemetry."""
    pytest.importorskip("onnxruntime")
    variables = environment(tmp_path)
    subprocess.run([sys.executable, "-c", "import prunekit, onnxruntime"], env=variables, cwd=tmp_path, check=True)
    assert not any((tmp_path / "home").iterdir())


SMALL = {"search": {"steps": 2, "batch_size": 4, "learning_rate": 1e-3}, "experts": 2, "warmup": 1}


def write_recipes(work: Path) -> None:
    """Write a model, data, and the recipes of all jobs into a folder; paths in them are relative to it."""
    world = {**RECIPE, **write_world(work), "evaluator": "emoji", "prompt_encoder": "emoji"}
    world |= {"fine_tune": {"steps": 2, "batch_size": 4, "learning_rate": 1e-3}}
    world |= {"model": "model", "data": {**world["data"], "path": "shards"}, "methods": {"norm": {}, "aptp": SMALL}}
    compare = {**world, "job": "compare", "name": "compared", "prune": {}, "budgets": [{"budget": 0.7}]}
    compare["methods"] = {"norm": {}}
    bench = {"job": "bench", "name": "timed", "model": "model", "resolution": 64, "warmup_seconds": 0.1}
    bench |= {"architectures": {"a": {"budget": 0.7}}, "cells": [{"workload": "unet", "repeats": 3}]}
    training = {"steps": 2, "batch_size": 2, "learning_rate": 1e-3}
    pretrain = {"job": "pretrain", "name": "pretrained", "data": world["data"], "evaluation": world["evaluation"]}
    pretrain |= dict.fromkeys(("autoencoder", "decoder", "diffusion", "evaluator"), training)
    for name, content in {"small": world, "compare": compare, "bench": bench, "pretrain": pretrain}.items():
        (work / f"{name}.yaml").write_text(yaml.safe_dump(content))
    write_release(work / "release", load_pipeline(write_pipeline(work / "stock")).unet)  # needs a full Stable Diffusion


LINES = {  # each command uses the files of the commands before it
    "check": ["check", "small.yaml"],
    "plan": ["plan", "small.yaml", "compare.yaml", "--measure", "0.1", "--json", "plans.json"],
    "run": ["run", "small.yaml"],
    "resume": ["resume", "runs/small"],
    "run pretrain": ["run", "pretrain.yaml"],
    "units": ["units", "model"],
    "macs": ["macs", "model", "--check"],
    "generate": ["generate", "runs/small", "--prompt", "red apple", "--steps", "1"],
    "generate dense": ["generate", "model", "--prompt", "red apple", "--steps", "1", "--output", "drawn"],
    "evaluate": ["evaluate", "runs/small", "--images", "4", "--data", "{kind: webdataset, path: shards}", "steps=1"],
    "report": ["report", "runs/small", "--sensitivity"],
    "export": ["export", "runs/small", "exported", "--method", "norm"],
    "export onnx": ["export", "runs/small", "graphs", "--method", "norm", "--tier", "onnx"],
    "compare": ["compare", "compare.yaml"],
    "bench": ["bench", "bench.yaml"],
    "import": ["import", "aptp", "release", "--model", "stock", "--prompt-encoder", "emoji"],
    "demo": ["demo", "runs/small", "--device", "cpu"],
    "serve": ["serve", "runs/small", "--device", "cpu", "--port", "0"],
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Return a function that returns a command's result; it first runs the commands before it in the same directory."""
    folder = tmp_path_factory.mktemp("audited")
    (folder / "work").mkdir()
    write_recipes(folder / "work")
    until = dict.fromkeys(SERVERS, "Ctrl-C")
    done = {}

    def of(name: str) -> Ran:
        for line in itertools.takewhile(lambda line: name not in done, LINES):
            if line not in done:
                done[line] = audited(folder, "command", LINES[line], until=until.get(line))
        return done[name]

    return of


@pytest.mark.long
@pytest.mark.parametrize("name", LINES)
def test_a_command_writes_nothing_elsewhere(name, ran):
    ran = ran(name)
    assert ran.ends == [0], ran.printed
    assert ran.elsewhere == []
    network = [one for one in ran.network if name not in SERVERS or not any(place in one[1] for place in HERE)]
    assert network == []


@pytest.mark.long
def test_importing_every_name_writes_nothing(tmp_path):
    clean(audited(tmp_path, "names"))
