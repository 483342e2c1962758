"""`prunekit bench`: time a recipe's architectures, or a run's pruned models, on this machine's device."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from prunekit.jobs.bench.bench_recipe import (
    JOB,
    ArchitectureConfig,
    BenchRecipe,
    CellConfig,
    load_bench_recipe,
    reduced,
)
from prunekit.jobs.bench.bench_rows import Row
from prunekit.jobs.bench.bench_table import markdown
from prunekit.jobs.bench.runner import Bench
from prunekit.models import load_shape, quiet_libraries
from prunekit.runtime.errors import UserError
from prunekit.runtime.files import write_text
from prunekit.runtime.run_directory import METHODS, RECIPE, read_recipe
from prunekit.runtime.work import occupied, refuse_foreign

TABLE = "table.md"


def bench(
    target: Path,
    overrides: Iterable[str] = (),
    output: Path | None = None,
    minutes: float | None = None,
    small: bool = False,
    say: Callable[[str], Any] = print,
) -> tuple[Path, BenchRecipe, list[Row], bool]:
    """Time the models of a target, row by row; rows that exist are not measured again.

    Args:
        target: a recipe with job: bench, or a run's directory, for its dense model and all its finished experts.
        overrides: `key=value` settings that replace those of the recipe.
        output: directory of rows and table; runs/NAME or RUN/bench by default.
        minutes: time limit; no row starts that would end later. None: no limit.
        small: use the reduced form, for a CPU.
        say: called with a line for every row.

    Returns:
        The table's path, the recipe, the finished rows of all devices, and whether this device has measured all rows.

    """
    quiet_libraries()
    if target.is_dir():
        if list(overrides):
            raise UserError(f"{target} is a run and takes no KEY=VALUE; write a recipe with job: {JOB} instead")
        recipe, default = run_recipe(target), target / "bench"
    else:
        recipe = load_bench_recipe(target, overrides)
        default = None
    recipe = reduced(recipe) if small else recipe
    directory = output or default or Path("runs") / recipe.name
    with occupied(directory, lambda others: _claim(directory)):
        work = Bench(recipe, directory, say)
        is_done = work.run(minutes)
        rows = work.rows()
        path = directory / TABLE
        write_text(path, markdown(rows, recipe))
    return path, recipe, rows, is_done


def _claim(directory: Path) -> None:
    """Refuse a directory that holds files other than a benchmark's rows and table."""
    is_bench = (directory / TABLE).is_file() or bool(list(directory.glob("*/*.json")))
    refuse_foreign(directory, is_bench and not (directory / RECIPE).is_file(), "benchmark")


def run_recipe(directory: Path) -> BenchRecipe:
    """Return the benchmark of a run: its dense model and its finished experts, at the model's resolution.

    Raises FileNotFoundError for a directory without a run, ValueError for one without a finished expert.
    """
    settings = read_recipe(directory)
    folders = sorted(directory.glob(f"{METHODS}/*/experts/[0-9]*/unet/config.json"))
    if not folders:
        raise UserError(f"{directory} has no finished expert yet; resume it first: prunekit resume {directory}")
    experts = {}
    for config in folders:
        unet = config.parent
        name = f"{unet.parents[2].name}_{unet.parent.name}"
        experts[name] = ArchitectureConfig(path=str(unet))
    height, width = load_shape(settings["model"], settings.get("single_file_config")).resolution
    if height != width:
        raise UserError(f"{settings['model']} is made for {height} x {width} pixels; a benchmark needs square pictures")
    cells = [CellConfig(workload="unet"), CellConfig(workload="image", repeats=10)]
    if torch.cuda.is_available():
        cells.insert(1, CellConfig(workload="unet", dtype="bfloat16", mode="compiled"))
    evaluation = settings.get("evaluation") or {}
    return BenchRecipe(
        job=JOB,
        name=f"bench_{directory.name}",
        model=settings["model"],
        weights="own",
        resolution=height,
        guidance=evaluation.get("guidance", 7.5),
        steps=evaluation.get("steps", 25),
        architectures=experts,
        cells=cells,
    )
