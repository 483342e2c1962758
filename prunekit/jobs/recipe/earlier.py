"""Settings that were added or changed since runs and comparison cells were first recorded, and what they meant then.

`precision` is apart (`precision.py`): its earlier default is a value that is still allowed.
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
    """Return a cell's fields without settings that were added later and have their earlier value, so that keys stay."""
    return {name: value for name, value in fields.items() if name not in ADDED or value != ADDED[name]}


def with_added(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a cell's fields with those that it was recorded before; none in a section that the cell lacks."""
    sections = {name.partition(".")[0] for name in fields}
    return {name: value for name, value in ADDED.items() if name.partition(".")[0] in sections} | dict(fields)


def missing_settings(path: Path) -> Iterator[str]:
    """Yield, as overrides, what the settings of a recorded recipe meant that it lacks because they were added later."""
    try:
        data = read_mapping(path).get("data")
    except UserError:  # reading the recipe says so
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
