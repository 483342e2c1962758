"""The device memory that a recipe's stages take, and the disk space of its files."""

from dataclasses import asdict
from typing import Any

from prunekit.core.registry import denoiser_in, denoiser_of, texts_of
from prunekit.data.cache_config import cache_bytes
from prunekit.data.encoders import BATCH, BATCH_SIDE
from prunekit.jobs.plan.data_size import DataSize, prompt_width
from prunekit.jobs.plan.planned_models import PlannedModel
from prunekit.jobs.plan.planned_rows import PlannedRow, tuning_devices
from prunekit.jobs.plan.rehearsal import FLOAT32, LOWERED, training_bytes
from prunekit.jobs.recipe import CompareRecipe, PruneRecipe
from prunekit.recovery.closed_form import ClosedFormConfig
from prunekit.recovery.fine_tuning import FineTuneConfig
from prunekit.recovery.low_rank import num_changes
from prunekit.training.memory import samples_at_once
from prunekit.training.trainer import TrainerConfig

HOW = (
    "the pipeline's weights (of those in host memory none), what trains with its gradients and optimizer, and every "
    "tensor of a step (from a rehearsal on tensors without content); not the prompt encoder, the evaluator, the "
    "allocator's gaps, and the scratch space of kernels"
)


def memory(
    recipe: PruneRecipe | CompareRecipe,
    rows: dict[str, PlannedRow],
    described: dict[str, dict[str, Any]],
    model: PlannedModel,
    devices: int,
) -> dict[str, Any]:
    """Return the size of the weights, and the peak memory of each stage on one device, in bytes."""
    largest = max(row["params_kept"] for row in described.values())
    frozen = LOWERED if model.lowered else FLOAT32  # bytes per frozen weight
    resident = frozen * (model.params + model.parts.params * (not recipe.memory.offload))
    latent, scale = model.latent(recipe.resolution), model.parts.scale
    stages: dict[str, int] = {}
    pixels = (latent[0] * scale, latent[1] * scale)
    at_once = max(1, min(BATCH, BATCH * BATCH_SIDE**2 // (pixels[0] * pixels[1])))
    stages["encoding"] = model.once(("encoding", pixels), lambda: model.rehearsal.encoding(pixels, at_once))
    for name, row in rows.items():
        work = row.work(model)
        if work.search is not None:
            stages[f"{name}: search"] = _search(row, work.search.training, model, latent, devices)
        for calibration in work.calibrations:
            if calibration.training_batch is not None:
                gradients = 2 * FLOAT32 * model.params  # the accumulated gradient, and that of one timestep
                step = _training(calibration.training_batch, None, model, latent)
                stages[f"{name}: {calibration.title}"] = gradients + step
            elif calibration.forward_batch is not None:
                passes = _forward(calibration.forward_batch, recipe.fine_tune.precision, model, latent)
                held = row.method.calibration_bytes(model.shape.denoiser)
                stages[f"{name}: {calibration.title}"] = passes + held
    for row in rows.values():
        if row.closed_form is not None:
            trains_all = row.tuning_steps and row.tuning.lora is None
            size = (FLOAT32 if trains_all else frozen) * largest + _refit(row, row.closed_form, model, latent)
            stages["closed-form refit"] = max(stages.get("closed-form refit", 0), size)
    for config in (row.tuning for row in rows.values() if row.tuning_steps):
        samples = samples_at_once(config, tuning_devices(rows, devices))
        teacher = 0  # bytes in addition to the resident dense weights
        if recipe.memory.offload:
            teacher = -frozen * model.params
        elif config.precision != "float32" and config.distillation_weight and not model.lowered:
            teacher = LOWERED * model.params
        weights = training_bytes(trained_params(largest, config, model), config)
        if config.lora is not None:  # the frozen weights are held in addition
            weights += frozen * largest
        size = weights + teacher + _training(samples, config, model, latent)
        stages["fine-tuning"] = max(stages.get("fine-tuning", 0), size)
    stages["generation"] = frozen * largest + _sampling(recipe, model)
    return {
        "dense_weights": {"float32": FLOAT32 * model.params, "float16": LOWERED * model.params},
        "expert_weights": {"float32": FLOAT32 * largest, "float16": LOWERED * largest},
        "peak": {stage: resident + size for stage, size in stages.items()},
        "how": HOW,
    }


def _held(config: TrainerConfig | None) -> tuple[Any, ...]:
    """Return the settings of a training that change the memory of a step."""
    return (False, False) if config is None else (config.precision != "float32", config.gradient_checkpointing)


def _search(row: PlannedRow, config: TrainerConfig, model: PlannedModel, latent: tuple[int, int], devices: int) -> int:
    space = model.costs(row.method.config)[0]
    samples = samples_at_once(config, devices)
    key = ("search", id(space), latent, samples, *_held(config))
    return model.once(key, lambda: model.rehearsal.search(space, latent, model.tokens, samples, config))


def _refit(row: PlannedRow, config: ClosedFormConfig, model: PlannedModel, latent: tuple[int, int]) -> int:
    passes = _forward(config.batch_size, config.precision, model, latent)
    return passes + config.sums_bytes(model.shape.denoiser, row.budget)


def _forward(samples: int, precision: str, model: PlannedModel, latent: tuple[int, int]) -> int:
    key = ("forward", latent, samples, precision)
    return model.once(key, lambda: model.rehearsal.forward(latent, model.tokens, samples, precision))


def _training(samples: int, config: TrainerConfig | None, model: PlannedModel, latent: tuple[int, int]) -> int:
    if isinstance(config, FineTuneConfig) and config.lora is not None:
        key = ("low rank", config.lora.rank, latent, samples, *_held(config))
        return model.once(key, lambda: model.rehearsal.low_rank(latent, model.tokens, samples, config))
    key = ("training", latent, samples, *_held(config))
    return model.once(key, lambda: model.rehearsal.training(latent, model.tokens, samples, config))


def _sampling(recipe: PruneRecipe | CompareRecipe, model: PlannedModel) -> int:
    settings = recipe.evaluation
    samples = min(settings.batch_size, settings.num_images)
    latent, guided, precision = model.latent(), texts_of(model.shape, settings.guidance) > 1, settings.precision
    key = ("sampling", latent, model.tokens, samples, guided, precision)
    return model.once(key, lambda: model.rehearsal.sampling(latent, model.tokens, samples, guided, precision))


def trained_params(size: int, config: FineTuneConfig, model: PlannedModel) -> int:
    """Return the trained parameters of a pruned model with `size` parameters: all, or only its low-rank changes."""
    return size if config.lora is None else num_changes(model.shape.denoiser, config.lora)


def checkpoint_bytes(params: int, config: TrainerConfig) -> int:
    """Return the bytes of a checkpoint of `params` trained parameters: weight, two moments, and an EMA if kept."""
    return params * FLOAT32 * (3 + (config.ema is not None))


def disk(
    recipe: PruneRecipe | CompareRecipe,
    rows: dict[str, PlannedRow],
    described: dict[str, dict[str, Any]],
    model: PlannedModel,
    data: DataSize | None,
    devices: int,
) -> dict[str, Any]:
    """Return the bytes of the files that a run writes, by kind; None: not known before the data is read."""
    lowered = model.lowered and all(row.tuning.lora is not None or not row.tuning_steps for row in rows.values())
    experts = sum(rows[name].models * row["params_kept"] for name, row in described.items())
    experts *= LOWERED if lowered else FLOAT32
    largest = max(row["params_kept"] for row in described.values())
    steps = [step for step in recipe.evaluation.at_steps if step < recipe.fine_tune.steps]
    height, width = model.shape.resolution
    pictures = recipe.drawn_images * (1 + sum(row.generations for row in rows.values()))
    at_once = min(devices, sum(row.models for row in rows.values()))
    tuning: FineTuneConfig = recipe.fine_tune
    trained = trained_params(largest, tuning, model) if any(row.tuning_steps for row in rows.values()) else 0
    cache = None if data is None else _cache(recipe, model, data)
    content = {
        "experts": experts,
        "snapshots": experts * len(steps),
        "checkpoints": at_once * (tuning.keep_checkpoints + 1) * checkpoint_bytes(trained, tuning),
        "samples": pictures * 3 * height * width,  # PNG compresses
        "encoded": cache,
    }
    known = [value for value in content.values() if isinstance(value, int)]
    return content | {
        "total": sum(known) + sum((cache or {}).values()),
        "data": None if data is None else asdict(data),
    }


def _cache(recipe: PruneRecipe | CompareRecipe, model: PlannedModel, data: DataSize) -> dict[str, int]:
    dense = denoiser_in(model.shape)
    denoiser = denoiser_of(dense)
    return cache_bytes(
        data.images,
        data.captions,
        (denoiser.latent_channels(dense), *model.latent(recipe.resolution)),
        (model.tokens, denoiser.text_width(dense)),
        prompt_width(recipe.prompt_encoder),
        recipe.cache,
        denoiser.pooled_width(dense),
    )
