"""Time one call with the harness of `prunekit bench`: SD 2.1's table, aligned widths, FLUX.1 and SD 3.5 medium.

Before a recipe is timed, the outputs of its dense model and of one sliced model are compared with the CPU's, in every
timed dtype and mode. In the step `table`, the harness's clock is also compared with another clock.
"""

import json
from collections.abc import Iterable
from functools import partial
from typing import Any

import small_model
import small_transformers
import torch
import yaml
from torch.utils.benchmark import Timer

import prunekit as pk
from benchmarks.gpu_suite import ROOT
from benchmarks.gpu_suite.record import Comparison, Found, Piece, Settings, UnfinishedError
from benchmarks.gpu_suite.reference import (
    DTYPES,
    TOLERANCES,
    applies,
    compared,
    exact_float32,
    free,
    on_cpu,
    running,
    with_exact_guidance,
)
from prunekit.core.call import Call, predict
from prunekit.core.registry import family_of
from prunekit.jobs.bench.bench_job import bench
from prunekit.jobs.bench.bench_models import choose, random_unet
from prunekit.jobs.bench.bench_recipe import ArchitectureConfig, BenchRecipe, CellConfig, load_bench_recipe
from prunekit.jobs.bench.bench_table import COLUMNS, shown
from prunekit.measuring.clock import timed_call, timed_inputs
from prunekit.measuring.interleaved import WarmUp, measure
from prunekit.models import load_shape
from prunekit.runtime.files import write_json, write_text
from prunekit.runtime.run_directory import DENSE

SD21 = ROOT / "recipes" / "bench_sd21_768.yaml"
TITLES = {
    "table": "Stable Diffusion 2.1 at 768 px: the cost columns of the APTP paper's Table 1, its A100 times beside ours",
    "widths": "Latency per MAC of whole layers and of widths, free and aligned: SD 2.1, latents of 96 x 96, bfloat16",
    "transformers": "FLUX.1 dev and SD 3.5 medium at 1024 px, random weights, dense and cut: one call in bfloat16",
}
TRANSFORMERS = {"flux.1-dev": "flux", "sd-3.5-medium": "sd35"}  # model: small model that replaces it with --reduced
ALIGNED = (None, 8, 16, 32, 64)
BUDGET = 0.65  # share of MACs kept by the architectures of the step "widths"
SHALLOW = {"num_layers": 2, "num_single_layers": 2}  # block counts of a full-width transformer that the CPU also runs
SHALLOW_LATENT = 32
CLOCK = {"cuda": 0.15, "cpu": 0.3}  # largest allowed relative difference of two clocks; a CPU may be busy
TRIES = 5


def step(name: str, settings: Settings) -> tuple[str, list[Piece]]:
    """Return a step's title and its pieces: outputs first, then the clock, then the times."""
    found = []
    for recipe in recipes(name, settings):
        outputs = Piece(f"{recipe.name}: outputs", partial(outputs_of, settings, recipe))
        found += (
            [outputs, Piece(f"{recipe.name}: clock", partial(clock_of, settings, recipe))]
            if name == "table"
            else [outputs]
        )
        found.append(Piece(f"{recipe.name}: times", partial(times_of, settings, recipe)))
    return TITLES[name], found


def recipes(name: str, settings: Settings) -> list[BenchRecipe]:
    """Return the benchmarks of a step; if reduced, of small models, in eager mode, with few samples."""
    if name == "transformers":
        return [transformer_recipe(model, settings) for model in TRANSFORMERS]
    recipe = load_bench_recipe(SD21)
    if name == "widths":
        pairs = [(how, align) for how in ("depth", "random") for align in ALIGNED]
        cuts = {
            f"{'mixed' if how == 'random' else how}_{BUDGET}{f'_align{align}' if align else ''}": ArchitectureConfig(
                budget=BUDGET, choose=how, align=align
            )
            for how, align in pairs
        }
        cells = [CellConfig(workload="unet", dtype="bfloat16", mode="compiled", repeats=30)]
        changes = {"name": "sd21_widths", "architectures": cuts, "cells": cells, "published": None}
        recipe = recipe.model_copy(update={**changes, "published_dense_seconds": None})
    if not settings.reduced:
        return [recipe]
    few = dict(list(recipe.architectures.items())[:: 9 if name == "table" else 3])
    folder = settings.output / "small" / "sd2"
    if not folder.is_dir():
        small_model.write_pipeline(folder)
    small = {"model": str(folder), "weights": "own", "resolution": 64, "architectures": few}
    return [reduced(recipe, small)]


