"""Taylor-SP: remove the units whose removal changes the loss least, to first order, at the timesteps that matter.

Diff-Pruning (Fang, Ma, Wang: Structural Pruning for Diffusion Models, NeurIPS 2023). With the training loss L_t at
timestep t, the score of a weight w is |w · Σ_t ∂L_t/∂w|, where t ascends from 0 until L_t / L_max falls below a
threshold, 0.05 in the paper. The noisiest timesteps are left out: the loss of a noise prediction and its gradient are
small there, and only make the sum noisier. As in the published implementation, the gradients are summed over timesteps
before the magnitude is taken, and L_max is the largest loss so far. The timestep at which the sum stops is left out, as
in the paper's formula. Of the published scripts, ddpm_exp/prune.py leaves it out too, and ddpm_prune.py includes it.

Units are ranked globally (`budget`), while Diff-Pruning removes the same fraction of every layer. How APTP's SP row was
pruned is not known: its script loads a model that is already pruned.

L_t is the model's own loss. For a noise prediction it falls with t by orders of magnitude. For a v-prediction it does
not: at high t the velocity is nearly minus the clean latents, which no model can tell from noise, so L_t stays near
their variance. The criterion then sums all timesteps. The losses and the timesteps that were used are in the scores'
`info`.

The paper prunes widths only; whole layers are scored by `depth_scores`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline, ModelMixin
from pydantic import Field
from torch import Tensor, nn

from prunekit.core.call import predict
from prunekit.core.family import NoiseProcess
from prunekit.core.registry import denoiser_in, process_of
from prunekit.core.space import UnitSpace
from prunekit.data.encoded import EncodedData
from prunekit.methods.base import Dataset, ScoreMethod, space_of
from prunekit.methods.budget import Scores
from prunekit.methods.calibration import (
    CalibrationBatch,
    as_encoded,
    calibration_batches,
    evaluation_mode,
)
from prunekit.methods.depth_scores import depth_calibrations, joint_scores
from prunekit.methods.registry import register
from prunekit.methods.settings import PruneSettings
from prunekit.methods.unit_weights import owned_weights, sum_per_unit
from prunekit.methods.workload import Calibration, MethodWork
from prunekit.runtime.errors import UserError
from prunekit.runtime.precision import UNSCALED_AUTO, UnscaledPrecision, autocast, resolve_precision
from prunekit.runtime.processes import current
from prunekit.runtime.progress import Progress
from prunekit.training.diffusion import attention_kernel, per_sample_mse

Gradients = dict[nn.Parameter, Tensor]  # of a weight's shape, float32


class TaylorSPSettings(PruneSettings):
    """Settings of Taylor-SP."""

    samples: int = Field(128, gt=0, description="Number of calibration samples, the same at every timestep.")
    batch_size: int = Field(8, gt=0, description="Samples per forward and backward pass.")
    num_timesteps: int = Field(50, gt=0, description="Number of timesteps, evenly spaced over the schedule from 0.")
    threshold: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="The sum over timesteps ends when the loss falls below this fraction of its maximum so far.",
    )
    aggregation: Literal["sum_abs", "abs_sum"] = Field(
        "sum_abs",
        description="Sum over a unit's weights. sum_abs: sum of |w·g| (Diff-Pruning); abs_sum: |sum of "
        "w·g| per channel of each layer, then the sum of these (torch-pruning's "
        "multivariable=True).",
    )
    precision: UnscaledPrecision = Field("auto", description=f"Autocast dtype of forward passes. {UNSCALED_AUTO}")


@register("taylor_sp")
class TaylorSP(ScoreMethod):
    """Remove the units whose loss changes least to first order, over timesteps (Diff-Pruning, NeurIPS 2023)."""

    Config = TaylorSPSettings
    config: TaylorSPSettings
    smoke: ClassVar[Mapping[str, int | None]] = {"samples": 4, "batch_size": 4, "num_timesteps": 2}

    def work(self, space: UnitSpace) -> MethodWork:
        """Return the gradients at all timesteps (the sum may end earlier), and the passes that score depth units."""
        samples, timesteps = self.config.samples, self.config.num_timesteps
        calibration = Calibration(
            "calibration",
            samples,
            forward_passes=3 * timesteps,
            passes=f"at most {timesteps} timesteps x (forward, backward)",
            training_batch=self.config.batch_size,
        )
        depths = depth_calibrations(space, space.groups, samples)
        return MethodWork((calibration, *depths), memory_setting="batch_size")

    def short_settings(self, devices: int) -> dict[str, Any]:
        """Return settings with one batch at one timestep."""
        return {"samples": min(self.config.samples, self.config.batch_size), "num_timesteps": 1}

    def score(self, pipeline: DiffusionPipeline | ModelMixin, dataset: Dataset | None = None) -> Scores:
        """Return the first-order change of the loss for every width unit; measured output change for depth units.

        Without depth units a score is in units of the loss, summed over the timesteps used; with them, in units of
        output change (`depth_scores`). `info` has `timesteps`, the summed timesteps, and `losses`, L_t by timestep,
        including the timestep at which the sum ended. The UNet is not changed.

        Args:
            pipeline: a pipeline with UNet and scheduler.
            dataset: EncodedData, or CaptionedImages, which are then encoded; training pairs are drawn from it.

        Raises:
            ValueError: no data, or fewer training pairs than samples; no scheduler; a loss or gradient that is not
                finite; scores that are all zero.

        """
        config, model, space = self.config, denoiser_in(pipeline), space_of(pipeline, self.config)
        if dataset is None:
            raise UserError("taylor_sp needs data: pass EncodedData or CaptionedImages (norm and random need none)")
        if getattr(pipeline, "scheduler", None) is None:
            raise UserError("taylor_sp needs the whole pipeline: its scheduler determines the loss")
        data = as_encoded(pipeline, dataset)
        gradients, losses, used = self._gradients(pipeline, space, data)
        with torch.no_grad():
            widths = width_scores(model, space, gradients, config.aggregation)
        _check(widths, used)
        values = joint_scores(widths, pipeline, space, data, config.samples, config.seed)
        return Scores(space, values, {**self.score_info(), "timesteps": used, "losses": losses})

    def _gradients(
        self, pipeline: DiffusionPipeline, space: UnitSpace, data: EncodedData
    ) -> tuple[Gradients, dict[str, float], list[int]]:
        """Return the gradients of Σ_t L_t over all processes' samples, L_t by timestep, and the summed timesteps."""
        config, model, process = self.config, denoiser_in(pipeline), process_of(pipeline)
        processes = current()
        share = (processes.index, processes.count)
        weights = [owned.weight for group in space.width_groups for owned in owned_weights(model, group)]
        total = {weight: torch.zeros_like(weight, dtype=torch.float32) for weight in weights}
        losses: dict[str, float] = {}
        used: list[int] = []
        timesteps = spaced_timesteps(process.num_timesteps, config.num_timesteps) if weights else []
        bar = Progress(f"{self.name} calibration", len(timesteps), enabled=processes.is_main)
        with evaluation_mode(model), gradients_only_of(model, weights), bar as progress:
            for timestep in timesteps:
                batches = calibration_batches(
                    pipeline, data, config.samples, config.batch_size, config.seed, timestep=timestep, share=share
                )
                loss, step = self._step(model, process, batches, weights)
                processes.sum([loss])
                if not loss.isfinite():
                    raise UserError(f"the loss at timestep {timestep} is not finite; use precision=float32")
                losses[str(timestep)] = loss.item()
                if loss.item() < config.threshold * max(losses.values()):
                    break
                used.append(timestep)
                for weight, gradient in step.items():
                    total[weight] += gradient
                progress.update(len(used), loss.item())
        processes.sum(list(total.values()))
        return total, losses, used

    def _step(
        self,
        model: ModelMixin,
        process: NoiseProcess,
        batches: Iterator[CalibrationBatch],
        weights: list[nn.Parameter],
    ) -> tuple[Tensor, Gradients]:
        """Return the contribution of these batches to L_t and to its gradients."""
        total, step = torch.zeros((), dtype=torch.float64), Gradients()
        for batch in batches:
            with (
                attention_kernel(model, batch.latents),
                autocast(resolve_precision(self.config.precision, model.device, scaled=False), model.device),
            ):
                prediction = predict(model, batch.call)
            goal = process.target(batch.latents, batch.noise, batch.timesteps)
            loss = per_sample_mse(prediction, goal).sum() / self.config.samples
            gradients = torch.autograd.grad(loss, weights, materialize_grads=True)  # zeros for unused weights
            for weight, gradient in zip(weights, gradients, strict=True):
                step[weight] = step[weight] + gradient if weight in step else gradient.float()
            total += loss.item()
        return total, step


