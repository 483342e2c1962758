"""Settings that were added or changed since runs and comparison cells were first recorded, and what they meant then.

`precision` is apart (`precision.py`): its earlier default is a value that is still allowed.
"""

from collections.abc import Mapping
from typing import Any

from prunekit.recipe.loading import parse_recipe
from prunekit.recipe.schema import AnyRecipe, PretrainRecipe

ADDED = {  # fields of a cell that were added later, with the value that every earlier cell had
    "method.routing": "cosine",
    "method.snr_form": "velocity",
    "fine_tune.snr_form": "velocity",
}
MARK = "snr_form"  # written down with every preset, so that a record without it is an earlier one
PAPER_BEFORE = {  # what `preset: paper` of APTP was before `published_code` was a preset of its own
    "preset": "default",
    "temperature": 0.4,
    "offset": 3.0,
    "noise": "gumbel",
    "depth_gates": "cumulative",
    "feature_blocks": "all",
    "feature_scale": "mean",
    "distillation_weight": 0.2,
    "resource_weight": 2.0,
    "snr_gamma": 5.0,
    "epsilon": 0.05,
    "sinkhorn_iterations": 3,
    "contrastive_temperature": 0.03,
    "contrastive_weight": 100.0,
    "transport": True,
    "similarity": "hardened",
    "codes": "random",
    "spread_weight": 0.1,
    "maximum_weight": 0.1,
    "balance": False,
    "warmup": 500,
}


def without_added(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a cell's fields without those that say what every earlier cell did; the key of an earlier cell stays."""
    return {name: value for name, value in fields.items() if name not in ADDED or value != ADDED[name]}


def with_added(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a cell's fields with those that it was recorded before; none in a section that the cell lacks."""
    sections = {name.partition(".")[0] for name in fields}
    return {name: value for name, value in ADDED.items() if name.partition(".")[0] in sections} | dict(fields)


def with_earlier_presets(recipe: AnyRecipe) -> AnyRecipe:
    """Return a recorded recipe in which an earlier `preset: paper` is written out with the settings that it had."""
    if isinstance(recipe, PretrainRecipe):
        return recipe
    content = recipe.model_dump(mode="json")
    for label, own in content["methods"].items():
        if (own or {}).get("preset") == "paper" and MARK not in own:
            content["methods"][label] = {**PAPER_BEFORE, **own, "preset": "default"}
    return parse_recipe(content)


def mark_presets(recipe: AnyRecipe) -> AnyRecipe:
    """Return a recipe to record in which every method with a preset says that the preset is today's."""
    if isinstance(recipe, PretrainRecipe):
        return recipe
    content = recipe.model_dump(mode="json")
    for label, own in content["methods"].items():
        if (own or {}).get("preset", "default") != "default":
            own.setdefault(MARK, getattr(recipe.method_of(label).config, MARK))
    return parse_recipe(content)
