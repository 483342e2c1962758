"""The cells of a comparison: one method at one budget, seed and training protocol, each in its own JSON file.

A cell is cached by content: its key is a hash of everything that its figures depend on. A changed setting makes a
new cell, and an unchanged cell is never computed twice, on any machine. Cells share the encoded data, a score method's
calibration for all budgets, a mixture's search for all protocols, and the single model of a static method, if it has
equally many steps under all protocols.
"""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import ModelMixin

from prunekit.core.cost import CostModel
from prunekit.core.registry import denoiser_in
from prunekit.evaluation import comparison
from prunekit.evaluation.comparison import Candidate
from prunekit.evaluation.routing import routing_report
from prunekit.jobs.compare.training_steps import TrainingSteps
from prunekit.jobs.recipe import CompareRecipe, RecipeError, without_added
from prunekit.jobs.recovering import Recovery, recover
from prunekit.jobs.stages import Stages
from prunekit.methods.base import Method, space_and_cost
from prunekit.methods.bksdm import BKSDM
from prunekit.methods.budget import budget_of
from prunekit.methods.result import PruneResult
from prunekit.methods.router import RandomRouter
from prunekit.methods.settings import PruneSettings
from prunekit.methods.workload import MethodWork
from prunekit.recovery.closed_form import most_consumers
from prunekit.recovery.fine_tuning import FineTuneConfig
from prunekit.report.comparison_table import EQUAL_TOTAL, Cell
from prunekit.runtime.files import read_json, replacing, write_json
from prunekit.runtime.run_directory import CELLS, DENSE, RESULT, SCORES, WORK
from prunekit.runtime.tracking import flat

FORMAT = 1
DISTILLATION = {"distillation_weight", "denoising_weight", "feature_blocks", "feature_scale"}  # settings of it
RANDOM = "random"  # a row's partition of the prompts among its experts
MEETING_THE_BUDGET = ("prune.budget", "prune.align", "prune.latency")  # fields that no calibration depends on


def cells_of(recipe: CompareRecipe, steps: TrainingSteps) -> list[Cell]:
    """Return a comparison's cells, seed by seed, so that the table of a stopped comparison is balanced."""
    cells: list[Cell] = []
    most = max(len(entry.seeds) for entry in recipe.budgets)
    for repetition in range(most):
        for entry in recipe.budgets:
            if repetition >= len(entry.seeds):
                continue
            seed = entry.seeds[repetition]
            cells += [] if any(c.label == DENSE and c.seed == seed for c in cells) else [Cell(DENSE, "", seed)]
            for label in entry.methods or recipe.methods:
                count, protocols = recipe.method(label, 0.5, seed).num_models, steps.protocols(label, entry.label)
                cells += [Cell(label, entry.label, seed, protocol, count) for protocol in protocols]
    return cells


def budget_value(budget: float | str, model: ModelMixin, cost: CostModel) -> float:
    """Return a budget as a share of the dense MACs; "bksdm:VARIANT" is the share of this BK-SDM member, rounded up.

    model: dense denoiser, which may be on the meta device. cost: cost model of the table, for its latent size and text
    length. Raises RecipeError for text of another form, and ValueError for a member that the denoiser does not have.
    """
    if not isinstance(budget, str):
        return budget
    method, _, variant = budget.partition(":")
    if method != BKSDM.name or not variant:
        raise RecipeError(f"budget {budget!r}: give a share of the dense MACs, or {BKSDM.name}:VARIANT")
    architecture = BKSDM(variant=variant).architecture(model)
    member_cost = CostModel(model, architecture.space, cost.sample_size, cost.text_length)
    return budget_of(member_cost.macs(architecture), member_cost.dense_macs)


