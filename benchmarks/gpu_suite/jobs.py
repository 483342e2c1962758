"""Run whole jobs on the embedded models: the transformer's pre-training, and the comparison of methods with more seeds.

Both jobs are prunekit commands. They are stopped when the time is up, and the next call resumes them. Before they
start, the same jobs at the size of a smoke test run with and without the GPU, and the results are compared.
"""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import small_model
import yaml

from benchmarks.gpu_suite import ROOT
from benchmarks.gpu_suite.record import Comparison, Found, Piece, Row, Settings, UnfinishedError
from benchmarks.gpu_suite.reference import GRADIENT, TOLERANCES
from prunekit.runtime.files import read_json, write_text
from prunekit.runtime.run_directory import CELLS, LOG, RESULTS
from prunekit.runtime.termination import REQUEUE

TITLE = "Jobs: pre-training of the embedded transformer, and the comparison on Emoji-64 with more seeds"
PRETRAIN, COMPARE = (ROOT / "recipes" / name for name in ("pretrain_emoji_sd3.yaml", "compare_emoji.yaml"))
MORE_SEEDS = 2  # factor on the number of seeds of the shipped comparison
PRECISION = "bfloat16"  # precision of the smoke tests on the device
STEPS = {"steps": 8, "batch_size": 8, "warmup_steps": 0, "decay_share": 0.0, "log_every": 1}  # pre-training settings;
# the model's output is 0 at first, so the first losses are the same in any precision
DRAWING = {"num_images": 4, "steps": 2, "batch_size": 4}
LOSS = 0.02  # largest allowed relative difference between the device's and the CPU's pre-training loss
SMOKE_COMPARE = ["scale=smoke", "pairs=[]", "budgets=[{budget: 0.5, seeds: [0], methods: [norm]}]"]
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "PRUNEKIT_PROCESSES": "1"}
PICTURES = 24  # number of pictures in the data of the smoke tests
MARGIN = 30.0  # a job gets SIGTERM this many seconds before the deadline


def step(name: str, settings: Settings) -> tuple[str, list[Piece]]:
    """Return the step's title and its pieces."""
    found = [
        Piece("pre-training: first steps", partial(first_steps, settings)),
        Piece("comparison: one cell", partial(one_cell, settings)),
    ]
    if not settings.reduced:
        found += [
            Piece("pre-training", partial(pretrained, settings)),
            Piece("comparison", partial(compared, settings)),
        ]
    return TITLE, found


def command(arguments: list[str], settings: Settings, variables: dict[str, str] | None = None) -> None:
    """Run a prunekit command, and append its output to `jobs.log` in the output folder.

    Raises:
        UnfinishedError: The time is up, and the command has saved its state.
        RuntimeError: The command failed.

    """
    log = settings.output / "jobs.log"
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "prunekit", *arguments],
            env={**os.environ, **(variables or {})},
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )
        try:
            status = process.wait(max(1.0, 60 * settings.minutes_left - MARGIN))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            status = process.wait()
        finally:
            if process.poll() is None:  # this process itself was told to stop
                process.terminate()
                process.wait()
    if status in (REQUEUE, -signal.SIGTERM):
        raise UnfinishedError("out of time; the state is saved, start the same command again to resume")
    if status:
        raise RuntimeError(f"prunekit {' '.join(arguments[:2])} ended with status {status}: see {log}")


def twice(arguments: list[str], name: str, option: str, settings: Settings, float32: list[str]) -> tuple[Path, Path]:
    """Run a command on the device and on the CPU, and return both result directories.

    float32: extra settings of the run on the CPU, which is the reference.
    """
    folders = settings.output / "smoke" / name, settings.output / "smoke" / f"{name}_cpu"
    command([*arguments, option, str(folders[0].absolute())], settings)
    command([*arguments, *float32, option, str(folders[1].absolute())], settings, ON_CPU)
    return folders


