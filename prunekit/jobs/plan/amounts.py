"""The MACs of a recipe's stages, and the time that the stages take on one device and on several."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prunekit.core.registry import texts_of
from prunekit.data.cache_config import CacheConfig
from prunekit.jobs.plan.data_size import DataSize
from prunekit.jobs.plan.planned_models import PlannedModel
from prunekit.jobs.plan.planned_rows import PlannedRow
from prunekit.jobs.plan.speed import Speed
from prunekit.jobs.recipe import CompareRecipe, PruneRecipe
from prunekit.recovery.closed_form import most_consumers
from prunekit.runtime.run_directory import DENSE
from prunekit.training.trainer import TrainerConfig

ENCODING, CHOICE, TUNING, GENERATION = "encoding", "choice", "fine-tuning", "generation"  # parts of a recipe's work
REFIT, REFIT_PASSES = "closed-form refit", "forward, teacher, for each layer or package of layers"


@dataclass(frozen=True)
class Work:
    """One stage: the number of samples, and the MACs per sample over all passes (None: not counted).

    stage: title of the stage. passes: description of the passes of one sample.
    jobs: number of independent parts of equal work, each for one device; 0: all devices share every step.
    label, part: label of the method that the stage serves, and the part of the recipe's work (such as TUNING).
    """

    stage: str
    samples: int
    macs_per_sample: float | None
    passes: str
    jobs: int = 0
    label: str | None = None
    part: str | None = None

    @property
    def macs(self) -> float | None:
        """MACs of the stage."""
        return None if self.macs_per_sample is None else self.samples * self.macs_per_sample


def pruning_work(
    recipe: PruneRecipe | CompareRecipe, rows: dict[str, PlannedRow], model: PlannedModel, data: DataSize | None
) -> list[Work]:
    """List a recipe's stages. A backward pass counts as one forward pass per gradient (of inputs, of weights)."""
    latent = model.latent(recipe.resolution)
    dense, encoder = model.dense_macs(latent), model.picture_macs(latent)[0]
    live = _live_macs(recipe.cache, encoder, model.parts.caption_macs)
    work = _encoding(recipe.cache, encoder, model.parts.caption_macs, data)
    for name, row in rows.items():
        work += _calibration(name, row, model, dense) if row.choices else []
    for name, row in rows.items():
        work += _search(name, row, model, dense, live) if row.choices else []
    for name, row in rows.items():
        if row.closed_form is not None:
            computed = row.closed_form.dense_passes(most_consumers(model.shape.denoiser), row.budget)
            samples, macs = row.models * row.closed_form.samples, computed / row.closed_form.samples * dense
            work.append(Work(f"{name}: {REFIT}", samples, macs, REFIT_PASSES, row.models, row.label, REFIT))
        if not row.tuning_steps:
            continue
        teacher = row.tuning.distillation_weight > 0
        macs = row.tuning.dense_passes(row.budget) * dense + live
        passes = f"{row.models} x ({_passes('backward', row.tuning, teacher)})"
        samples = row.tuning_steps * row.tuning.batch_size
        work.append(Work(f"{name}: {TUNING}", samples, macs, passes, row.models, row.label, TUNING))
    return [*work, *_generation(recipe, rows, model)]


def _passes(backward: str, config: TrainerConfig, teacher: bool) -> str:
    passes = ["forward", *(["forward again"] if config.gradient_checkpointing else []), backward]
    return ", ".join([*passes, *(["teacher"] if teacher else [])])


def _live_macs(cache: CacheConfig, encoder: int, caption: int) -> int:
    """Return the MACs of encoding one sample in a training step, for the parts that the cache does not store."""
    return (encoder if cache.latents == "off" else 0) + (0 if cache.text else caption)


