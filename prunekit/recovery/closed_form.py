"""Recovery without back-propagation: layers that consume cut channels are refitted to what the dense model's give.

Layer by layer, in the order of the forward pass, a weight and bias are fitted by ridge regression, so that on
calibration samples the layer gives what the dense model's layer gives, on the inputs that the pruned model now provides
(as OBS-Diff, arXiv 2510.06751, after OBC, arXiv 2208.11580; here the ridge pulls to the weights that the cut left).
Only forward passes run. In memory are the dense model, the pruned one, and one layer's sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, ModelMixin
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from prunekit.core.call import Call, predict
from prunekit.core.discovery import whole_space
from prunekit.core.registry import denoiser_in, denoiser_of, process_of
from prunekit.core.slicing import read_pruning
from prunekit.data.encoded import EncodedData
from prunekit.methods.calibration import calibration_batches, evaluation_mode
from prunekit.recovery.backbone import kept_entries
from prunekit.recovery.least_squares import Sums, packed, unpack
from prunekit.runtime.precision import Precision, autocast
from prunekit.runtime.processes import current
from prunekit.runtime.progress import Progress

LEFT_OUT = 4  # one batch of so many chooses the ridge


class ClosedFormConfig(BaseModel):
    """How layers are refitted."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    samples: int = Field(512, gt=1, description="calibration samples: captioned pictures, each at one timestep")
    batch_size: int = Field(32, gt=0, description="samples of one forward pass")
    ridges: list[float] = Field(
        [1e-4, 1e-3, 1e-2, 1e-1, 1.0],
        min_length=1,
        description="ridges that are tried, in units of the mean square of a layer's inputs; the best on a quarter of "
        "the samples is taken, or none where no fit is better than the cut weights",
    )
    inputs: Literal["pruned", "dense"] = Field(
        "pruned",
        description="what a layer is fitted on: what the pruned model gives it now, or what the dense one does",
    )
    timestep_weights: Literal["uniform", "noise"] = Field(
        "uniform", description="weight of a sample: uniform, or its share of noise, 1 - alpha_bar of its timestep"
    )
    precision: Precision = Field(
        "float32", description="autocast of the forward passes; sums and solutions are float64"
    )


@dataclass(frozen=True)
class LayerFit:
    """What the fit did to one layer: mean squared errors to the dense layer's output, on the calibration samples."""

    path: str
    before: float
    after: float
    ridge: float | None  # None: the cut weights stay


class _Reached(Exception):  # noqa: N818 - ends a forward pass at the layer that is looked at
    pass


@torch.no_grad()
def refit(
    student: ModelMixin,
    pipeline: DiffusionPipeline | ModelMixin,
    data: EncodedData | None,
    config: ClosedFormConfig | None = None,
    seed: int = 0,
    title: str = "refit",
) -> list[LayerFit]:
    """Refit a pruned model in place; return what was done, in the order of the forward pass.

    Args:
        student: sliced from the pipeline's denoiser, on its device.
        pipeline: whose denoiser is the dense model, which stays as it is, and whose scheduler noises.
        data: the calibration samples' source; None: Gaussian latents and texts.
        config: how; the defaults without it.
        seed: of the calibration samples.
        title: of the progress line.

    Raises:
        UserError: fewer training pairs than samples.

    """
    config, dense, processes = config or ClosedFormConfig(), denoiser_in(pipeline), current()
    fits: list[LayerFit] = []
    layers = consumers(student, dense)
    with evaluation_mode(student), evaluation_mode(dense), Progress(title, len(layers)) as progress:
        for number, consumer in enumerate(layers, start=1):
            layer = student.get_submodule(consumer.path)
            fitted, left_out = (Sums.of(layer) for _ in range(2))
            share = (processes.index, processes.count)
            for batch in calibration_batches(pipeline, data, config.samples, config.batch_size, seed, share=share):
                with autocast(config.precision, student.device):
                    inputs, targets = _seen(student, dense, consumer, batch.call, config.inputs)
                weights = _weights(config, pipeline, batch.timesteps)
                sums = left_out if batch.index % LEFT_OUT == LEFT_OUT - 1 else fitted
                sums.add(layer, inputs, targets, weights)
            for sums in (fitted, left_out):
                processes.sum(sums.tensors())
            fits.append(_fit(consumer.path, layer, fitted, left_out, config.ridges))
            progress.update(number)
    return fits


@dataclass(frozen=True)
class Consumer:
    """A layer whose inputs were cut, and which of the dense layer's input channels are left, (d,)."""

    path: str
    kept: Tensor


def consumers(student: ModelMixin, dense: ModelMixin) -> list[Consumer]:
    """Return the layers whose inputs were cut, in the order of the forward pass."""
    if not (pruning := student.config.get("pruning")):
        return []  # it keeps everything
    space = whole_space(denoiser_of(dense), dense)
    kept = kept_entries(dense, read_pruning(pruning, space))
    layers: dict[str, Consumer] = {}
    for layer in denoiser_of(student).layers(student):
        for axis in layer.axes:
            path = f"{layer.path}.{axis.layer}"
            columns = kept.get(f"{path}.weight", (None, None))[1]
            if axis.side == "in" and columns is not None:
                layers.setdefault(path, Consumer(path, columns))
    return list(layers.values())


def _fit(path: str, layer: nn.Module, fitted: Sums, left_out: Sums, ridges: Sequence[float]) -> LayerFit:
    """Choose the ridge on what is left out of the fit, then fit on all samples."""
    start = packed(layer)
    best, ridge = left_out.error(start), None
    for tried in ridges if float(left_out.weight) else ridges[:1]:
        error = left_out.error(fitted.solve(start, tried)) if float(left_out.weight) else -1.0
        if error < best:
            best, ridge = error, tried
    parts = (a + b for a, b in zip(fitted.tensors(), left_out.tensors(), strict=True))
    whole = Sums(*parts, has_bias=fitted.has_bias)
    before = whole.error(start)
    if ridge is None:
        return LayerFit(path, before, before, None)
    solution = whole.solve(start, ridge)
    unpack(layer, solution)
    return LayerFit(path, before, whole.error(solution), ridge)


def _weights(config: ClosedFormConfig, pipeline: Any, timesteps: Tensor) -> Tensor:
    """Return the weight of each sample, (n,)."""
    ones = torch.ones(len(timesteps), 1, 1, 1, device=timesteps.device)
    if config.timestep_weights == "uniform":
        return ones.flatten()
    return process_of(pipeline).noised(torch.zeros_like(ones), ones, timesteps).square().flatten()  # 1 - alpha_bar


def _seen(student: nn.Module, dense: nn.Module, consumer: Consumer, call: Call, inputs: str) -> tuple[Tensor, Tensor]:
    """Return the inputs that a layer is fitted on, and what the dense one gives, for a batch."""
    dense_inputs, targets = _io(dense, consumer.path, call)
    if inputs == "pruned":
        return _io(student, consumer.path, call)[0], targets
    axis = 1 if dense_inputs.ndim == 4 else -1
    return dense_inputs.index_select(axis, consumer.kept.to(dense_inputs.device)), targets


def _io(model: nn.Module, path: str, call: Call) -> tuple[Tensor, Tensor]:
    """Run a model up to a layer; return the layer's input and output."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        seen.extend((arguments[0], output))
        raise _Reached

    handle = model.get_submodule(path).register_forward_hook(hook)
    try:
        with suppress(_Reached):
            predict(model, call)
    finally:
        handle.remove()
    return seen[0], seen[1]
