"""`prunekit compare`: compute the missing cells, and write one table and one picture of all cells."""

import json
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from prunekit.evaluation.table import Column, markdown_table, terminal_table, warning_lines
from prunekit.jobs.compare.call_ratios import cell_ratio
from prunekit.jobs.compare.cell_runner import CellRunner
from prunekit.jobs.compare.fairness import refuse_unfair
from prunekit.jobs.recipe import (
    CompareRecipe,
    RecipeError,
    dump_recipe,
    load_recipe,
    load_recorded,
    parse_recipe,
    precision_lines,
    resolve_recipe,
)
from prunekit.jobs.reporting import finish
from prunekit.jobs.stages import RunLog, Stages
from prunekit.jobs.timeline import rounded
from prunekit.report.comparison_table import (
    PAIR_COLUMNS,
    PROTOCOLS,
    TIMINGS,
    Cell,
    Result,
    csv_text,
    json_rows,
    known_lines,
    paired_lines,
    paired_rows,
    rows_of,
    shown_rows,
    verdict,
    warnings_of,
)
from prunekit.report.pareto import pareto_picture
from prunekit.report.source import Source
from prunekit.report.wall import comparison_sheet
from prunekit.runtime.engines import executor_of
from prunekit.runtime.executors import Call, Executor, OnePiece
from prunekit.runtime.files import read_json, write_json, write_text
from prunekit.runtime.processes import apart, current, is_companion
from prunekit.runtime.progress import Log
from prunekit.runtime.run_directory import CELLS, DENSE, RECIPE, RESULTS, WORK
from prunekit.runtime.screen import stdout_console
from prunekit.runtime.work import Piece, occupied, refuse_foreign

SHEET = "comparison.png"
TABLE_CSV = "table.csv"  # of a comparison's directory
NOTE = (
    "Each figure: mean ± seeds / pictures, half of its 95 % intervals over the seeds (Student's t; – for one seed) and "
    "over the pictures of one seed (1.96 jackknife errors). **Bold**: the best pruned row. ≈: it cannot be told from "
    "the best row (paired by seed, Holm's correction over the rows; with one seed: the intervals overlap)."
)
PAIRS_NOTE = (
    "Differences of the pairs that the recipe names, paired by seed: mean and 95 % interval (Student's t), and p with "
    "Holm's correction over all of them."
)


def claim(directory: Path, recipe: CompareRecipe | None = None) -> CompareRecipe | None:
    """Write a comparison's resolved recipe into its directory, or claim the directory for a table alone.

    Returns the resolved recipe. Raises UserError where the directory holds something else, such as a run.
    """
    path = directory / RECIPE
    recorded = load_recorded(path) if path.is_file() else None
    is_ours = any((directory / name).exists() for name in (CELLS, WORK, TABLE_CSV))
    if recorded is not None and not isinstance(recorded, CompareRecipe):
        raise RecipeError(f"{directory} holds the run of a recipe with job={recorded.job}; choose another --output")
    refuse_foreign(directory, is_ours or recorded is not None, "comparison")
    if recorded is not None and recipe is not None and recorded.name != recipe.name:  # they share cells
        path = directory / f"recipe-{recipe.name}.yaml"
        recorded = load_recorded(path) if path.is_file() else None
    if recipe is not None:
        recipe = resolve_recipe(recipe, current().device, recorded)
        write_text(path, dump_recipe(recipe))
    return recipe


