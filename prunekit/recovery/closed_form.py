"""Closed-form recovery: refit the layers that read cut channels to the outputs of the dense model's layers.

The layers are refitted one after another, in the order of the forward pass. Ridge regression on calibration samples
fits the weight and bias of a layer: its inputs are those that the pruned model now provides, and its targets are the
outputs of the dense model's layer. The method follows OBS-Diff (arXiv 2510.06751, after OBC, arXiv 2208.11580), except
that the ridge pulls towards the weights that the cut left.

Only forward passes run. Memory holds the dense model, the pruned model, and the sums of one layer, or of the few layers
that are fitted from the same passes (OBS-Diff's module packages).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import DiffusionPipeline, ModelMixin
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from prunekit.core.axes import weight_of
from prunekit.core.call import Call
from prunekit.core.discovery import whole_space
from prunekit.core.record import read_pruning
from prunekit.core.registry import denoiser_in, denoiser_of
from prunekit.data.encoded import EncodedData
from prunekit.methods.calibration import (
    TIMESTEP_WEIGHTS,
    TimestepWeights,
    calibration_batches,
    evaluation_mode,
    layer_values,
    sample_weights,
)
from prunekit.methods.least_squares import Sums, packed, sums_bytes, unpack
from prunekit.recovery.backbone import kept_entries
from prunekit.runtime.precision import autocast
from prunekit.runtime.processes import current
from prunekit.runtime.progress import Progress

SOLVING = 3  # copies of a layer's sums while its system is solved
LEFT_OUT = 4  # every 4th sample is left out of the fit, to choose the ridge


class ClosedFormConfig(BaseModel):
    """Settings of the closed-form refit."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    samples: int = Field(
        512, gt=1, description="Number of calibration samples: captioned pictures, each at one timestep."
    )
    batch_size: int = Field(32, gt=0, description="Samples per forward pass.")
    ridges: list[float] = Field(
        [1e-4, 1e-3, 1e-2, 1e-1, 1.0],
        min_length=1,
        description="Candidate ridges, in units of the mean square of a layer's inputs. The best ridge on a quarter of "
        "the samples is used, or no refit if the cut weights are better there; with fewer than 4 samples, "
        "the first ridge.",
    )
    inputs: Literal["pruned", "dense"] = Field(
        "pruned",
        description="Inputs on which a layer is fitted: those in the pruned model at this point, or those in the dense "
        "model.",
    )
    timestep_weights: TimestepWeights = Field("uniform", description=TIMESTEP_WEIGHTS)
    layers_at_once: int = Field(
        1,
        gt=0,
        description="Number of layers that are fitted from the same passes over the samples. More layers "
        "take less time and more memory, but a layer then does not see the refit of earlier "
        "layers of the same passes.",
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Autocast dtype of the forward passes; sums and solutions are float64."
    )

    def dense_passes(self, layers: int, ratio: float) -> float:
        """Return the cost of refitting so many layers, in forward passes of the dense model for one sample.

        A pass that stops at the refitted layer counts as a whole pass. ratio: the pruned model's MACs as a fraction of
        the dense model's.
        """
        return math.ceil(layers / self.layers_at_once) * self.samples * (1 + (self.inputs == "pruned") * ratio)

    def sums_bytes(self, dense: ModelMixin, share: float) -> int:
        """Return the bytes of the sums and of solving the largest system; the model may be on the meta device.

        share: fraction of its inputs that every layer keeps.
        """
        weights = (weight_of(dense.get_submodule(path)) for path in _readers(dense))
        sizes = sorted(sums_bytes(weight, share) for weight in weights)
        return 2 * sum(sizes[-self.layers_at_once :]) + SOLVING * sizes[-1] if sizes else 0


@dataclass(frozen=True)
class LayerFit:
    """Result of refitting one layer: mean squared errors to the dense layer's output on the calibration samples."""

    path: str
    before: float
    after: float
    ridge: float | None  # the chosen ridge; None: the cut weights are kept


