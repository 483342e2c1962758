"""Compare training steps, the closed-form fit and unit scores of a small model with those of the CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import small_data
import small_transformers
import torch
import unets
from torch import Tensor

import prunekit as pk
from benchmarks.gpu_suite.record import Found, Piece, Settings
from benchmarks.gpu_suite.reference import (
    CPU,
    DTYPES,
    GRADIENT,
    TOLERANCES,
    compared,
    exact_float32,
    precisions,
    running,
)
from prunekit.core.registry import process_of
from prunekit.jobs.bench.modes import Mode
from prunekit.measuring.clock import timed_inputs
from prunekit.measuring.layer_times import measure_table
from prunekit.methods import APTP, OBS, Norm, TaylorSP
from prunekit.methods.base import space_and_cost
from prunekit.recovery.fine_tuning import FineTuneConfig, FineTuningObjective
from prunekit.runtime.precision import autocast
from prunekit.training.memory import held

BATCH, STEP, PAIRS, SIDE = 4, 2, 12, 8
SCALE = 1024.0  # factor on a loss against underflow of float16 gradients; the gradient is divided by it
TRAINING = {"steps": 3, "batch_size": BATCH, "learning_rate": 1e-3, "log_every": 1}
FAMILIES: dict[Mode, str] = {"eager": "sd2", "compiled": "sd35"}  # a UNet has many regions, so compiling it is slow
NO_GRAPH = "a training step is not captured as a CUDA graph: the host draws each batch and sets the gates"
NO_COMPILED_FIT = "the fit stops each pass at the layer that it fits, which a compiled region or a CUDA graph cannot do"


def pieces(settings: Settings) -> list[Piece]:
    """Return the pieces: training steps by stage, precision and mode, trainings, closed-form fits, and scores."""
    modes: tuple[Mode, ...] = ("eager", "compiled")
    found = [
        Piece(f"{stage} step, {precision}, {mode}", partial(step, settings, stage, precision, mode))
        for mode in modes
        for stage in STAGES
        for precision in precisions(mode, settings.reduced)
    ]
    found += [Piece(f"whole trainings, {precision}", partial(trainings, settings, precision)) for precision in DTYPES]
    found += [Piece(f"closed-form fit, {precision}", partial(fit, settings, precision)) for precision in DTYPES]
    return [*found, Piece("unit scores, costs and a latency table", partial(scores, settings))]


def dense(device: torch.device, family: str = "sd2") -> Any:
    """Return a small denoiser; its weights are the same in every call."""
    made = unets.build(family, layers_per_block=1) if family in unets.SHAPES else small_transformers.build(family)
    return made.requires_grad_(False).to(device)


def student_of(model: Any) -> Any:
    """Return the model sliced at random, with trainable weights."""
    return pk.slice_model(model, pk.discover(model).random(0.6, seed=0)).train().requires_grad_(True)


@contextmanager
def search(model: Any, precision: str) -> Iterator[tuple[Any, list[Any]]]:
    """Yield the objective of APTP's search, and the models that it runs."""
    method = APTP(experts=2, warmup=1, search={**TRAINING, "precision": precision})
    data = small_data.encoded_for(model, PAIRS, SIDE)
    space, cost = space_and_cost(small_data.stub(model), method.config)
    with held(method.config.search, model), pk.gated(model, space) as gates:
        objective = method._objective(model, gates, cost, process_of(small_data.stub(model)), data)
        objective.batch(method.config.warmup)  # this call initializes the codes
        codes = objective.codes.values.data
        codes.copy_(4 * torch.randn(codes.shape, generator=torch.Generator().manual_seed(0)) - 3)  # gates across (0, 1)
        yield objective, [model]


@contextmanager
def fine_tuning(model: Any, precision: str) -> Iterator[tuple[Any, list[Any]]]:
    """Yield the objective of a sliced model's fine-tuning, and the models that it runs."""
    config = FineTuneConfig(**TRAINING, precision=precision, feature_blocks="none", denoising_weight=0.5)
    student, data = student_of(model), small_data.encoded_for(model, PAIRS, SIDE)
    process, pairs = process_of(small_data.stub(model)), data.training_pairs()
    with held(config, student, model):
        yield FineTuningObjective(student, model, process, data, pairs, config, 0, model.device), [student, model]


STAGES: dict[str, Callable[..., Any]] = {"search": search, "fine-tuning": fine_tuning}


def step(settings: Settings, stage: str, precision: str, mode: Mode) -> Found:
    """Compare the loss terms of one step, and the gradients of its two parts, with those of the CPU."""
    tolerance, family = TOLERANCES[precision], FAMILIES[mode]
    with exact_float32():
        here = taken(stage, family, settings.device, precision, mode, settings.reduced)
        there = taken(stage, family, CPU, "float32", "eager", True)
    found = Found(left_out=[NO_GRAPH] if mode == "eager" else [])
    for name, value in here.terms.items():
        found.comparisons.append(compared(f"{stage}, {family}: {name}", value, there.terms[name], tolerance))
    for name, value in here.gradients.items():
        what = f"{stage}, {family}: gradient of the {name} terms"
        found.comparisons.append(compared(what, value, there.gradients[name], GRADIENT * tolerance))
    return found


@dataclass
class Taken:
    """Results of one step: its loss terms by name, and by part the gradient (weights,) of the sum of its terms."""

    terms: dict[str, Tensor]
    gradients: dict[str, Tensor]


