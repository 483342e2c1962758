"""The rows of a recipe's table, and how often each row's stages run."""

from dataclasses import dataclass
from typing import Any

import torch

from prunekit.core.space import Architecture
from prunekit.jobs.compare.cell_runner import budget_value, cells_of
from prunekit.jobs.compare.training_steps import TrainingSteps
from prunekit.jobs.plan.planned_models import PlannedModel
from prunekit.jobs.recipe import CompareRecipe, PruneRecipe
from prunekit.methods.base import Method
from prunekit.methods.budget import budget_limit
from prunekit.methods.workload import MethodWork
from prunekit.recovery.closed_form import ClosedFormConfig, most_consumers
from prunekit.recovery.fine_tuning import FineTuneConfig
from prunekit.runtime.run_directory import DENSE


@dataclass(frozen=True)
class PlannedRow:
    """One row of a recipe's table, and how often its stages run: a comparison repeats them over seeds and protocols."""

    label: str  # label of the method in the recipe
    method: Method
    tuning: FineTuneConfig
    choices: int  # number of searches or calibrations
    models: int  # number of models that are kept: experts, or the backbones that experts share
    tuning_steps: int  # fine-tuning steps of all models together; 0: no fine-tuning
    generations: int  # number of sets of generated pictures
    closed_form: ClosedFormConfig | None = None  # settings of the closed-form refit; None: no refit

    @property
    def experts(self) -> int:
        """Number of models in one result."""
        return self.method.num_models

    def work(self, model: PlannedModel) -> MethodWork:
        """Return the work that the method does before it chooses architectures."""
        return self.method.work(model.costs(self.method.config)[0])

    @property
    def shares(self) -> bool:
        """Whether the models of one result share a backbone."""
        return self.tuning.shared_backbone and self.experts > 1

    @property
    def budget(self) -> float:
        """Budget as a fraction of the dense denoiser's MACs; with a latency budget, of its time."""
        return self.method.config.budget


def rows_of(recipe: PruneRecipe | CompareRecipe, model: PlannedModel) -> dict[str, PlannedRow]:
    """Return the pruned rows of a recipe by name."""
    return _comparison_rows(recipe, model) if isinstance(recipe, CompareRecipe) else _run_rows(recipe)


def _run_rows(recipe: PruneRecipe) -> dict[str, PlannedRow]:
    rows = {}
    for name in recipe.methods:
        method, tuning = recipe.method(name), recipe.fine_tuning(name)
        models = 1 if tuning.shared_backbone else method.num_models
        sets = 1 + len(recipe.evaluation.at_steps)
        steps = models * tuning.steps * recipe.recover.fine_tune
        rows[name] = PlannedRow(name, method, tuning, 1, models, steps, sets, recipe.recover.closed_form)
    return rows


def _comparison_rows(recipe: CompareRecipe, model: PlannedModel) -> dict[str, PlannedRow]:
    cost = model.costs(recipe.prune)[1]
    rows: dict[str, PlannedRow] = {}
    known_choices: set[tuple[str, str]] = set()  # keys of the choices that earlier rows count
    budgets = {entry.label: budget_value(entry.budget, model.shape.denoiser, cost) for entry in recipe.budgets}
    layers = most_consumers(model.shape.denoiser)
    steps_of = TrainingSteps(recipe, lambda method: method.work(model.costs(method.config)[0]), budgets, layers)
    cells = [cell for cell in cells_of(recipe, steps_of) if cell.label != DENSE]
    for entry in recipe.budgets:
        budget = budgets[entry.label]
        for label in entry.methods or recipe.methods:
            row_cells = [cell for cell in cells if (cell.label, cell.budget) == (label, entry.label)]
            tuning = recipe.fine_tuning(label, recipe.fine_tune.steps)
            trained = [(cell, 1 if tuning.shared_backbone else cell.num_models) for cell in row_cells]
            models = sum(count for _, count in trained)
            steps = sum(count * steps_of.of(label, entry.label, cell.protocol) for cell, count in trained)
            method = recipe.method(label, budget, entry.seeds[0])
            searches = method.work(model.costs(method.config)[0]).search is not None
            row_choices = {_choice(recipe.method(label, budget, seed), searches) for seed in entry.seeds}
            choices = len(row_choices - known_choices)
            known_choices |= row_choices
            rows[f"{label} @ {entry.label}"] = PlannedRow(
                label,
                method,
                tuning,
                choices,
                models,
                tuning_steps=steps,
                generations=len(row_cells),
                closed_form=recipe.recovering(label).closed_form,
            )
    return rows


def _choice(method: Method, searches: bool) -> tuple[str, str]:
    """Return the key of a method's choice; without a search, it has no budget: one calibration serves all budgets."""
    return method.name, method.config.model_dump_json(exclude=None if searches else {"budget"})


def tuning_devices(rows: dict[str, PlannedRow], devices: int) -> int:
    """Return how many devices share a fine-tuning batch: 1 if there is a model for each device, else all."""
    return 1 if sum(row.models for row in rows.values()) >= devices else devices


def describe_row(row: PlannedRow, model: PlannedModel) -> dict[str, Any]:
    """Return a row's costs before and after pruning; the number of remaining parameters is an estimate.

    Raises ValueError for a budget below the lowest cost that the denoiser can reach.
    """
    settings = row.method.config
    space, cost = model.costs(settings)
    target = budget_limit(cost, settings.budget)
    floor = cost.macs(Architecture(space, torch.zeros(space.size, dtype=torch.bool)))
    return {
        "budget": settings.budget,
        "budget_of": "MACs" if settings.latency is None else "time",  # of time: target_macs is an estimate
        "experts": row.experts,
        "units": space.size,
        "convention": cost.convention,
        "sample_size": list(cost.sample_size),
        "text_length": cost.text_length,
        "dense_macs": cost.dense_macs,
        "target_macs": target,
        "floor": floor / cost.dense_macs,
        "dense_params": cost.dense_params,
        "params_estimate": model.params_at(settings, target),
        "params_kept": cost.dense_params if row.shares else model.params_at(settings, target),  # by each model
    }
