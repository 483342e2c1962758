"""diffusers' own tests of its transformers, run with pruned models in place of the stock classes.

The tests are in `tests/` of diffusers' repository, which its wheel lacks; none of them is copied here. Each suite runs
twice: with the stock models, and with every model cut at random (the first block of each list stays). Tests whose
outcome differs between the two are listed with the reason.

    git clone --depth 1 --branch v0.40.0 https://github.com/huggingface/diffusers && rm -r diffusers/src
    python benchmarks/diffusers_suites.py diffusers --output docs/results/diffusers_suites
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import diffusers
import pytest
import torch

from prunekit.core.discovery import discover
from prunekit.core.registry import denoiser_of
from prunekit.core.slicing import slice_model
from prunekit.core.space import Architecture

SUITES = {
    "SD3Transformer2DModel": "test_models_transformer_sd3.py",
    "FluxTransformer2DModel": "test_models_transformer_flux.py",
    "QwenImageTransformer2DModel": "test_models_transformer_qwenimage.py",
    "PixArtTransformer2DModel": "test_models_pixart_transformer2d.py",
}
FOLDER = "tests/models/transformers"
KEEP, CUTS = "PRUNEKIT_KEEP", "PRUNEKIT_CUTS"  # environment variables: share of units to keep; file that lists the cuts
SEED = 0
TIMEOUT = 300  # seconds per test


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Replace the stock classes by pruned classes if KEEP is set; pytest loads this file as a plugin."""
    if KEEP in os.environ:
        for kind in {item.cls for item in items if getattr(item, "cls", None) is not None}:
            _put_pruned(kind, float(os.environ[KEEP]))


def _put_pruned(kind: type, keep: float) -> None:
    given: Any = getattr(kind, "model_class", None)
    dense = given.fget(None) if isinstance(given, property) else given
    if getattr(dense, "__name__", None) not in SUITES or issubclass(dense, denoiser_of(dense).pruned_class()):
        return
    stand_in = _stand_in(dense)
    kind.model_class = property(lambda self: stand_in) if isinstance(given, property) else stand_in
    if hasattr(kind, "get_init_dict"):
        settings = kind.get_init_dict
        kind.get_init_dict = lambda self: _with_pruning(kind, dense, settings(self), keep)
    else:
        both = kind.prepare_init_args_and_inputs_for_common

        def prepared(self: Any) -> tuple[dict[str, Any], Any]:
            config, inputs = both(self)
            return _with_pruning(kind, dense, config, keep), inputs

        kind.prepare_init_args_and_inputs_for_common = prepared


def _stand_in(dense: type) -> type:
    """Return the pruned class under the stock class's name, which some tests look for."""
    pruned = denoiser_of(dense).pruned_class()
    return type(dense.__name__, (pruned,), {"__module__": dense.__module__})


def _with_pruning(kind: type, dense: Any, config: dict[str, Any], keep: float) -> dict[str, Any]:
    """Return a test's config with a random cut; append the cut to the file CUTS under the test class's name."""
    if "pruning" in config:
        return config
    with torch.device("meta"):
        model = dense(**config)
    space = discover(model, "all")
    values = space.random(keep, SEED).values.clone()
    for group in space.depth_groups:
        if group.path.endswith(".0"):  # the first block of each list stays: some suites' models have no other
            values[space.slice(group)] = True
    pruning = dict(slice_model(model, Architecture(space, values)).config["pruning"])
    gone = [*pruning["removed"], *(name for name, kept in pruning["kept"].items() if not kept)]
    with Path(os.environ[CUTS]).open("a", encoding="utf-8") as file:
        file.write(json.dumps([kind.__name__, gone]) + "\n")
    return {**config, "pruning": pruning}


def run(repository: Path, keep: float | None, cuts: Path) -> dict[str, tuple[str, str]]:
    """Run the suites and return (outcome, reason) of every test, by suite and name.

    keep: share of units that cut models keep; None: stock models. cuts: file that gets one line per cut model, [test
    class, removed layers].
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"} | ({} if keep is None else {KEEP: str(keep), CUTS: str(cuts)})
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    outcomes = {}
    for name, file in SUITES.items():
        with tempfile.TemporaryDirectory() as scratch:
            report = Path(scratch) / "report.xml"
            options = ["-q", "-p", "no:cacheprovider", f"--timeout={TIMEOUT}", f"--junitxml={report}"]
            command = [sys.executable, "-m", "pytest", "-p", Path(__file__).stem, *options, f"{FOLDER}/{file}"]
            subprocess.run(
                command, cwd=repository, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            for case in ElementTree.parse(report).iter("testcase"):
                verdict = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
                key = f"{name}: {case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
                outcomes[key] = ("passed", "") if verdict is None else (verdict.tag, verdict.get("message") or "")
    return outcomes


def _told(outcomes: dict[str, tuple[str, str]]) -> dict[str, list[str]]:
    """Return the outcomes of tests that were not skipped, with a shortened reason for tests that did not pass."""
    return {
        key: [what, " ".join(why.split())[:200]] if why else [what]
        for key, (what, why) in outcomes.items()
        if what != "skipped"
    }


def main() -> None:
    """Run the suites with stock and with cut models, print counts and differences, and write all outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path, help="a checkout of diffusers without its src/")
    parser.add_argument("--keep", type=float, default=0.6, help="share of the units that cut models keep")
    parser.add_argument("--output", type=Path, help="a folder for results.json, with every outcome")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        cuts = Path(scratch) / "cuts.jsonl"
        stock, cut = run(given.repository, None, cuts), run(given.repository, given.keep, cuts)
        gone: dict[str, list[str]] = {}
        for line in cuts.read_text(encoding="utf-8").splitlines():
            kind, layers = json.loads(line)
            gone[kind] = sorted({*gone.get(kind, []), *layers})
    lines = ["| class | tests | stock | cut |", "|---|---|---|---|"]
    for name in SUITES:
        keys = [key for key in stock if key.startswith(f"{name}:")]
        counts = [Counter(outcomes.get(key, ("missing", ""))[0] for key in keys) for outcomes in (stock, cut)]
        texts = [", ".join(f"{count} {what}" for what, count in sorted(counter.items())) for counter in counts]
        lines.append(f"| {name} | {len(keys)} | {texts[0]} | {texts[1]} |")
    worse = {key: cut[key] for key in cut if cut[key][0] != stock.get(key, ("missing", ""))[0]}
    lines += ["", f"Outcomes that differ: {len(worse)}", ""]
    for key, (what, why) in worse.items():
        kind = key.partition(": ")[2].partition("::")[0]
        lines.append(f"- `{key}`: {what}, {' '.join(why.split())[:200]}. Gone: {', '.join(gone.get(kind, []))}.")
    about = f"diffusers {diffusers.__version__}, torch {torch.__version__}, keep {given.keep}"
    print("\n".join([about, *lines]))
    if given.output is not None:
        given.output.mkdir(parents=True, exist_ok=True)
        content = {"about": about, "stock": _told(stock), "cut": _told(cut), "gone": gone}
        (given.output / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