def transformer_recipe(model: str, settings: Settings) -> BenchRecipe:
    """Return the benchmark of a transformer with random weights."""
    cuts = {f"{how}_0.7": ArchitectureConfig(budget=0.7, choose=how) for how in ("random", "depth")}
    name = model.replace(".", "_").replace("-", "_")
    cells = [CellConfig(workload="unet", dtype="bfloat16", repeats=10)]
    recipe = BenchRecipe(job="bench", name=name, model=model, resolution=1024, architectures=cuts, cells=cells)
    if not settings.reduced:
        return recipe
    folder = settings.output / "small" / TRANSFORMERS[model]
    small_transformers.build(TRANSFORMERS[model], "meta").save_config(folder)
    return reduced(recipe, {"model": str(folder), "resolution": 64})


def reduced(recipe: BenchRecipe, small: dict[str, Any]) -> BenchRecipe:
    """Return a benchmark with the changes `small`, in eager mode, with few samples and without CUDA graphs."""
    cells: list[CellConfig] = []
    for cell in (cell for cell in recipe.cells if cell.mode != "cuda_graph"):
        known = None if cell.architectures is None else [name for name in cell.architectures if name == DENSE]
        eager = cell.model_copy(update={"mode": "eager", "repeats": 2, "architectures": known})
        if eager not in cells:
            cells.append(eager)
    return recipe.model_copy(update={"guidance": 1.0, "steps": 1, "warmup_seconds": 0.2, "cells": cells, **small})


def outputs_of(settings: Settings, recipe: BenchRecipe) -> Found:
    """Compare one call of the dense model and of the first sliced model with the CPU, in every timed dtype and mode."""
    found = Found()
    ways = {(cell.dtype, cell.mode) for cell in recipe.cells if cell.workload == "unet"}
    for dtype, mode in sorted(ways):
        if reason := applies(mode, settings.device):
            found.left_out.append(f"{mode}: {reason}")
            continue
        for name, model, call in subjects(settings, recipe, dtype):
            with exact_float32(), torch.no_grad(), running([(model, call)], mode, settings.reduced):
                output = predict(model, call)
            what = f"{recipe.model if not settings.reduced else recipe.name}, {name}, {dtype}, {mode}"
            found.comparisons.append(compared(what, output, on_cpu(model, call), TOLERANCES[dtype]))
            del model
            free(settings.device)
    if recipe.model in TRANSFORMERS or settings.reduced:
        found.comparisons += law_of(settings, recipe)
    return found


def subjects(settings: Settings, recipe: BenchRecipe, dtype: str) -> Iterable[tuple[str, Any, Call]]:
    """Yield (name, model, call) for the dense model and for the first sliced model.

    A large transformer has only a few of its blocks.
    """
    source, resolution = recipe.model, recipe.resolution
    if recipe.model in TRANSFORMERS:
        source, resolution = shallow(settings, recipe.model), 8 * SHALLOW_LATENT
    shape = load_shape(source)
    latent = resolution // shape.vae_scale_factor
    model = random_unet(source, settings.device, DTYPES[dtype], recipe.seed)
    batch = family_of(model).call_batch(recipe.batch, recipe.guidance > 1)
    call = with_exact_guidance(timed_inputs(model, batch, latent, shape.text_length, recipe.seed))
    yield DENSE if source == recipe.model else f"{DENSE}, {SHALLOW['num_layers']} blocks of a kind", model, call
    name, config = next(iter(recipe.architectures.items()))
    architecture, _ = choose(config, shape.denoiser, latent, shape.text_length, recipe.seed)
    yield name, pk.slice_model(model, architecture), call