def _encoding(cache: CacheConfig, encoder: int, caption: int, data: DataSize | None) -> list[Work]:
    work = []
    if data is not None and cache.latents != "off":
        work.append(Work("encoding of pictures", data.images, encoder, "the autoencoder's encoder", part=ENCODING))
    if data is not None and cache.text:
        work.append(Work("encoding of captions", data.captions, caption, "the text encoders", part=ENCODING))
    return work


def _calibration(name: str, row: PlannedRow, model: PlannedModel, dense: int) -> list[Work]:
    """Return the stages in which a method calibrates before it chooses."""
    return [
        Work(
            f"{name}: {calibration.title}",
            row.choices * calibration.samples,
            calibration.forward_passes * dense,
            calibration.passes,
            label=row.label,
            part=CHOICE,
        )
        for calibration in row.work(model).calibrations
    ]


def _search(name: str, row: PlannedRow, model: PlannedModel, dense: int, live: int) -> list[Work]:
    """Return the search stage of a method, if it searches; live: MACs of encoding a sample in each step."""
    search = row.work(model).search
    if search is None:
        return []
    training, teacher = search.training, search.has_teacher
    samples = row.choices * training.steps * training.batch_size
    macs = search.passes_per_sample * dense + live
    passes = _passes("backward to the gates", training, teacher)
    return [Work(f"{name}: search", samples, macs, passes, label=row.label, part=CHOICE)]


def _generation(recipe: PruneRecipe | CompareRecipe, rows: dict[str, PlannedRow], model: PlannedModel) -> list[Work]:
    evaluation = recipe.evaluation
    dense, decoder = model.dense_macs(), model.picture_macs(model.latent())[1]
    calls = model.parts.calls(evaluation.steps, texts_of(model.shape, evaluation.guidance))
    seeds = len({seed for entry in recipe.budgets for seed in entry.seeds}) if isinstance(recipe, CompareRecipe) else 1
    sets = {name: (row.label, row.budget, row.generations) for name, row in rows.items()}
    passes = f"{calls} denoiser calls ({type(model.parts.scheduler).__name__}), decoder"
    return [
        Work(
            f"{name}: {GENERATION}",
            count * recipe.drawn_images,
            calls * ratio * dense + decoder,
            passes,
            label=label,
            part=GENERATION,
        )
        for name, (label, ratio, count) in {DENSE: (DENSE, 1.0, seeds), **sets}.items()
    ]


def timed(work: Sequence[Work], speed: Speed, devices: int) -> dict[str, Any]:
    """Return the stages with their seconds at a device's speed; see `scheduled`."""
    seconds = [None if item.macs is None else item.macs / speed.macs_per_second for item in work]
    content = scheduled(work, seconds, devices)
    return content | {"speed": {"macs_per_second": speed.macs_per_second, "how": speed.source}}


def scheduled(work: Sequence[Work], seconds: Sequence[float | None], devices: int) -> dict[str, Any]:
    """Return the stages with their seconds on one device, their sum, and the wall-clock time on `devices`.

    Stages run one after another, and the devices share the samples of each. But if there are at least as many models
    to recover as devices, these models form a queue of independent jobs, each on one device.
    seconds: time of each stage on one device; None: not known.
    """
    total = sum(value or 0.0 for value in seconds)
    jobs = [(value or 0.0) / item.jobs for item, value in zip(work, seconds, strict=True) for _ in range(item.jobs)]
    wall = (total - sum(jobs)) / devices
    wall += _queue(jobs, devices) if len(jobs) >= devices else sum(jobs) / devices
    rows = [
        {"stage": item.stage, "samples": item.samples, "passes": item.passes, "macs": item.macs, "seconds": value}
        for item, value in zip(work, seconds, strict=True)
    ]
    return {"work": rows, "seconds": total, "gpu_hours": total / 3600, "devices": devices, "wall_seconds": wall}


def _queue(jobs: Sequence[float], devices: int) -> float:
    """Return the time at which the last job ends; each free device takes the next job in order."""
    free = [0.0] * devices
    for seconds in jobs:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)
