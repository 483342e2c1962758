"""`prunekit plan`: what a recipe will cut, cost and take, before anything runs; no weights, no network."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from prunekit.compare.cells import DENSE, budget_value, cells_of
from prunekit.cost import CostModel
from prunekit.estimates import (
    FLOAT32,
    Speed,
    Work,
    activation_bytes,
    checkpoint_bytes,
    data_size,
    measure_speed,
    training_bytes,
)
from prunekit.methods.base import Method, space_and_cost
from prunekit.methods.budget import budget_macs
from prunekit.models import PipelineShape, load_shape
from prunekit.recipe import AnyRecipe, CompareRecipe, PretrainRecipe, PruneRecipe
from prunekit.training import emoji_model
from prunekit.training.fine_tuning import FineTuneConfig
from prunekit.units import Architecture, UnitSpace, discover


@dataclass(frozen=True)
class PlannedRow:
    """One row of a recipe's table, and how often its stages run: a comparison repeats them over seeds and protocols."""

    method: Method
    tuning: FineTuneConfig
    searches: int
    models: int  # fine-tuned ones that are kept
    tuning_steps: int  # of all models together
    generations: int

    @property
    def experts(self) -> int:
        """Models of one result."""
        return getattr(self.method.config, "experts", 1)


def plan(recipe: AnyRecipe, throughput: float | None = None) -> dict[str, Any]:
    """Return what a recipe will do and take, as JSON values; MACs are multiply-adds, sizes bytes, times seconds.

    throughput: the device's MACs per second; measured here, in about a second, where it is not given.
    Raises ValueError as the run would: an unknown or unsupported model, a pattern that matches nothing, a budget
    below the floor.
    """
    if isinstance(recipe, PretrainRecipe):
        return _plan_pretraining(recipe, throughput)
    shape = load_shape(recipe.model, recipe.single_file_config)
    planned = _comparison_rows(recipe, shape) if isinstance(recipe, CompareRecipe) else _run_rows(recipe)
    methods = {name: row.method for name, row in planned.items()}
    size = _latent(shape, recipe.resolution)
    training_cost = CostModel(shape.unet, discover(shape.unet, "none"), size, shape.tokenizer.model_max_length)
    rows = {name: _method_row(method, shape) for name, method in methods.items()}
    precision = recipe.fine_tune.precision
    speed = _speed(throughput, shape, training_cost, precision)
    work = _pruning_work(recipe, planned, shape, training_cost.dense_macs)
    return {
        "recipe": recipe.name,
        "job": recipe.job,
        "model": _model_row(shape, recipe.resolution),
        "units": _units(space_and_cost(shape, recipe.prune)[0]),
        "methods": rows,
        "memory": _memory(recipe, methods, rows, shape, size),
        "disk": _disk(recipe, planned, rows, shape, size),
        **_time(work, speed),
    }


def _run_rows(recipe: PruneRecipe) -> dict[str, PlannedRow]:
    rows = {}
    for name in recipe.methods:
        method, tuning = recipe.method(name), recipe.fine_tuning(name)
        models = getattr(method.config, "experts", 1)
        rows[name] = PlannedRow(method, tuning, 1, models, models * tuning.steps, 1)
    return rows


def _comparison_rows(recipe: CompareRecipe, shape: PipelineShape) -> dict[str, PlannedRow]:
    cost = space_and_cost(shape, recipe.prune)[1]
    rows, cells = {}, [cell for cell in cells_of(recipe) if cell.label != DENSE]
    for entry in recipe.budgets:
        budget = budget_value(entry.budget, shape.unet, cost)
        for label in entry.methods or recipe.methods:
            own = [cell for cell in cells if (cell.label, cell.budget) == (label, entry.label)]
            models = sum(cell.num_models for cell in own)
            steps = sum(cell.num_models * recipe.steps(cell.protocol, cell.num_models) for cell in own)
            tuning = recipe.fine_tuning(label, recipe.fine_tune.steps)
            method = recipe.method(label, budget, entry.seeds[0])
            rows[f"{label} @ {entry.label}"] = PlannedRow(method, tuning, len(entry.seeds), models, steps, len(own))
    return rows


def _model_row(shape: PipelineShape, resolution: int | None) -> dict[str, Any]:
    return {
        "name": shape.name,
        "unet": type(shape.unet).__name__,
        "params": sum(p.numel() for p in shape.unet.parameters()),
        "resolution": list(shape.resolution),
        "training_resolution": [resolution, resolution] if resolution else list(shape.resolution),
        "text_length": shape.tokenizer.model_max_length,
    }


def _units(space: UnitSpace) -> dict[str, dict[str, int]]:
    groups, units = Counter(g.kind for g in space.groups), Counter()
    for group in space.groups:
        units[group.kind] += group.size
    return {kind: {"groups": groups[kind], "units": units[kind]} for kind in groups}