@torch.no_grad()
def refit(
    student: ModelMixin,
    pipeline: DiffusionPipeline | ModelMixin,
    data: EncodedData | None,
    config: ClosedFormConfig | None = None,
    seed: int = 0,
    title: str = "refit",
) -> list[LayerFit]:
    """Refit a pruned model in place; return the refitted layers, in the order of the forward pass.

    Args:
        student: pruned model, sliced from the pipeline's denoiser, on its device.
        pipeline: pipeline with the dense denoiser and the scheduler that adds noise. The denoiser is not
            changed. Its dtype may be lower than the student's if `config.precision` names that dtype.
        data: source of the calibration samples; None: Gaussian latents and texts.
        config: settings of the refit; the defaults if None.
        seed: seed of the calibration samples.
        title: title of the progress line.

    Raises:
        UserError: fewer training pairs than samples.

    """
    config, dense, processes = config or ClosedFormConfig(), denoiser_in(pipeline), current()
    fits: list[LayerFit] = []
    layers, share = consumers(student, dense), (processes.index, processes.count)
    packages = [layers[start : start + config.layers_at_once] for start in range(0, len(layers), config.layers_at_once)]
    with evaluation_mode(student), evaluation_mode(dense), Progress(title, len(packages)) as progress:
        for number, package in enumerate(packages, start=1):
            sums = {layer.path: _PairOfSums(student.get_submodule(layer.path)) for layer in package}
            for batch in calibration_batches(pipeline, data, config.samples, config.batch_size, seed, share=share):
                with autocast(config.precision, student.device):
                    seen = _seen(student, dense, package, batch.call, config.inputs)
                weights = sample_weights(config.timestep_weights, pipeline, batch.timesteps)
                numbers = torch.arange(len(batch)) + batch.index * config.batch_size  # on the host
                chooses = numbers % LEFT_OUT == LEFT_OUT - 1
                for path, (inputs, targets) in seen.items():
                    sums[path].add(student.get_submodule(path), inputs, targets, weights, chooses)
            for path, pair in sums.items():
                for part in (pair.fitted, pair.left_out):
                    processes.sum(part.tensors())
                fits.append(_fit(path, student.get_submodule(path), pair, config.ridges))
            progress.update(number)
    return fits


class _PairOfSums:
    """A layer's sums over the samples that it is fitted on, and over the left-out samples that choose the ridge."""

    def __init__(self, layer: nn.Module):
        self.fitted, self.left_out = Sums.of(layer), Sums.of(layer)

    def add(self, layer: nn.Module, inputs: Tensor, targets: Tensor, weights: Tensor, chooses: Tensor) -> None:
        """Add a batch of n samples to the sums; chooses: (n,) bool, true for the samples that choose the ridge."""
        for part, rows in ((self.left_out, chooses), (self.fitted, ~chooses)):
            if bool(rows.any()):
                part.add(layer, inputs[rows], targets[rows], weights[rows])


@dataclass(frozen=True)
class Consumer:
    """A layer whose inputs were cut; kept: (d,) indices of the dense layer's input channels that are left."""

    path: str
    kept: Tensor


def consumers(student: ModelMixin, dense: ModelMixin) -> list[Consumer]:
    """Return the layers whose inputs were cut, in the order of the forward pass."""
    if not (pruning := student.config.get("pruning")):
        return []  # no unit was removed
    space = whole_space(denoiser_of(dense), dense)
    kept = kept_entries(dense, read_pruning(pruning, space))
    columns = {path: kept.get(f"{path}.weight", (None, None))[1] for path in _readers(student)}
    return [Consumer(path, left) for path, left in columns.items() if left is not None]


def most_consumers(dense: ModelMixin) -> int:
    """Return the number of layers that can lose inputs, which is the most that `refit` can refit."""
    return len(_readers(dense))


def _readers(model: ModelMixin) -> list[str]:
    """Return the paths of the layers that read the channels of units, in the order of the forward pass."""
    layers = denoiser_of(model).layers(model)
    paths = (layer.place(axis) for layer in layers for axis in layer.axes if axis.side == "in")
    return list(dict.fromkeys(paths))


def _fit(path: str, layer: nn.Module, pair: _PairOfSums, ridges: Sequence[float]) -> LayerFit:
    """Choose the ridge on the left-out samples, then fit the layer in place on all samples."""
    fitted, left_out = pair.fitted, pair.left_out
    start = packed(layer)
    ridge: float | None = ridges[0]
    if float(left_out.weight):
        best, ridge = left_out.error(start), None
        for tried in ridges:
            error = left_out.error(fitted.solve(start, tried))
            if error < best:
                best, ridge = error, tried
    whole = fitted.plus(left_out)
    before = whole.error(start)
    if ridge is None:
        return LayerFit(path, before, before, None)
    solution = whole.solve(start, ridge)
    unpack(layer, solution)
    return LayerFit(path, before, whole.error(solution), ridge)


def _seen(
    student: nn.Module, dense: nn.Module, package: Sequence[Consumer], call: Call, inputs: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return, for each layer, the inputs that it is fitted on and the dense layer's outputs, for one batch."""
    paths = [layer.path for layer in package]
    seen = layer_values(dense, paths, call)
    if inputs == "pruned":
        student_seen = layer_values(student, paths, call.to(student))
        return {path: (student_seen[path][0], seen[path][1]) for path in paths}
    kept = {layer.path: layer.kept.to(call.device) for layer in package}
    axes = {path: 1 if seen[path][0].ndim == 4 else -1 for path in paths}
    return {path: (seen[path][0].index_select(axes[path], kept[path]), seen[path][1]) for path in paths}
