"""`prunekit compare`: make the cells that are missing, and one table and one picture of them all."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from prunekit.compare.cells import DENSE, Cell, CellRunner, cells_of
from prunekit.compare.fairness import Result, refuse_unfair
from prunekit.compare.pareto import pareto_picture
from prunekit.compare.table import PROTOCOLS, csv_text, json_rows, rows_of, shown_rows, warnings_of
from prunekit.compare.timing import TIMINGS, cell_ratio
from prunekit.evaluation.table import Column, markdown_table, terminal_table, warning_lines
from prunekit.recipe import (
    CompareRecipe,
    RecipeError,
    dump_recipe,
    load_recipe,
    load_recorded,
    precision_lines,
    resolve_recipe,
)
from prunekit.report.command import finish
from prunekit.run import RECIPE
from prunekit.stages import RunLog, Stages
from prunekit.training.checkpoint import read_json, write_json, write_text
from prunekit.training.claims import Piece, share
from prunekit.training.processes import apart, current

PLAIN_WIDTH = 160  # letters of a line where there is no terminal
NOTE = (
    "Each figure: mean ± half of its 95 % interval (several seeds: Student's t over the seeds; one seed: 1.96 "
    "jackknife errors over the pictures). **Bold**: the best pruned row. ≈: its interval overlaps the best row's, so "
    "the two cannot be told apart."
)


class Comparison:
    """One comparison recipe in its directory."""

    def __init__(self, recipe: CompareRecipe, directory: Path):
        path, device = directory / RECIPE, current().device
        recipe = resolve_recipe(recipe, device, load_recorded(path) if path.is_file() else None)
        self.recipe, self.directory = recipe, directory
        write_text(path, dump_recipe(recipe))
        self.log = RunLog.of(recipe, directory)
        for line in precision_lines(recipe, device):
            self.log.say(line)
        self.cells = cells_of(recipe)
        self.stages = Stages(recipe, self.log, directory)
        self.runner = CellRunner(recipe, directory, self.stages)

    def make(self) -> None:
        """Make the cells that are missing, but for those that another process on this directory is making."""

        def make(number: int, cell: Cell) -> None:
            self.log.say(f"cell {number} of {len(self.cells)}: {cell.title}")
            self.runner.run(cell)

        pieces = [
            Piece(cell.choice, partial(self._has, cell), partial(make, number, cell))
            for number, cell in enumerate(self.cells, start=1)
        ]
        with apart():
            share(pieces, self.directory / "work" / "locks", wait=False)

    def _has(self, cell: Cell) -> bool:
        return self.runner.finished(cell) is not None

    def results(self) -> tuple[list[Result], list[Cell]]:
        """Return the finished cells' results, and the cells that are missing."""
        found = [(cell, self.runner.finished(cell)) for cell in self.cells]
        return [result for _, result in found if result], [cell for cell, result in found if not result]

    def timings(self, cells: Sequence[Result]) -> dict[str, float]:
        """Return every cell's time of a UNet call over the dense one's; measured once, in this process."""
        path = self.directory / TIMINGS
        timings = read_json(path) if path.is_file() else {}
        for cell in cells:
            if cell["models_folder"] not in timings and cell["cell"]["method"] != DENSE:
                ratio = cell_ratio(cell, self.directory, self.stages)
                if ratio is not None:
                    timings[cell["models_folder"]] = ratio
                    write_json(path, timings)
        return timings


def compare(
    paths: Sequence[str | Path],
    overrides: Iterable[str] = (),
    output: str | Path | None = None,
) -> Path:
    """Run comparisons, or read finished ones, and write `results.json`, `table.csv`, `table.md` and `pareto.png`.

    paths: comparison recipes, whose missing cells are made in `runs/NAME`, and directories with finished `cells/`.
    output: where the table goes; the first comparison's directory by default.
    Several processes may share a directory: each makes the cells that no other is making, and then shows what is there.
    Returns the output directory. Raises RecipeError for what is no comparison, ValueError for cells that cannot share
    a table, by the field that differs.
    """
    overrides = list(overrides)
    cells, timings, missing, published = [], {}, [], []
    folder = None
    for path in map(Path, paths):
        if path.is_dir():
            found = [read_json(file) for file in sorted((path / "cells").glob("*.json"))]
            if not found:
                raise RecipeError(f"{path} holds no cells of a comparison")
            times = read_json(path / TIMINGS) if (path / TIMINGS).is_file() else {}
        else:
            recipe = load_recipe(path, overrides)
            if not isinstance(recipe, CompareRecipe):
                raise RecipeError(f"{path} is a recipe of job={recipe.job}; compare takes job=compare")
            comparison = Comparison(recipe, Path("runs") / recipe.name if output is None else Path(output))
            comparison.make()
            found, lacking = comparison.results()
            missing += lacking
            times = comparison.timings(found) if not lacking else {}
            published += recipe.published
        cells += found
        timings |= times
        folder = folder or (path if path.is_dir() else comparison.directory)
    refuse_unfair(cells)
    target = Path(output or folder)
    return _write(target, cells, timings, missing, published)


def _write(
    folder: Path, cells: list[Result], timings: dict[str, float], missing: list[Cell], published: list[dict[str, Any]]
) -> Path:
    """Write and print the tables of the finished cells."""
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)
    rows = rows_of(cells, timings)
    content = {"rows": json_rows(rows), "missing": [cell.name for cell in missing], "published": published}
    content["warnings"] = warnings_of(cells)
    write_json(folder / "results.json", {"environments": _environments(cells), **content})
    write_text(folder / "table.csv", csv_text(rows))
    parts = [NOTE + "\n"]
    for protocol in dict.fromkeys(row.protocol for row in rows):
        for budget in dict.fromkeys(row.budget for row in rows):
            own = [row for row in rows if row.protocol == protocol and row.budget == budget]
            if own:
                lines, columns = shown_rows(own)
                heading = f"Budget {budget}, {PROTOCOLS[protocol]}"
                parts += [f"## {heading}\n", markdown_table(lines, columns)]
                console.print(terminal_table(lines, columns, heading, console.width))
    parts += warning_lines(content["warnings"])
    for warning in content["warnings"]:
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
    finish(folder, partial(console.print, highlight=False, markup=False))
    return folder


def _environments(cells: Sequence[Result]) -> list[dict[str, Any]]:
    return [dict(items) for items in dict.fromkeys(tuple(sorted(cell["environment"].items())) for cell in cells)]