class CellRunner:
    """Computes the cells of one comparison in its directory."""

    def __init__(self, recipe: CompareRecipe, directory: Path, stages: Stages):
        self.recipe, self.directory, self.stages = recipe, directory, stages
        self.budgets = {
            entry.label: budget_value(entry.budget, denoiser_in(stages.pipeline), stages.cost)
            for entry in recipe.budgets
        }

        def work_of(method: Method) -> MethodWork:
            return method.work(space_and_cost(stages.pipeline, method.config)[0])

        layers = most_consumers(denoiser_in(stages.pipeline))
        self.training_steps = TrainingSteps(recipe, work_of, self.budgets, layers)
        self.cells = cells_of(recipe, self.training_steps)

    def path(self, cell: Cell) -> Path:
        """Return the file of a cell's result; another recipe's cell of that name with other content keeps its file."""
        path, name = self.directory / CELLS / f"{cell.name}.json", self.recipe.name
        if path.is_file():
            earlier = read_json(path)
            if earlier.get("recipe", name) != name and earlier["key"] != key_of(self.fields(cell)):
                return path.with_name(f"{cell.name}__{name}.json")
        return path

    def finished(self, cell: Cell) -> dict[str, Any] | None:
        """Return a cell's result if it exists for the same content (key); else None."""
        path = self.path(cell)
        result = read_json(path) if path.is_file() else None
        return result if result and result["key"] == key_of(self.fields(cell)) else None

    def steps(self, cell: Cell) -> int:
        """Return the fine-tuning steps of each of a cell's models."""
        if cell.label == DENSE:
            return 0
        return self.training_steps.of(cell.label, cell.budget, cell.protocol)

    def tuning(self, cell: Cell) -> FineTuneConfig:
        """Return the fine-tuning settings of a cell's models."""
        return self.recipe.fine_tuning(cell.label, max(1, self.steps(cell)), scale_warmup=cell.protocol == EQUAL_TOTAL)

    def distillation(self, cell: Cell) -> str:
        """Return how a cell's models are distilled: "shared", as the recipe says; "own", the method's way; "none"."""
        if cell.label == DENSE:
            return "–"
        if DISTILLATION & self.recipe.method(cell.label, 0.5, cell.seed).fine_tuning().keys():
            return "own"
        return "shared" if self.recipe.fine_tuning(cell.label, 1).distillation_weight else "none"

    def fields(self, cell: Cell) -> dict[str, Any]:
        """Return everything that a cell's figures depend on, as flat fields, which `refuse_unfair` compares."""
        recipe, stages = self.recipe, self.stages
        fields: dict[str, Any] = {
            "format": FORMAT,
            "model": stages.model_digest,
            "data": {
                "holdout": recipe.data.holdout,
                "holdout_by": recipe.data.holdout_by,
                "holdout_split": recipe.data.holdout_split,
                "seed": recipe.seed,
                "content": stages.data_digest,
                "prompt_encoder": recipe.prompt_encoder,
            },
            "resolution": stages.resolution,
            "memory": {"weights": recipe.memory.weights},
            "evaluation": {
                **recipe.evaluation.model_dump(mode="json"),
                "num_seen_images": stages.num_seen_images,
                "evaluator": recipe.evaluator,
            },
            "seed": cell.seed,
        }
        if cell.label != DENSE:
            method = recipe.method(cell.label, self.budgets[cell.budget], cell.seed)
            settings = method.config.model_dump(mode="json", exclude={"seed"})
            recovering = recipe.recovering(cell.label)
            fields |= {
                "prune": {name: settings.pop(name) for name in list(settings) if name in PruneSettings.model_fields},
                "method": {"name": method.name, **settings},
                "recover": recovering.model_dump(mode="json"),
            }
            if recovering.fine_tune:
                fields["fine_tune"] = self.tuning(cell).model_dump(mode="json")
            if recipe.row(cell.label).partition == RANDOM:
                fields["partition"] = RANDOM
        return flat(fields)

    def run(self, cell: Cell) -> dict[str, Any]:
        """Compute a cell, or resume it, unless it exists; return its result."""
        if result := self.finished(cell):
            return result
        stages, fields = self.stages, self.fields(cell)
        candidate, chosen = self.candidate(cell)
        samples = self.directory / WORK / f"{cell.name}-samples-{key_of(fields)[:8]}"
        pictures, experts = stages.sample(candidate, samples, cell.seed)
        judged = stages.judge(pictures)
        seen = stages.sample_seen(candidate, samples.with_name(f"{samples.name}-training"), cell.seed)
        figures, errors = stages.measure(candidate, judged, seen)
        expert_rows, routing = [], None
        if candidate.router is not None:
            routing = routing_report(candidate, stages.data, *stages.agreement, seed=cell.seed)
            expert_rows = comparison.expert_rows(
                candidate, experts, data=stages.data, prompts=stages.prompts, dense=stages.dense
            )
        result = {
            "format": FORMAT,
            "recipe": self.recipe.name,
            "key": key_of(fields),
            "cell": {"method": cell.label, "budget": cell.budget, "seed": cell.seed, "protocol": cell.protocol},
            "distillation": self.distillation(cell),
            "models": cell.num_models,
            "steps": self.steps(cell),
            "warnings": chosen.warnings() if chosen else [],
            "variant": chosen.info.variant if chosen else None,
            "figures": figures,
            "errors": errors,
            "known": stages.known,
            "experts": expert_rows,
            "routing": routing,
            "models_folder": self.models_folder(cell).name,
            "environment": stages.environment,
            "fields": fields,
        }
        write_json(self.path(cell), result)
        stages.say(f"{cell.title}: " + ", ".join(f"{name} {figures[name]:.4g}" for name in errors))
        return result

    def models_folder(self, cell: Cell) -> Path:
        """Return the folder of a cell's fine-tuned models; cells that differ only in evaluation share it."""
        trained = {name: value for name, value in self.fields(cell).items() if not name.startswith("evaluation")}
        return self.directory / WORK / f"{cell.name}-models-{key_of(trained)[:8]}"

    def candidate(self, cell: Cell) -> tuple[Candidate, PruneResult | None]:
        """Choose a cell's architectures and recover them, or load the results of an earlier start."""
        if cell.label == DENSE:
            return self.stages.dense, None
        searched = {
            name: value
            for name, value in self.fields(cell).items()
            if not name.startswith(("recover", "fine_tune", "evaluation", "partition"))
        }
        chosen = self._chosen(cell, searched)
        if self.recipe.row(cell.label).partition == RANDOM:
            chosen = self._at_random(chosen, cell.seed)
        method = self.recipe.method(cell.label, self.budgets[cell.budget], cell.seed)
        recovering = self.recipe.recovering(cell.label)
        recovery = Recovery(
            cell.title,
            chosen,
            self.models_folder(cell),
            self.tuning(cell),
            cell.seed,
            closed_form=recovering.closed_form,
            fine_tunes=recovering.fine_tune,
            dense_passes=method.work(chosen.space).dense_passes,
            shares_steps=cell.protocol == EQUAL_TOTAL,
        )
        candidate = recover(self.stages, recovery)
        if not (recovery.folder / RESULT).is_file():
            chosen.save(recovery.folder)  # so that its models can be used without the comparison
        return candidate, chosen

    def _at_random(self, chosen: PruneResult, seed: int) -> PruneResult:
        """Return a mixture whose prompts go to its experts at random, with the shares that its router gives them."""
        data, router = self.stages.data, chosen.router
        if router is None:
            raise RecipeError("partition=random needs a mixture: this row's method has no router")
        shares = comparison.shares_of(router.route_rows(data.prompts, data.training_pairs()), router.num_experts)
        unused, fallback = router.unused, int(shares.argmax())
        return replace(chosen, router=RandomRouter(shares, router.embedding_size, seed, fallback, unused=unused))

    def _chosen(self, cell: Cell, fields: dict[str, Any]) -> PruneResult:
        """Return a cell's architectures; all protocols share one search, and all budgets one calibration."""
        work = self.directory / WORK
        method = self.recipe.method(cell.label, self.budgets[cell.budget], cell.seed)
        folder = work / f"{method.name}-chosen-{key_of(fields)[:8]}"  # rows of one method share it
        key = key_of({name: value for name, value in fields.items() if not name.startswith(MEETING_THE_BUDGET)})
        shared = work / "calibrations" / f"{method.name}-{key[:8]}.safetensors"
        if shared.is_file() and not folder.is_dir():
            _copy(shared, folder / SCORES)
        result = self.stages.choose(method, folder, f"{cell.label} {cell.budget} seed {cell.seed}")
        if (folder / SCORES).is_file() and not shared.is_file():
            _copy(folder / SCORES, shared)
        return result


def _copy(file: Path, to: Path) -> None:
    """Copy a file atomically into a folder that may not exist yet."""
    with replacing(to) as new:
        shutil.copyfile(file, new)


def key_of(fields: dict[str, Any]) -> str:
    """Return the hash of a cell's fields. A setting that was added later does not change it at its earlier value."""
    content = json.dumps(without_added(fields), sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
