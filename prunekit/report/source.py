"""What a directory holds for a report: a run, a comparison, or a pretraining; finished, under way or old."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusers import ModelMixin

from prunekit.methods.result import PruneResult
from prunekit.models import load_unet_on_meta
from prunekit.runtime.errors import UserError
from prunekit.runtime.files import read_json
from prunekit.runtime.run_directory import LOG, METHODS, RECIPE, RESULT, RESULTS
from prunekit.runtime.yaml_files import read_mapping

ENVIRONMENT = "environment.json"
ERRORS = ".errors.json"  # end of the name of a row's file in metrics/


class MissingError(UserError):
    """A section has nothing to show; the message is the one line that says why."""


@dataclass(frozen=True)
class Section:
    """One section of the page: its template `KIND.html.j2` and what that shows; or the reason why it is left out."""

    key: str
    title: str
    content: dict[str, Any] | None = None
    reason: str = ""


@dataclass(frozen=True)
class Source:
    """A directory that is reported on. Raises ValueError, one line, for one that is not a run."""

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
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe; empty where there is none."""
        path = self.directory / RECIPE
        return read_mapping(path) if path.is_file() else {}

    @cached_property
    def results(self) -> dict[str, Any]:
        """What the run measured; empty before it has."""
        path = self.directory / RESULTS
        return read_json(path) if path.is_file() else {}

    @cached_property
    def errors(self) -> dict[str, dict[str, float]]:
        """The standard errors of each row's figures over its pictures, by the row's name."""
        files = sorted((self.directory / "metrics").glob(f"*{ERRORS}"))
        return {path.name.removesuffix(ERRORS): read_json(path) for path in files}

    @cached_property
    def cells(self) -> list[dict[str, Any]]:
        """The finished cells of a comparison."""
        return [read_json(path) for path in sorted((self.directory / "cells").glob("*.json"))]

    @property
    def is_comparison(self) -> bool:
        """Whether it is a comparison."""
        return bool(self.cells) or self.recipe.get("job") == "compare"

    @property
    def name(self) -> str:
        """What the page is called."""
        return str(self.recipe.get("name") or self.results.get("recipe") or self.directory.resolve().name)

    def metrics(self, name: str, kind: str) -> Any:
        """Return a row's record of a kind, such as "errors"; None if the run has none."""
        path = self.directory / "metrics" / f"{name}.{kind}.json"
        return read_json(path) if path.is_file() else None

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """The rows of the log; a line that a kill cut off is left out."""
        path, rows = self.directory / LOG, []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    @cached_property
    def chosen(self) -> dict[str, PruneResult]:
        """What each method chose, by a name that a person reads."""
        if self.is_comparison:
            folders = sorted((self.directory / "work").glob(f"*-chosen-*/{RESULT}"))
            results = {}
            for path in folders:
                result = PruneResult.load(path.parent)
                label = path.parent.name.partition("-chosen-")[0]
                share, seed = result.info.mean_ratio, result.info.settings["seed"]
                results[f"{label}, {100 * share:.1f} % of the MACs, seed {seed}"] = result
            return results
        folders = [self.directory / METHODS / name for name in self.recipe.get("methods", ())]
        return {folder.name: PruneResult.load(folder) for folder in folders if (folder / RESULT).is_file()}

    @cached_property
    def shape(self) -> ModelMixin:
        """The dense denoiser without weights. Raises MissingError where the model is not here."""
        if "model" not in self.recipe:
            raise MissingError("the directory holds no recipe that names the model")
        try:
            return load_unet_on_meta(self.recipe["model"], self.recipe.get("single_file_config"))
        except (OSError, ValueError) as error:
            raise MissingError(f"the model {self.recipe['model']!r} cannot be read here ({error})") from error