class Comparison:
    """One comparison recipe, resolved, in its directory."""

    def __init__(self, recipe: CompareRecipe, directory: Path, log: Log | None = None):
        """Load the model and the data; log: the directory's log by default."""
        self.recipe, self.directory, self.log = recipe, directory, log or RunLog.of(recipe, directory)
        self.stages = Stages(recipe, self.log, directory)
        self.stages.evaluator  # noqa: B018 - a missing evaluator is an error before any work
        self.runner = CellRunner(recipe, directory, self.stages)
        self.cells = self.runner.cells
        self.began, self.at_start = time.monotonic(), self._count()  # for the time left

    def make(self, executor: Executor) -> None:
        """Compute the missing cells, except those that another launch on this directory is computing."""

        def make(number: int, cell: Cell) -> None:
            self.log.say(f"cell {number} of {len(self.cells)}: {cell.title}{self._time_left()}")
            self.runner.run(cell)

        pieces = [
            Piece(cell.choice, partial(self._has, cell), partial(make, number, cell))
            for number, cell in enumerate(self.cells, start=1)
        ]
        recipe = self.recipe.model_dump(mode="json")
        call = Call.of(make_one, recipe=recipe, directory=str(self.directory.absolute()))
        launched = current().count > 1
        with apart():
            executor.map(pieces, self.directory / WORK / "locks", call, wait=launched)

    def _has(self, cell: Cell) -> bool:
        return self.runner.finished(cell) is not None

    def _count(self) -> int:
        """Return the number of finished cells of pruned models; the dense model's cells are quick."""
        return sum(cell.label != DENSE and self._has(cell) for cell in self.cells)

    def _time_left(self) -> str:
        """Return the time left, for a line; empty before the first cell of a pruned model is finished.

        The pace is that of all processes that share the directory: the cells finished since this process began.
        """
        finished = self._count()
        if finished == self.at_start:
            return ""
        pace = (time.monotonic() - self.began) / (finished - self.at_start)
        missing = sum(not self._has(cell) for cell in self.cells)
        return f", about {rounded(pace * missing)} left"

    def results(self) -> tuple[list[Result], list[Cell]]:
        """Return the finished cells' results, and the cells that are missing."""
        results = [(cell, self.runner.finished(cell)) for cell in self.cells]
        return [result for _, result in results if result], [cell for cell, result in results if not result]

    def timings(self, cells: Sequence[Result]) -> dict[str, float]:
        """Return each cell's time of a denoiser call, relative to the dense model's; measured once, in this process."""
        path = self.directory / TIMINGS
        timings = read_json(path) if path.is_file() else {}
        for cell in cells:
            if cell["models_folder"] not in timings and cell["cell"]["method"] != DENSE:
                ratio = cell_ratio(cell, self.directory, self.stages)
                if ratio is not None:
                    timings[cell["models_folder"]] = ratio
                    write_json(path, timings)
        return timings


@lru_cache(maxsize=1)
def _opened(recipe: str, directory: str, log: Log) -> Comparison:
    """Return a comparison, and cache it so that its model and data stay in memory for its next cell."""
    content = parse_recipe(json.loads(recipe))
    assert isinstance(content, CompareRecipe), "it is a comparison's"
    return Comparison(content, Path(directory), log)


def make_one(executor: OnePiece, recipe: dict[str, Any], directory: str) -> None:
    """Compute one cell of a comparison, on a node of a cluster."""
    _opened(json.dumps(recipe), directory, executor.log).make(executor)


def compare(
    paths: Sequence[str | Path],
    overrides: Iterable[str] = (),
    output: str | Path | None = None,
) -> Path:
    """Run comparisons, or read finished ones; write `results.json`, `table.csv`, `table.md` and two pictures.

    `pareto.png` shows quality against cost, `comparison.png` pictures of every row (if the cells' pictures are there).

    paths: comparison recipes, whose missing cells are computed, and directories with finished `cells/`.
    output: directory of the cells and the table; by default `runs/NAME` of each recipe, and the table in the directory
        of the first path.
    Several processes may share a directory: each computes cells that no other is computing, and then shows the finished
    cells. Returns the directory of the table. Raises RecipeError for a path that is not a comparison, and ValueError
    with the field that differs for cells that cannot share a table.
    """
    overrides, sources = list(overrides), [Path(path) for path in paths]
    cells: list[Result] = []
    timings: dict[str, float] = {}
    missing: list[Cell] = []
    published: list[dict[str, Any]] = []
    pairs: list[list[str]] = []
    names: list[str] = []
    recipes = {path: _load(path, overrides) for path in sources if not path.is_dir()}
    if empty := next((path for path in sources if path.is_dir() and not list((path / CELLS).glob("*.json"))), None):
        raise RecipeError(f"{empty} holds no cells of a comparison")
    folders = [Path(output or (path if path.is_dir() else Path("runs") / recipes[path].name)) for path in sources]
    with ExitStack() as stack:

        def enter(folder: Path, recipe: CompareRecipe | None = None) -> CompareRecipe | None:
            return stack.enter_context(occupied(folder, lambda others: claim(folder, recipe)))

        enter(folders[0])  # before any work starts
        for path, folder in zip(sources, folders, strict=True):
            if path.is_dir():
                finished = [read_json(file) for file in sorted((path / CELLS).glob("*.json"))]
                times = read_json(path / TIMINGS) if (path / TIMINGS).is_file() else {}
            else:
                resolved = enter(folder, recipes[path])
                assert resolved is not None, "a recipe was given"
                log = RunLog.of(resolved, folder)
                for line in precision_lines(resolved, current().device):
                    log.say(line)
                comparison = Comparison(resolved, folder, log)
                with executor_of(recipes[path].engine, log) as executor:
                    comparison.make(executor)
                finished, lacking = comparison.results()
                missing += lacking
                times = {} if lacking or is_companion() else comparison.timings(finished)
                published += comparison.recipe.published
                pairs += comparison.recipe.pairs
                names.append(comparison.recipe.name)
            cells += finished
            timings |= times
        if is_companion():
            return folders[0]
        refuse_unfair(cells)
        return _write(folders[0], names, cells, timings, missing, published, pairs)