def taken(stage: str, family: str, device: torch.device, precision: str, mode: Mode, reduced: bool) -> Taken:
    """Run a training step after the warm-up, without the optimizer."""
    with STAGES[stage](dense(device, family), precision) as (objective, models):
        calls = [(model, timed_inputs(model, BATCH, SIDE, 7)) for model in models]
        with running(calls, mode, reduced):
            batch = objective.batch(STEP)
            parts = {"whole batch's": objective.shared_loss(batch)}
            with autocast(precision, device):
                parts["samples'"] = objective.micro_loss(batch, torch.arange(BATCH))
            trained = [p for module in objective.modules.values() for p in module.parameters() if p.requires_grad]
            parts = {name: terms for name, terms in parts.items() if terms}
            return Taken(
                {name: value.detach() for terms in parts.values() for name, value in terms.items()},
                {name: gradient(terms, trained) for name, terms in parts.items()},
            )


def gradient(terms: dict[str, Tensor], trained: list[Tensor]) -> Tensor:
    """Return the flat float32 gradient of the sum of loss terms."""
    total = torch.stack([value.float() for value in terms.values()]).sum()
    gradients = torch.autograd.grad(SCALE * total, trained, retain_graph=True, allow_unused=True)
    return torch.cat([values.float().flatten() / SCALE for values in gradients if values is not None])


def trainings(settings: Settings, precision: str) -> Found:
    """Compare the losses of a whole search and of a whole fine-tuning with those of the CPU.

    The fine-tuning includes the moving average, recomputed activations and checkpoints.
    """
    tolerance, found = GRADIENT * TOLERANCES[precision], Found()
    with exact_float32():
        for name, train in {"search": searched, "fine-tuning": tuned}.items():
            losses, expected = train(settings.device, precision), train(CPU, "float32")
            found.comparisons.append(
                compared(f"{name}: loss of {TRAINING['steps']} steps", losses, expected, tolerance)
            )
    return found


def searched(device: torch.device, precision: str) -> Tensor:
    """Run a whole search, and return its losses."""
    model, rows = dense(device), []
    search = {**TRAINING, "precision": precision, "channels_last": True}
    method = APTP(budget=0.7, experts=2, warmup=1, search=search)
    method.prune(small_data.stub(model), small_data.encoded_for(model, PAIRS, SIDE), log=rows.append)
    return torch.tensor([row["loss"] for row in rows])


def tuned(device: torch.device, precision: str) -> Tensor:
    """Run a whole fine-tuning, and return its losses."""
    model, rows = dense(device), []
    config = FineTuneConfig(**TRAINING, precision=precision, micro_batch=2, gradient_checkpointing=True, ema=0.9)
    with TemporaryDirectory() as folder:
        options = {"scheduler": small_data.stub(model).scheduler, "log": rows.append}
        pk.fine_tune(
            student_of(model), model, small_data.encoded_for(model, PAIRS, SIDE), config, Path(folder), **options
        )
    return torch.tensor([row["loss"] for row in rows])


def fit(settings: Settings, precision: str) -> Found:
    """Compare the results of refitting with the CPU's: the layers' errors, and the refitted UNet's output."""
    config = pk.ClosedFormConfig(samples=4, batch_size=4, layers_at_once=16, ridges=[1e-1], precision=precision)
    tolerance, results = GRADIENT * TOLERANCES[precision], []
    with exact_float32():
        for device, chosen in ((settings.device, config), (CPU, config.model_copy(update={"precision": "float32"}))):
            model = dense(device)
            student = student_of(model).requires_grad_(False)
            data = small_data.encoded_for(model, PAIRS, SIDE)
            fits = pk.refit(student, small_data.stub(model), data, chosen)
            with torch.no_grad():
                output = student.eval()(**timed_inputs(student, 2, SIDE, 7)).sample
            results.append((torch.tensor([one.after for one in fits]), output.cpu()))
    (errors, output), (expected_errors, expected) = results
    return Found(
        comparisons=[
            compared("closed-form fit: errors of the layers", errors, expected_errors, tolerance),
            compared("closed-form fit: output", output, expected, tolerance),
        ],
        left_out=[NO_COMPILED_FIT],
    )


def scores(settings: Settings) -> Found:
    """Compare unit scores of Norm, Taylor-SP and OBS, and soft costs, with the CPU's; measure a latency table."""
    found, tolerance = Found(), GRADIENT * TOLERANCES["float32"]
    few: dict[str, Any] = {"samples": 4, "batch_size": 2}
    methods = (Norm(), TaylorSP(**few, num_timesteps=2, precision="float32"), OBS(**few))
    with exact_float32():
        for method in methods:
            here, there = (
                method.score(small_data.stub(model), small_data.encoded_for(model, PAIRS, SIDE))
                for model in (dense(settings.device), dense(CPU))
            )
            found.comparisons.append(compared(f"scores of {method.name}", here.values, there.values, tolerance))
    model = dense(settings.device)
    cost = pk.CostModel(model, pk.discover(model), SIDE, 7)
    gates = torch.rand(3, cost.space.size, generator=torch.Generator().manual_seed(0))
    soft = cost.expected_macs(gates.to(settings.device))
    found.comparisons.append(compared("soft costs", soft, cost.expected_macs(gates), TOLERANCES["float32"]))
    measured = measure_table(model, (SIDE, SIDE), 7, widths=2, seconds=0.05)
    found.rows.append({"latency table of": "small UNet", "layers": len(measured.layers), "nanoseconds": measured.dense})
    return found
