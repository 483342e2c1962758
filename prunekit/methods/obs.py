"""OBS: remove the units whose removal the other weights of the layers that read them compensate best.

Optimal Brain Surgeon for groups of columns, after OBC (Frantar, Alistarh, arXiv 2208.11580) and OBS-Diff (arXiv
2510.06751). A layer has inputs x and weights W, and H = Σ x xᵀ over calibration samples. Removing the columns g, and
changing all other columns so that the layer's outputs change least, costs tr(W_g ([H⁻¹]_gg)⁻¹ W_gᵀ) / 2. Units are
removed one by one, the cheapest first, and each removal updates W and H⁻¹. So the score of a unit is the cost of its
removal after the removal of the units before it. Heads and groups of channels are treated alike. The cost of a head
that two streams share is the sum of the costs in both layers.

The method only chooses units. The change of the weights is the ridge regression of `recovery.closed_form` on the inputs
of the dense model: for the damped H both minimize tr((W - W') H (W - W')ᵀ) over weights W' without the columns.
Closed-form recovery then fits the weights, by default on the inputs that the pruned model provides.

Differences from OBS-Diff: every layer's inputs are those of the dense model, while the paper prunes four packages of
blocks one after another. For heads of two streams costs are added, while the paper fuses two rankings. The last block
is pruned too. A budget in MACs is met over all layers together, while the paper removes the same fraction of every
layer, which is `scope: layer` here.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline, ModelMixin
from pydantic import Field, model_validator
from torch import Tensor

from prunekit.core.axes import weight_of
from prunekit.core.discovery import width_layers
from prunekit.core.registry import denoiser_in
from prunekit.core.space import UnitGroup, UnitSpace
from prunekit.data.encoded import EncodedData
from prunekit.methods.base import Dataset, ScoreMethod, space_of
from prunekit.methods.budget import Scores
from prunekit.methods.calibration import (
    TIMESTEP_WEIGHTS,
    TimestepWeights,
    as_encoded,
    calibration_batches,
    evaluation_mode,
    layer_values,
    sample_weights,
)
from prunekit.methods.depth_scores import depth_calibrations, joint_scores, output_changes, ranks
from prunekit.methods.least_squares import Sums, packed, sums_bytes
from prunekit.methods.registry import register
from prunekit.methods.settings import PruneSettings
from prunekit.methods.workload import Calibration, MethodWork
from prunekit.runtime.errors import UserError
from prunekit.runtime.precision import UNSCALED_AUTO, UnscaledPrecision, autocast, resolve_precision
from prunekit.runtime.processes import current
from prunekit.runtime.progress import Progress

INVERTED = 2  # copies of a layer's sums while its units are ranked: the sums, and their inverse
PAPER = {"samples": 100, "batch_size": 4, "timestep_weights": "logarithmic", "damping": 0.01, "scope": "layer"}


class OBSSettings(PruneSettings):
    """Settings of OBS."""

    preset: Literal["default", "paper"] = Field(
        "default", description="paper: OBS-Diff's value for every setting below that is not given; unset: the defaults."
    )
    samples: int = Field(
        256, gt=0, description="Number of calibration samples: captioned pictures, each at one timestep."
    )
    batch_size: int = Field(32, gt=0, description="Samples per forward pass.")
    timestep_weights: TimestepWeights = Field("uniform", description=TIMESTEP_WEIGHTS)
    damping: float = Field(
        0.01, gt=0, description="Value added to the diagonal of H, in units of the mean of the diagonal."
    )
    scope: Literal["global", "layer"] = Field(
        "global", description="Ranking. global: all units together; layer: remove the same fraction of every layer."
    )
    layers_at_once: int = Field(
        16,
        gt=0,
        description="Number of layers whose H is summed in one pass over the samples; fewer layers need less memory.",
    )
    precision: UnscaledPrecision = Field("auto", description=f"Autocast dtype of forward passes. {UNSCALED_AUTO}")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, settings: Any) -> Any:
        if isinstance(settings, Mapping) and settings.get("preset") == "paper":
            return {**PAPER, **settings}
        return settings


@register("obs")
class OBS(ScoreMethod):
    """Remove the units whose loss the other weights compensate best: Optimal Brain Surgeon (OBS-Diff, 2025)."""

    Config = OBSSettings
    config: OBSSettings
    smoke: ClassVar[Mapping[str, int | None]] = {"samples": 4, "batch_size": 4}

    def work(self, space: UnitSpace) -> MethodWork:
        """Return the forward passes that sum every layer's inputs, and those that measure whole groups."""
        config = self.config
        passes = -(-len(space.width_groups) // config.layers_at_once)
        words = f"{passes} forward passes, for {config.layers_at_once} layers each"
        summing = Calibration("calibration", config.samples, passes, words, forward_batch=config.batch_size)
        measured = depth_calibrations(space, self._measured(space), config.samples)
        return MethodWork((summing, *measured), memory_setting="layers_at_once")

    def calibration_bytes(self, model: ModelMixin) -> int:
        """Return the peak bytes of the sums and inverses of the layers that are calibrated at the same time."""
        sizes = sorted(
            sum(sums_bytes(weight_of(layer.module(model, axis))) for axis in layer.axes if axis.side == "in")
            for layer in width_layers(model).values()
        )
        return INVERTED * sum(sizes[-self.config.layers_at_once :])

    def short_settings(self, devices: int) -> dict[str, Any]:
        """Return settings with one batch of calibration samples."""
        return {"samples": min(self.config.samples, self.config.batch_size)}

    def score(self, pipeline: DiffusionPipeline | ModelMixin, dataset: Dataset | None = None) -> Scores:
        """Return the removal cost of each unit, where the units of a group are removed one by one, the cheapest first.

        A width unit scores the layer's squared error as a share of its squared outputs; a depth unit scores how much
        its removal changes the denoiser's output, and the widths are multiplied by one factor so that both rank
        together (see `depth_scores`). Scope "layer" replaces the scores by ranks.

        Args:
            pipeline: a pipeline or its denoiser, with weights.
            dataset: EncodedData, or CaptionedImages, which are then encoded; training pairs are drawn from it.

        Raises:
            UserError: no data, or fewer training pairs than samples; a model on the meta device; inputs that are not
                finite.

        """
        config, model, space = self.config, denoiser_in(pipeline), space_of(pipeline, self.config)
        if dataset is None:
            raise UserError("obs needs data: pass EncodedData or CaptionedImages (norm and random need none)")
        if model.device.type == "meta":
            raise UserError("obs needs weights, and this UNet is on the meta device; load its weights")
        data, groups = as_encoded(pipeline, dataset), space.width_groups
        widths = torch.zeros(space.num_width, dtype=torch.float64)
        with Progress(f"{self.name} calibration", len(groups), enabled=current().is_main) as progress:
            for start in range(0, len(groups), config.layers_at_once):
                package = groups[start : start + config.layers_at_once]
                for group, readers in self._readers(pipeline, package, data).items():
                    widths[space.slice(group)] = removal_costs(readers, group.size)
                progress.update(start + len(package))
        if not widths.isfinite().all():
            raise UserError("the inputs of a layer are not finite on the calibration samples; use precision=float32")
        if config.scope == "global":
            values = joint_scores(widths, pipeline, space, data, config.samples, config.seed)
        else:
            depths = output_changes(pipeline, space, space.depth_groups, data, config.samples, config.seed)
            values = ranks(torch.cat([widths, depths]), space)
        return Scores(space, values, self.score_info())

    def _measured(self, space: UnitSpace) -> Sequence[UnitGroup]:
        return space.groups if self.config.scope == "global" else space.depth_groups

    @torch.no_grad()
    def _readers(
        self, pipeline: DiffusionPipeline | ModelMixin, groups: Sequence[UnitGroup], data: EncodedData
    ) -> dict[UnitGroup, list["Reader"]]:
        """Return, for each group, the layers that read its channels, with the sums of their inputs over all samples."""
        config, model, processes = self.config, denoiser_in(pipeline), current()
        layers = width_layers(model)
        axes = {group: [axis for axis in layers[group.name].axes if axis.side == "in"] for group in groups}
        paths = {group: [f"{layers[group.name].path}.{axis.layer}" for axis in axes[group]] for group in groups}
        sums = {path: Sums.of(model.get_submodule(path)) for read in paths.values() for path in read}
        share = (processes.index, processes.count)
        precision = resolve_precision(config.precision, model.device, scaled=False)
        batches = calibration_batches(pipeline, data, config.samples, config.batch_size, config.seed, share=share)
        with evaluation_mode(model):
            for batch in batches:
                weights = sample_weights(config.timestep_weights, pipeline, batch.timesteps)
                with autocast(precision, model.device):
                    values = layer_values(model, list(sums), batch.call)
                for path, (inputs, outputs) in values.items():
                    sums[path].add(model.get_submodule(path), inputs, outputs, weights)
        readers: dict[UnitGroup, list[Reader]] = {}
        for group in groups:
            for path in paths[group]:
                processes.sum(sums[path].tensors())
            readers[group] = [
                Reader.of(model, path, [axis.channels([unit], group) for unit in range(group.size)], sums[path], config)
                for path, axis in zip(paths[group], axes[group], strict=True)
            ]
        return readers


class Reader:
    """A layer from which the columns of units are removed, while the other columns change to compensate.

    weight: W (d + 1, o), the bias last. inverse: inverse of the damped H, (d + 1, d + 1); for a layer without bias the
    last row and column are zero. columns: (units, m), the columns of each unit. energy: Σ w·|y|²; costs of removals are
    fractions of it.
    """

    def __init__(self, weight: Tensor, inverse: Tensor, columns: Tensor, energy: float):
        self.weight, self.inverse, self.columns, self.energy = weight, inverse, columns, energy

    @classmethod
    def of(cls, model: ModelMixin, path: str, channels: list[list[int]], sums: Sums, config: OBSSettings) -> "Reader":
        """Return the reader of a layer; channels: the channels of each unit along the weight's input axis."""
        layer = model.get_submodule(path)
        weight = packed(layer)
        inputs = layer.weight.shape[1]  # per kernel position
        kernel = (len(weight) - 1) // inputs
        columns = torch.tensor([[k * inputs + c for k in range(kernel) for c in unit] for unit in channels])
        inverse = torch.zeros_like(sums.gram)
        size = len(inverse) if sums.has_bias else len(inverse) - 1
        gram = sums.gram[:size, :size].clone()
        diagonal = gram.diagonal()[: len(weight) - 1]  # the constant of the bias is not damped
        diagonal += config.damping * diagonal.mean().clamp(min=1e-12)
        inverse[:size, :size] = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        return cls(weight, inverse, columns.to(weight.device), float(sums.square) or 1.0)

    def costs(self, units: Sequence[int]) -> Tensor:
        """Return the removal cost tr(W_g ([H⁻¹]_gg)⁻¹ W_gᵀ) / 2 of each unit, (n,), as a fraction of the energy."""
        columns = self.columns[list(units)]  # (n, m)
        blocks, weight = self.inverse[columns[:, :, None], columns[:, None, :]], self.weight[columns]
        return (weight * torch.linalg.solve(blocks, weight)).sum((1, 2)) / 2 / self.energy

    def remove(self, unit: int) -> None:
        """Remove the columns of a unit, and change all other columns to compensate."""
        columns = self.columns[unit]
        left = torch.linalg.solve(self.inverse[columns][:, columns], self.inverse[columns]).T  # (d + 1, m)
        self.weight = self.weight - left @ self.weight[columns]
        self.inverse = self.inverse - left @ self.inverse[columns]
        self.weight[columns] = 0.0
        self.inverse[columns] = 0.0
        self.inverse[:, columns] = 0.0


def removal_costs(readers: Sequence[Reader], units: int) -> Tensor:
    """Return the removal cost of each unit of a group, (units,) float64, removing the cheapest unit first each time.

    A cost below that of an earlier removal is raised to it, so that scores never decrease in the order of removal.
    """
    scores, left, most = torch.zeros(units, dtype=torch.float64), list(range(units)), 0.0
    while left:
        costs = torch.stack([reader.costs(left).cpu() for reader in readers]).sum(0)
        cheapest = int(costs.argmin())
        most = max(most, float(costs[cheapest]))
        unit = left.pop(cheapest)
        scores[unit] = most
        if left:
            for reader in readers:
                reader.remove(unit)
    return scores