def _load(path: Path, overrides: list[str]) -> CompareRecipe:
    recipe = load_recipe(path, overrides)
    if not isinstance(recipe, CompareRecipe):
        raise RecipeError(f"{path} is a recipe of job={recipe.job}; compare takes job=compare")
    return recipe


def _write(
    folder: Path,
    recipes: list[str],
    cells: list[Result],
    timings: dict[str, float],
    missing: list[Cell],
    published: list[dict[str, Any]],
    pairs: list[list[str]],
) -> Path:
    """Write and print the tables of the finished cells."""
    console = stdout_console()
    rows = rows_of(cells, timings)
    warnings, tested = warnings_of(cells), paired_rows(rows, pairs)
    content: dict[str, Any] = {
        "recipes": recipes,
        "rows": json_rows(rows),
        "missing": [cell.name for cell in missing],
        "published": published,
        "warnings": warnings,
        "pairs": tested,
    }
    write_json(folder / RESULTS, {"environments": _environments(cells), **content})
    write_text(folder / TABLE_CSV, csv_text(rows))
    parts = ["\n\n".join([NOTE, *known_lines(cells)]) + "\n"]
    for protocol in dict.fromkeys(row.protocol for row in rows):
        for budget in dict.fromkeys(row.budget for row in rows):
            section = [row for row in rows if row.protocol == protocol and row.budget == budget]
            if section:
                lines, columns = shown_rows(section)
                heading = f"Budget {budget}, {PROTOCOLS[protocol]}"
                parts += [f"## {heading}\n", markdown_table(lines, columns)]
                console.print(terminal_table(lines, columns, heading, console.width))
    console.print("**: the best pruned row of a figure. ≈: a row that cannot be told from the best.", markup=False)
    if tested:
        lines = paired_lines(tested)
        parts += ["## Pairs\n", f"{PAIRS_NOTE}\n", markdown_table(lines, PAIR_COLUMNS)]
        console.print(terminal_table(lines, PAIR_COLUMNS, "Pairs", console.width))
    parts += warning_lines(warnings)
    for warning in warnings:
        console.print(f"warning: {warning}", markup=False)
    if published:
        columns = [Column(key, key) for key in dict.fromkeys(key for row in published for key in row)]
        parts += ["## As published\n", markdown_table(published, columns)]
        console.print(terminal_table(published, columns, "As published", console.width))
    if missing:
        parts += [f"Missing cells ({len(missing)}): {', '.join(cell.name for cell in missing)}\n"]
        console.print(f"{len(missing)} of {len(cells) + len(missing)} cells are still missing", markup=False)
    write_text(folder / "table.md", "\n".join(parts))
    if any(row.method != DENSE for row in rows):
        pareto_picture(folder / "pareto.png", rows, "quality against cost: means and 95 % intervals")
    comparison_sheet(Source(folder), folder / SHEET)
    if sentence := verdict(rows):
        console.print(sentence, markup=False)
    finish(folder, partial(console.print, highlight=False, markup=False))
    return folder


def _environments(cells: Sequence[Result]) -> list[dict[str, Any]]:
    return [dict(items) for items in dict.fromkeys(tuple(sorted(cell["environment"].items())) for cell in cells)]
