"""The source of a report: the directory of a run, a comparison or a pretraining, which may be unfinished or old."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusers import ModelMixin

from prunekit.methods.result import PruneResult
from prunekit.models import load_unet_on_meta
from prunekit.report.comparison_table import Cell
from prunekit.runtime.errors import UserError
from prunekit.runtime.files import read_json
from prunekit.runtime.run_directory import CELLS, DENSE, LOG, METHODS, RECIPE, RESULT, RESULTS, WORK
from prunekit.runtime.yaml_files import read_mapping

ENVIRONMENT = "environment.json"
ERRORS = ".errors.json"  # end of the name of a row's file in metrics/


class MissingError(UserError):
    """A section has nothing to show; the message says why in one line."""


@dataclass(frozen=True)
class Section:
    """One section of the page: the content for the template `KEY.html.j2`, or the reason why it is left out."""

    key: str
    title: str
    content: dict[str, Any] | None = None
    reason: str = ""


@dataclass(frozen=True)
class Source:
    """The directory of a report. Raises ValueError, one line, if it is neither a run nor a comparison."""

    directory: Path

    def __post_init__(self):
        if not self.directory.is_dir():
            raise UserError(f"{self.directory} is not a directory; give the directory of a run or a comparison")
        if not any((self.directory / name).exists() for name in (RECIPE, RESULTS, "cells")):
            raise UserError(
                f"{self.directory} is neither a run nor a comparison: it has none of {RECIPE}, {RESULTS} and "
                "cells/; start one with `prunekit run RECIPE`"
            )

    @cached_property
    def recipes(self) -> list[dict[str, Any]]:
        """The resolved recipes of the page; if comparisons share a directory, the recipes that were measured last."""
        paths = [self.directory / RECIPE, *sorted(self.directory.glob("recipe-*.yaml"))]
        known = [read_mapping(path) for path in paths if path.is_file()]
        last = [recipe for recipe in known if recipe.get("name") in self.results.get("recipes", ())]
        return last or known[:1]

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe; empty if there is none."""
        return self.recipes[0] if self.recipes else {}

    @cached_property
    def results(self) -> dict[str, Any]:
        """The run's results; empty if it has none yet."""
        path = self.directory / RESULTS
        return read_json(path) if path.is_file() else {}

    @cached_property
    def errors(self) -> dict[str, dict[str, float]]:
        """The standard errors of each row's figures over its pictures, by the row's name."""
        files = sorted((self.directory / "metrics").glob(f"*{ERRORS}"))
        return {path.name.removesuffix(ERRORS): read_json(path) for path in files}

    @cached_property
    def cells(self) -> list[dict[str, Any]]:
        """The finished cells of a comparison; if it has a recipe, cells of other recipes are left out."""
        paths = sorted((self.directory / CELLS).glob("*.json"))
        cells = [(path, read_json(path)) for path in paths]
        comparisons = [recipe for recipe in self.recipes if recipe.get("job") == "compare"]
        if not comparisons:
            return [cell for _, cell in cells]
        return [cell for path, cell in cells if any(self._is_of(recipe, path, cell) for recipe in comparisons)]

    def _is_of(self, recipe: dict[str, Any], path: Path, cell: dict[str, Any]) -> bool:
        """Return whether a cell belongs to a recipe: made by it, or by another recipe with the same settings."""
        name = recipe.get("name")
        if _place(cell) not in _places(recipe):
            return False
        if cell.get("recipe", name) == name:
            return True
        has_own = path.with_name(f"{path.stem}__{name}{path.suffix}").is_file()
        return not has_own and path.stem not in self.results.get("missing", ())

    @property
    def is_comparison(self) -> bool:
        """Whether the directory is a comparison."""
        return bool(self.cells) or self.recipe.get("job") == "compare"

    @property
    def name(self) -> str:
        """The page's title."""
        return str(self.recipe.get("name") or self.results.get("recipe") or self.directory.resolve().name)

    def metrics(self, name: str, kind: str) -> Any:
        """Return the record of the row `name` of a kind, such as "errors"; None if the run has none."""
        path = self.directory / "metrics" / f"{name}.{kind}.json"
        return read_json(path) if path.is_file() else None

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """The rows of the log, without incomplete lines of killed runs and without trainings of other recipes."""
        path, rows = self.directory / LOG, list[dict[str, Any]]()
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        titles = tuple(f"{Cell(*place, '').title} " for recipe in self.recipes for place in _places(recipe))
        return [row for row in rows if not titles or f"{row.get('stage', titles[0])} ".startswith(titles)]

    @cached_property
    def chosen(self) -> dict[str, PruneResult]:
        """The result of each method, by a title for the page."""
        if self.is_comparison:
            results: dict[str, PruneResult] = {}
            for cell in self.cells:  # several protocols may share one choice
                folder = self.directory / WORK / cell.get("models_folder", "")
                if (folder / RESULT).is_file():
                    result, (label, _, seed) = PruneResult.load(folder), _place(cell)
                    title = f"{label}, {100 * result.info.mean_ratio:.1f} % of the MACs, seed {seed}"
                    results.setdefault(title, result)
            return results
        folders = [self.directory / METHODS / name for name in self.recipe.get("methods", ())]
        return {folder.name: PruneResult.load(folder) for folder in folders if (folder / RESULT).is_file()}

    @cached_property
    def shape(self) -> ModelMixin:
        """The dense denoiser without weights. Raises MissingError if the model cannot be read here."""
        if "model" not in self.recipe:
            raise MissingError("the directory holds no recipe that names the model")
        try:
            return load_unet_on_meta(self.recipe["model"], self.recipe.get("single_file_config"))
        except (OSError, ValueError) as error:
            raise MissingError(f"the model {self.recipe['model']!r} cannot be read here ({error})") from error


def _place(cell: dict[str, Any]) -> tuple[str, str, int]:
    """Return a cell's method, budget and seed."""
    axes = cell["cell"]
    return axes["method"], axes["budget"], axes["seed"]


def _places(recipe: dict[str, Any]) -> set[tuple[str, str, int]]:
    """Return the (method, budget, seed) of every cell of a comparison's recipe."""
    places = set()
    for entry in recipe.get("budgets") or ():
        labels = [*(entry.get("methods") or recipe.get("methods", ()))]
        for seed in entry.get("seeds") or [0]:
            places |= {(DENSE, "", seed), *((label, str(entry["budget"]), seed) for label in labels)}
    return places
