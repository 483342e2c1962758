"""Settings that were added or changed after runs and comparison cells were first recorded, and their earlier meaning.

`precision` is handled in `auto_precision.py`, because its earlier default is a value that is still allowed.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prunekit.data.config import DATA_BEFORE
from prunekit.jobs.recipe.reading import parse_recipe
from prunekit.jobs.recipe.schema import AnyRecipe, PretrainRecipe
from prunekit.runtime.errors import UserError
from prunekit.runtime.yaml_files import read_mapping

ADDED = {  # fields of a cell that were added later, with the value that every earlier cell had
    **{f"data.{name}": value for name, value in DATA_BEFORE.items()},
    "data.holdout_split": None,
    "evaluation.num_seen_images": 0,
    "method.routing": "cosine",
    "method.snr_form": "velocity",
    "fine_tune.snr_form": "velocity",
    "fine_tune.lora": None,
    "fine_tune.deltas": None,
    "recover.closed_form": None,
    "recover.fine_tune": True,
    "memory.weights": "float32",
}


def without_added(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a cell's fields without later settings at their earlier value, so that the cell's key does not change."""
    return {name: value for name, value in fields.items() if name not in ADDED or value != ADDED[name]}


def with_added(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a cell's fields with those added since it was recorded, except in sections that the cell lacks."""
    sections = {name.partition(".")[0] for name in fields}
    return {name: value for name, value in ADDED.items() if name.partition(".")[0] in sections} | dict(fields)


def missing_settings(path: Path) -> Iterator[str]:
    """Yield overrides with the earlier meaning of settings that were added after a recipe was recorded."""
    try:
        data = read_mapping(path).get("data")
    except UserError:  # reading the recipe raises it again
        return
    if isinstance(data, dict):
        yield from (f"data.{name}={value}" for name, value in DATA_BEFORE.items() if name not in data)


def as_recorded_now(recipe: AnyRecipe) -> AnyRecipe:
    """Return a recipe that an earlier version recorded, with its methods' settings as this version writes them."""
    if isinstance(recipe, PretrainRecipe):
        return recipe
    content = recipe.model_dump(mode="json")
    for label, settings in content["methods"].items():
        if settings:
            content["methods"][label] = type(recipe.method_of(label)).read_recorded(settings)
    return parse_recipe(content)


def to_record(recipe: AnyRecipe) -> AnyRecipe:
    """Return a recipe as a run records it, so that every later version reads its methods' settings alike."""
    if isinstance(recipe, PretrainRecipe):
        return recipe
    content = recipe.model_dump(mode="json")
    for label, settings in content["methods"].items():
        if settings:
            content["methods"][label] = recipe.method_of(label).recorded(settings)
    return parse_recipe(content)
