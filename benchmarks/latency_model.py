"""Compare a latency table's predictions with measured times, on architectures that the table was not made from.

A table is measured for the UNet (`--table FILE` stores it, or reads it if the file exists). Then held-out architectures
with widths and whole layers removed at random, which keep 0.5 to 0.9 of the units, are sliced and timed in turn with
the dense UNet. The last two architectures are the choices of `select` from the same random scores, for a budget in MACs
and for a budget in time.
Run: python benchmarks/latency_model.py [--model emoji] [--count 12] [--pairs 9]
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import prunekit as pk
from prunekit.jobs.bench.bench_models import random_unet
from prunekit.measuring.clock import timed_call, timed_inputs
from prunekit.measuring.environment import environment
from prunekit.measuring.interleaved import WarmUp, measure
from prunekit.measuring.latency_model import LatencyModel
from prunekit.measuring.latency_table import LatencyTable, conditions_of
from prunekit.measuring.layer_times import measure_table
from prunekit.methods import Random, select
from prunekit.models import load_pipeline
from prunekit.runtime.files import write_json

BUDGET = 0.7


def table_of(unet, cost: pk.CostModel, batch: int, file: str) -> LatencyTable:
    """Return the table in `file`; if there is none, measure it, print how long this took, and write it to `file`."""
    conditions = conditions_of(unet, cost.sample_size, cost.text_length, batch, unet.dtype)
    if file and Path(file).is_file():
        table = LatencyTable.from_dict(json.loads(Path(file).read_text(encoding="utf-8")))
        table.refuse(conditions)
        return table
    start = time.monotonic()
    table = measure_table(unet, cost.sample_size, cost.text_length, batch, unet.dtype)
    print(f"table of {len(table.layers)} layers measured in {time.monotonic() - start:.0f} s", flush=True)
    if file:
        write_json(Path(file), table.to_dict())
    return table


def main() -> None:
    """Print one line per architecture, and the median and largest error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("sd-2.1", "emoji"), default="sd-2.1")
    parser.add_argument("--count", type=int, default=12, help="held-out architectures")
    parser.add_argument("--pairs", type=int, default=9, help="interleaved samples of each")
    parser.add_argument("--table", default="", help="file of the table")
    given = parser.parse_args()
    here = environment("cpu")
    print(", ".join(f"{key} {here[key]}" for key in ("device", "cores", "load", "torch", "diffusers")))
    if given.model == "emoji":
        pipeline = load_pipeline("emoji")
        unet, batch = pipeline.unet, 2
        latent, text = unet.config.sample_size, pipeline.tokenizer.model_max_length
    else:
        unet, batch = random_unet("sd-2.1", torch.device("cpu"), torch.bfloat16, 0), 1
        latent, text = 32, 77
    unet = unet.eval().requires_grad_(False)
    cost = pk.CostModel(unet, pk.discover(unet, "all"), latent, text)
    model = LatencyModel(unet, cost, table_of(unet, cost, batch, given.table))
    print(f"{given.model}, {unet.dtype}, latent {latent}, batch {batch}: dense {1e-6 * model.dense_total:.1f} ms")
    print("what                 MACs   predicted  measured [95 %]          noise  error   latency per MAC  dense (ms)")
    inputs = timed_inputs(unet, batch, latent, text)

    def check(name: str, architecture: pk.Architecture) -> float:
        """Print an architecture's line; return the prediction's relative error."""
        pruned = pk.slice_unet(unet, architecture)
        with torch.no_grad():
            calls = {"dense": timed_call(unet, inputs), "pruned": timed_call(pruned, inputs)}
            measured = measure(calls, given.pairs, "cpu", WarmUp(max_rounds=8, max_seconds=20.0))
        ratio, macs, predicted = measured.ratio("pruned"), cost.ratio(architecture), model.latency_ratio(architecture)
        dense = 1e3 * measured.arms["dense"].p50
        error = predicted / ratio.value - 1
        line = f"{name:<20} {macs:.3f}  {predicted:.3f}      {ratio}  {measured.noise.distance:6.1%}  {error:+6.1%}"
        print(f"{line}  {ratio.value / macs:.3f}            {dense:.1f}", flush=True)
        return abs(error)

    keeps = [0.5 + 0.4 * index / max(1, given.count - 1) for index in range(given.count)]
    errors = [check(f"keep {keep:.2f}", cost.space.random(keep, seed=seed)) for seed, keep in enumerate(keeps)]
    if errors:
        print(f"error: median {statistics.median(errors):.1%}, largest {max(errors):.1%}, of {len(errors)}")
    scores = Random(depth="all").score(unet)
    check(f"{BUDGET} of the MACs", select(scores, cost, BUDGET))
    check(f"{BUDGET} of the time", select(scores, model, BUDGET))


if __name__ == "__main__":
    main()