def _method_row(method: Method, shape: PipelineShape) -> dict[str, Any]:
    """Costs before and after; the parameters left are an estimate, since nothing is chosen yet."""
    space, cost = space_and_cost(shape, method.config)
    target = budget_macs(cost, method.config.budget)
    floor = cost.macs(Architecture(space, torch.zeros(space.size, dtype=torch.bool)))
    params = cost.params(_uniform(cost, target))
    return {
        "budget": method.config.budget,
        "experts": getattr(method.config, "experts", 1),
        "units": space.size,
        "convention": cost.convention,
        "sample_size": list(cost.sample_size),
        "text_length": cost.text_length,
        "dense_macs": cost.dense_macs,
        "target_macs": target,
        "floor": floor / cost.dense_macs,
        "dense_params": cost.dense_params,
        "params_estimate": int(params),
    }


def _uniform(cost: CostModel, target: int) -> torch.Tensor:
    """Return gates (D,), all equal, at which the expected MACs are `target`."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        gates = torch.full((cost.space.size,), middle, dtype=torch.float64)
        low, high = (middle, high) if float(cost.macs(gates)) < target else (low, middle)
    return torch.full((cost.space.size,), low, dtype=torch.float64)


def _pruning_work(
    recipe: PruneRecipe | CompareRecipe, rows: dict[str, PlannedRow], shape: PipelineShape, dense: int
) -> list[Work]:
    """List the stages. A backward pass counts as one forward pass per gradient: of the input, of the weights."""
    evaluation, work = recipe.evaluation, []
    for name, row in rows.items():
        search = getattr(row.method.config, "search", None)
        if search is not None:
            teacher = getattr(row.method.config, "distillation_weight", 0) > 0
            passes = "forward, backward to the gates" + (", teacher" if teacher else "")
            samples = row.searches * search.steps * search.batch_size
            work.append(Work(f"{name}: search", samples, (2 + teacher) * dense, passes))
    for name, row in rows.items():
        teacher = row.tuning.distillation_weight > 0
        macs = (3 * row.method.config.budget + teacher) * dense
        passes = f"{row.models} x (forward, backward{', teacher' if teacher else ''})"
        work.append(Work(f"{name}: fine-tuning", row.tuning_steps * row.tuning.batch_size, macs, passes))
    generation = CostModel(shape.unet, discover(shape.unet, "none"), None, shape.tokenizer.model_max_length)
    calls = (evaluation.steps + 1) * (2 if evaluation.guidance > 1 else 1)  # PNDM calls once more
    seeds = max(row.searches for row in rows.values())
    ratios = {DENSE: (1.0, seeds), **{name: (row.method.config.budget, row.generations) for name, row in rows.items()}}
    for name, (ratio, count) in ratios.items():
        macs = calls * ratio * generation.dense_macs
        work.append(Work(f"{name}: generation", count * evaluation.num_images, macs, f"{calls} UNet calls an image"))
    return work


def _memory(
    recipe: PruneRecipe | CompareRecipe,
    methods: dict[str, Method],
    rows: dict[str, dict],
    shape: PipelineShape,
    size: tuple[int, int],
) -> dict[str, Any]:
    dense = sum(p.numel() for p in shape.unet.parameters())
    largest = max(row["params_estimate"] for row in rows.values())
    length = shape.tokenizer.model_max_length
    stages = {
        "fine-tuning": dense * FLOAT32
        + training_bytes(largest, recipe.fine_tune)
        + activation_bytes(shape.unet, size, length, recipe.fine_tune)
    }
    for name, method in methods.items():
        search = getattr(method.config, "search", None)
        if search is not None:
            stages[f"{name}: search"] = dense * FLOAT32 + activation_bytes(shape.unet, size, length, search)
    return {
        "dense_weights": {"float32": 4 * dense, "float16": 2 * dense},
        "expert_weights": {"float32": 4 * largest, "float16": 2 * largest},
        "training_peak": stages,
        "how": "the UNets' weights, gradients and optimizer in float32, and what autograd saves for one micro-batch "
        "(from the layers' output shapes); without the autoencoder, the text encoder and temporary buffers",
    }


def _disk(
    recipe: PruneRecipe | CompareRecipe,
    planned: dict[str, PlannedRow],
    rows: dict[str, dict],
    shape: PipelineShape,
    size: tuple[int, int],
) -> dict[str, Any]:
    experts = sum(planned[name].models * row["params_estimate"] for name, row in rows.items())
    largest = max(row["params_estimate"] for row in rows.values())
    height, width = shape.resolution
    pictures = 1 + sum(row.generations for row in planned.values())
    counted = data_size(recipe.data)
    cache = None
    if counted is not None:
        images, captions = counted
        text_width = shape.unet.config.cross_attention_dim
        text = captions * shape.tokenizer.model_max_length * (text_width if isinstance(text_width, int) else 1)
        cache = FLOAT32 * (images * shape.unet.config.in_channels * size[0] * size[1] + text)
    return {
        "experts": FLOAT32 * experts,
        "checkpoints": 2 * checkpoint_bytes(largest, recipe.fine_tune),  # the new one is written beside the old one
        "samples": pictures * recipe.evaluation.num_images * 3 * height * width,  # PNG compresses
        "encoded_cache": cache,
        "data": None if counted is None else {"images": counted[0], "captions": counted[1]},
    }


def _plan_pretraining(recipe: PretrainRecipe, throughput: float | None) -> dict[str, Any]:
    shapes = recipe.shapes
    with torch.device("meta"):
        unet, autoencoder = emoji_model.build_unet(shapes).eval(), emoji_model.build_autoencoder(shapes).eval()
    size = (unet.config.sample_size,) * 2
    shape = PipelineShape(recipe.name, unet, shapes.image_size // size[0], _tokens())
    cost = CostModel(unet, discover(unet, "none"), size, emoji_model.TOKENS)
    encoding, decoding = _autoencoder_macs(autoencoder, shapes.image_size, size)
    work = [
        _training("autoencoder", recipe.autoencoder, 3 * (encoding + decoding), "forward, backward"),
        _training("decoder", recipe.decoder, encoding + 3 * decoding, "encoder; decoder forward, backward"),
        _training("diffusion", recipe.diffusion, 3 * cost.dense_macs, "UNet forward, backward"),
        _training("evaluator", recipe.evaluator, None, "not counted"),
    ]
    calls = (recipe.evaluation.steps + 1) * (2 if recipe.evaluation.guidance > 1 else 1)
    images = recipe.evaluation.num_images * (len(recipe.milestones) + 1)
    work.append(Work("quality curve: generation", images, calls * cost.dense_macs, f"{calls} UNet calls an image"))
    params = cost.dense_params
    peak = training_bytes(params, recipe.diffusion) + activation_bytes(unet, size, emoji_model.TOKENS, recipe.diffusion)
    kept = (len(recipe.milestones) + 1) * 2 * params
    return {
        "recipe": recipe.name,
        "job": recipe.job,
        "model": _model_row(shape, None) | {"macs": cost.dense_macs},
        "memory": {
            "dense_weights": {"float32": 4 * params, "float16": 2 * params},
            "training_peak": {"diffusion": peak},
            "how": "the UNet's weights, gradients and optimizer in float32, and what autograd saves for one "
            "micro-batch (from the layers' output shapes); without the text encoder and temporary buffers",
        },
        "disk": {"checkpoints": 2 * checkpoint_bytes(params, recipe.diffusion), "milestones": kept},
        **_time(work, _speed(throughput, shape, cost, recipe.diffusion.precision)),
    }


def _tokens():
    from prunekit.models import TokenizerShape

    return TokenizerShape(emoji_model.TOKENS)


def _training(stage: str, config: Any, macs: float | None, passes: str) -> Work:
    return Work(stage, config.steps * config.batch_size, macs, passes)


@torch.no_grad()
def _autoencoder_macs(autoencoder: Any, side: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return the MACs of encoding and of decoding one picture."""
    counts = []
    latent = torch.zeros(1, autoencoder.config.latent_channels, *size, device="meta")
    for function, value in (
        (autoencoder.encode, torch.zeros(1, 3, side, side, device="meta")),
        (autoencoder.decode, latent),
    ):
        with FlopCounterMode(display=False) as counter:
            function(value)
        counts.append(counter.get_total_flops() // 2)
    return counts[0], counts[1]


def _latent(shape: PipelineShape, resolution: int | None) -> tuple[int, int]:
    """Return the latent (h, w) of training."""
    height, width = (resolution, resolution) if resolution else shape.resolution
    if height % shape.vae_scale_factor:
        raise ValueError(f"resolution={resolution} must be a multiple of the VAE's scale {shape.vae_scale_factor}")
    return height // shape.vae_scale_factor, width // shape.vae_scale_factor


def _speed(throughput: float | None, shape: PipelineShape, cost: CostModel, precision: str) -> Speed:
    if throughput is not None:
        return Speed(throughput, "as stated")
    return measure_speed(shape.unet, cost.dense_macs, cost.sample_size, cost.text_length, precision)


def _time(work: list[Work], speed: Speed) -> dict[str, Any]:
    rows = [
        {
            "stage": item.stage,
            "samples": item.samples,
            "passes": item.passes,
            "macs": item.macs,
            "seconds": None if item.macs is None else item.macs / speed.macs_per_second,
        }
        for item in work
    ]
    total = sum(row["seconds"] or 0.0 for row in rows)
    return {"work": rows, "seconds": total, "speed": {"macs_per_second": speed.macs_per_second, "how": speed.source}}
