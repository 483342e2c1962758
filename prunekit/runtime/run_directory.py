"""Names of files and folders in a run's directory, and functions that find a run's results; imports nothing heavy."""

from pathlib import Path
from typing import Any

from prunekit.runtime.errors import UserError
from prunekit.runtime.yaml_files import read_mapping

RECIPE = "recipe.yaml"  # the resolved recipe
RESULTS = "results.json"  # the tables of a run, a comparison or an evaluation; the last file that a run writes
CELLS, WORK = "cells", "work"  # folders of a comparison: finished cells, and the models and pictures that cells use
METHODS = "methods"  # folder with one folder per method
RESULT = "result.json"  # the architectures that a method chose, in the method's folder
ROUTER = "router.safetensors"  # assigns prompts to experts; in the folder of a method that routes
SCORES = "scores.safetensors"  # the score of every unit, in the folder of a method that scores
LOCKS = "locks"  # folder of the lock files by which processes share work
DENSE = "dense"  # name of the dense model's row in every table
SMOKE_SUFFIX = "_smoke"  # added to a run's name, and so to the name of its directory
LOG = "log.jsonl"  # log of a run: one row per step, and the printed lines


def read_recipe(directory: Path) -> dict[str, Any]:
    """Return the settings of a run; FileNotFoundError for a directory without a recipe."""
    path = directory / RECIPE
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is not a run directory: it has no {RECIPE}")
    return read_mapping(path)


def method_directory(directory: Path, method: str | None = None) -> Path:
    """Return the folder of a method in a run.

    Args:
        directory: the run's directory.
        method: the method's name; by default the method that routes, else the first one by name.

    Raises:
        UserError: the run has no result of the method.

    """
    if method is None:
        folders = sorted(path.parent for path in directory.glob(f"{METHODS}/*/{RESULT}"))
        routed = [folder for folder in folders if (folder / ROUTER).is_file()]
        if not folders:
            raise UserError(f"{directory} has no result of a method yet; resume it first")
        return (routed or folders)[0]
    folder = directory / METHODS / method
    if not (folder / RESULT).is_file():
        finished = sorted(path.parent.name for path in directory.glob(f"{METHODS}/*/{RESULT}"))
        known = f"it has {', '.join(finished)}" if finished else "it has none yet; resume it first"
        raise UserError(f"{directory} has no result of method {method!r}: {known}")
    return folder