def width_scores(
    model: ModelMixin, space: UnitSpace, gradients: Gradients, aggregation: Literal["sum_abs", "abs_sum"]
) -> Tensor:
    """Return Taylor scores of the width units, (num_width,) float64, from the gradients of their weights.

    sum_abs: Σ |w·g| over the weights that a unit owns. abs_sum: |Σ w·g| over each channel's row or column of each
    layer, summed over the unit's channels. These equal torch-pruning's GroupTaylorImportance with multivariable False
    and True.
    """
    widths = torch.zeros(space.num_width, dtype=torch.float64)
    for group in space.width_groups:
        if aggregation == "sum_abs":
            scores = sum_per_unit(model, group, lambda weight: (weight.double() * gradients[weight].double()).abs())
        else:
            scores = sum_per_unit(model, group, lambda weight: weight.double() * gradients[weight].double(), torch.abs)
        widths[space.slice(group)] = scores
    return widths


def spaced_timesteps(num_train_timesteps: int, count: int) -> list[int]:
    """Return `count` timesteps, evenly spaced from 0, ascending; all timesteps if there are fewer."""
    count = min(count, num_train_timesteps)
    return [i * num_train_timesteps // count for i in range(count)]


@contextmanager
def gradients_only_of(model: ModelMixin, weights: list[nn.Parameter]) -> Iterator[None]:
    """Let only `weights` require gradients inside the context; on exit restore every flag."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _check(widths: Tensor, used: list[int]) -> None:
    if not widths.isfinite().all():
        raise UserError("Taylor scores are not finite: the gradients overflow; use precision=float32")
    if len(widths) and not widths.any():
        raise UserError(
            f"all Taylor scores are zero at the timesteps {used}: the loss does not depend on any prunable "
            "weight, for example because the UNet's output layer or its weights are zero; load a trained UNet"
        )
