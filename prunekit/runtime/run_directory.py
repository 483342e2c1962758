"""The names of files and folders in a run's directory, and how to find what a run made; imports nothing heavy."""

from pathlib import Path
from typing import Any

from prunekit.runtime.errors import UserError
from prunekit.runtime.yaml_files import read_mapping

RECIPE = "recipe.yaml"  # the resolved recipe
RESULTS = "results.json"  # the tables of a run, a comparison or an evaluation; the last file that a run writes
CELLS, WORK = "cells", "work"  # folders of a comparison: finished cells, and what they are made of
METHODS = "methods"  # folder with one folder per method
RESULT = "result.json"  # what a method chose, in the method's folder
ROUTER = "router.safetensors"  # which expert a prompt goes to, in the folder of a method that routes
SCORES = "scores.safetensors"  # the score of every unit, in the folder of a method that scores
LOCKS = "locks"  # folder of the lock files by which processes share work
DENSE = "dense"  # name of the dense model's row in every table
SMOKE_SUFFIX = "_smoke"  # of the name, and so of the run's directory
LOG = "log.jsonl"  # of a run: a row a step, and what was said


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
