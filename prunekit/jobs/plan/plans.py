"""Plans: the units, costs, memory, disk and time of recipes before they run, without weights or network."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from prunekit.core.space import UnitSpace
from prunekit.jobs.plan.amounts import pruning_work, timed
from prunekit.jobs.plan.data_size import size_of
from prunekit.jobs.plan.footprints import disk, memory
from prunekit.jobs.plan.planned_models import Models, PlannedModel
from prunekit.jobs.plan.planned_rows import describe_row, rows_of
from prunekit.jobs.plan.pretrain_plan import plan_pretraining
from prunekit.jobs.plan.speed import Speed, measure_speed
from prunekit.jobs.recipe import AnyRecipe, PretrainRecipe, precisions, resolve_recipe
from prunekit.runtime.errors import UserError

Plan = dict[str, Any]  # JSON values; MACs are multiply-adds, sizes bytes, times seconds


@dataclass(frozen=True)
class Devices:
    """The devices that a plan is for."""

    count: int = 1
    throughput: float | None = None  # MACs per second of each device; None: measured on this machine
    seconds: float = 1.0  # duration of the measurement
    precision: str | None = None  # meaning of `precision: auto` on the devices; None: that on this machine


def plan(recipe: AnyRecipe, devices: Devices | None = None, models: Models | None = None) -> Plan:
    """Return the plan of a recipe: units, costs, memory, disk, work and time.

    devices: by default one device, whose speed is measured on this machine in about a second.
    models: models of earlier plans, whose costs are not computed again.
    Raises the ValueErrors of a run: an unknown or unsupported model, a pattern that matches nothing, a budget below the
    lowest possible cost.
    """
    devices = devices or Devices()
    here = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = resolve_recipe(recipe, here, meaning=devices.precision)
    if isinstance(recipe, PretrainRecipe):
        model, content, work = plan_pretraining(recipe)
        precision, latent = recipe.diffusion.precision, model.latent()
    else:
        lowered = recipe.memory.weights == "bfloat16"
        model = (models or Models()).get(recipe.model, recipe.single_file_config, lowered)
        rows, data = rows_of(recipe, model), size_of(recipe.data)
        described = {name: describe_row(row, model) for name, row in rows.items()}
        content = {
            "model": model.describe(recipe.resolution),
            "units": _units(model.costs(recipe.prune)[0]),
            "methods": described,
            "memory": memory(recipe, rows, described, model, devices.count),
            "disk": disk(recipe, rows, described, model, data, devices.count),
        }
        work = pruning_work(recipe, rows, model, data)
        precision, latent = recipe.fine_tune.precision, model.latent(recipe.resolution)
    speed = _speed(devices, model, latent, precision)
    return {
        "recipe": recipe.name,
        "job": recipe.job,
        "precision": precisions(recipe),
        **content,
        **timed(work, speed, devices.count),
    }


def plan_all(recipes: Iterable[AnyRecipe], devices: Devices | None = None) -> list[Plan]:
    """Return the plans of recipes; shared models are computed once. Errors as in `plan`, with the recipe's name."""
    models, plans = Models(), []
    for recipe in recipes:
        try:
            plans.append(plan(recipe, devices, models))
        except ValueError as error:
            raise UserError(f"{recipe.name}: {error}") from error
    return plans


def _units(space: UnitSpace) -> dict[str, dict[str, int]]:
    groups = Counter(g.kind for g in space.groups)
    units: Counter[str] = Counter()
    for group in space.groups:
        units[group.kind] += group.size
    return {kind: {"groups": groups[kind], "units": units[kind]} for kind in groups}


def _speed(devices: Devices, model: PlannedModel, latent: tuple[int, int], precision: str) -> Speed:
    if devices.throughput is not None:
        return Speed(devices.throughput, "as stated")

    def measured() -> Speed:
        macs = model.dense_macs(latent)
        return measure_speed(model.shape.denoiser, macs, latent, model.tokens, precision, seconds=devices.seconds)

    return model.once(("speed", latent, precision), measured)