def shallow(settings: Settings, model: str) -> str:
    """Write a transformer's config with few blocks of the model's full width, and return its folder."""
    config = {key: value for key, value in load_shape(model).denoiser.config.items() if key != "_name_or_path"}
    config |= {key: value for key, value in SHALLOW.items() if key in config}
    folder = settings.output / "small" / f"shallow_{model}"
    write_json(folder / "config.json", json.loads(json.dumps(config, default=list)))
    return str(folder)


@torch.no_grad()
def law_of(settings: Settings, recipe: BenchRecipe) -> list[Comparison]:
    """Compare the whole model under gates with the model sliced to the same architecture, on the device (law 1)."""
    dtype = recipe.cells[0].dtype
    shape = load_shape(recipe.model)
    latent = recipe.resolution // shape.vae_scale_factor
    model = random_unet(recipe.model, settings.device, DTYPES[dtype], recipe.seed)
    call = timed_inputs(model, 1, latent, shape.text_length, recipe.seed)
    name, config = next(iter(recipe.architectures.items()))
    architecture, _ = choose(config, shape.denoiser, latent, shape.text_length, recipe.seed)
    with pk.gated(model, architecture.space) as gates:
        gates.set(architecture)
        masked = predict(model, call)
    sliced = predict(pk.slice_model(model, architecture), call)
    return [
        compared(f"{recipe.name}, {name}: under gates against sliced, on the device", masked, sliced, TOLERANCES[dtype])
    ]


@torch.no_grad()
def clock_of(settings: Settings, recipe: BenchRecipe) -> Found:
    """Compare the harness's median time of the dense and of the sliced model's call with another clock.

    The other clock is triton's `do_bench` on a GPU, and torch's `Timer` on a CPU.
    """
    found, kind = Found(), settings.device.type
    for name, model, call in subjects(settings, recipe, recipe.cells[0].dtype):
        timed, rows = timed_call(model, call), []
        for _ in range(TRIES):  # other load of the machine may disturb one of the two measurements
            ours = measure({name: timed}, 10, settings.device, WarmUp(max_seconds=5.0)).arms[name].p50
            theirs = other_clock(timed, kind)
            rows.append((abs(ours / theirs - 1), ours, theirs))
            if rows[-1][0] <= CLOCK[kind]:
                break
        error, ours, theirs = min(rows)
        other = "triton's do_bench" if kind == "cuda" else "torch.utils.benchmark"
        found.rows.append({"call": name, "ours (ms)": 1e3 * ours, f"{other} (ms)": 1e3 * theirs})
        found.comparisons.append(Comparison(f"{name}: time, relative difference to {other}", error, CLOCK[kind]))
    return found


def other_clock(timed: Any, kind: str) -> float:
    """Return the median seconds of a call, measured without prunekit's harness."""
    if kind == "cuda":
        from triton.testing import do_bench

        return 1e-3 * float(do_bench(timed, return_mode="median"))
    return Timer("timed()", globals={"timed": timed}).blocked_autorange(min_run_time=0.1).median


def times_of(settings: Settings, recipe: BenchRecipe) -> Found:
    """Time the missing rows, and return all rows.

    Raises:
        UnfinishedError: The time is up; the finished rows are kept.

    """
    path = settings.output / f"{recipe.name}.yaml"
    write_text(path, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    output = settings.output / recipe.name
    page, _, rows, is_done = bench(
        path, (), output, settings.minutes_left, say=lambda text: print(f"   {text}", flush=True)
    )
    if not is_done:
        raise UnfinishedError(f"{len(rows)} rows are finished, in {page}; start the same command again for the others")
    header, lines = shown(rows, recipe, COLUMNS)
    return Found(rows=[dict(zip(header, line, strict=True)) for line in lines])