def small_data(settings: Settings, holdout: float) -> str:
    """Write a few pictures, and return the override that uses them as data; encoding a recipe's data takes long."""
    folder = settings.output / "small" / "pictures"
    if not folder.is_dir():
        names = [f"{small_model.CAPTIONS[index % 12]} number {index}" for index in range(PICTURES)]
        colors = [small_model.COLORS[index % 4] for index in range(PICTURES)]
        samples = [(small_model.picture(color), name) for color, name in zip(colors, names, strict=True)]
        small_model.write_shard(folder / "0.tar", samples)
    return f"data={{kind: webdataset, path: {folder.absolute()}, holdout: {holdout}}}"


def first_steps(settings: Settings) -> Found:
    """Compare the losses of the first pre-training steps on the device and on the CPU."""
    small = {"diffusion": {**STEPS, "precision": PRECISION}, "evaluation": DRAWING, "milestones": []}
    changes = [f"{name}={json.dumps(value)}" for name, value in small.items()]
    arguments = ["run", str(PRETRAIN), *changes, small_data(settings, 0.0)]
    folders = twice(arguments, "pretrain", "--directory", settings, ["diffusion.precision=float32"])
    here, there = (losses(folder / LOG) for folder in folders)
    assert here.keys() == there.keys() and here, (here, there)
    return Found(
        comparisons=[
            Comparison(f"loss of step {step}, {PRECISION}, relative", abs(here[step] / there[step] - 1), LOSS)
            for step in there
        ]
    )


def losses(path: Path) -> dict[int, float]:
    """Return the losses in a run's log, by step."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def one_cell(settings: Settings) -> Found:
    """Compare one cell of a small comparison (one method at one budget): MACs, and agreement with the dense model."""
    precision = [f"fine_tune.precision={PRECISION}", f"evaluation.precision={PRECISION}"]
    float32 = ["fine_tune.precision=float32", "evaluation.precision=float32"]
    arguments = ["compare", str(COMPARE), *SMOKE_COMPARE, small_data(settings, 0.25), *precision]
    here, there = map(cell, twice(arguments, "compare", "--output", settings, float32))
    difference = abs(here["agreement"] / there["agreement"] - 1)
    return Found(
        rows=[{"on": "device", **here}, {"on": "CPU", **there}],
        comparisons=[
            Comparison("MACs of the cut, difference", float(abs(here["macs"] - there["macs"])), 0.5),
            Comparison(
                f"agreement with the dense model, {PRECISION}, relative", difference, GRADIENT * TOLERANCES[PRECISION]
            ),
        ],
    )


def cell(folder: Path) -> dict[str, float]:
    """Return the compared figures of the only pruned cell of a comparison."""
    results = [read_json(path) for path in sorted((folder / CELLS).glob("*.json"))]
    (figures,) = [result["figures"] for result in results if result["cell"]["method"] != "dense"]
    return {"agreement": figures["agreement"], "macs": figures["macs"]}


def pretrained(settings: Settings) -> Found:
    """Run or resume the pre-training, and return its quality curve."""
    folder = settings.output / "pretrain_emoji_sd3"
    command(["run", str(PRETRAIN), "--directory", str(folder.absolute())], settings)
    return Found(rows=read_json(folder / "curve.json"))


def compared(settings: Settings) -> Found:
    """Compute the missing cells of the comparison, and return its rows."""
    recipe = yaml.safe_load(COMPARE.read_text(encoding="utf-8"))
    recipe["name"] = "compare_emoji_seeds"
    for entry in recipe["budgets"]:
        entry["seeds"] = list(range(MORE_SEEDS * len(entry["seeds"])))
    path, folder = settings.output / "compare_emoji_seeds.yaml", settings.output / "compare_emoji_seeds"
    write_text(path, yaml.safe_dump(recipe, sort_keys=False))
    try:
        command(["compare", str(path.absolute()), "--output", str(folder.absolute())], settings)
    except UnfinishedError as left:
        made = len(list((folder / CELLS).glob("*.json")))
        raise UnfinishedError(f"{made} cells are finished; {left}") from left
    return Found(rows=[flat(row) for row in read_json(folder / RESULTS)["rows"]])


def flat(row: dict[str, Any]) -> Row:
    """Return the entries of a row that are strings or numbers."""
    return {name: value for name, value in row.items() if isinstance(value, str | int | float)}
