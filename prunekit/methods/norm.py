"""Magnitude pruning: remove units with the smallest weights (Li et al., Pruning Filters for Efficient ConvNets, 2017).

The method is one-shot and ranks all units together, as in the Norm rows that APTP compares with. Those rows also cut
channels of the residual stream. Here block outputs keep their shape, as for every method, so this Norm is milder.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline, ModelMixin
from pydantic import Field

from prunekit.core.registry import denoiser_in
from prunekit.core.space import UnitSpace
from prunekit.methods.base import Dataset, ScoreMethod, space_of
from prunekit.methods.budget import Scores
from prunekit.methods.calibration import as_encoded
from prunekit.methods.depth_scores import depth_calibrations, joint_scores, output_changes, ranks
from prunekit.methods.registry import register
from prunekit.methods.settings import PruneSettings
from prunekit.methods.unit_weights import sum_per_unit
from prunekit.methods.workload import MethodWork
from prunekit.runtime.errors import UserError

SAMPLES = 16  # default number of calibration samples
FEW_SAMPLES = 4  # calibration samples of a check


class NormSettings(PruneSettings):
    """Settings of Norm."""

    order: Literal[1, 2] = Field(2, description="Power of the summed weights: 1 (L1) or 2 (L2).")
    scope: Literal["global", "layer"] = Field(
        "global", description="Ranking. global: all units together; layer: remove the same fraction of every layer."
    )
    samples: int | None = Field(
        None,
        gt=0,
        description=f"Number of calibration samples for depth units; unset: {SAMPLES}, or all samples if "
        "there are fewer.",
    )


@register("norm")
class Norm(ScoreMethod):
    """Remove the units whose weights are smallest, with or without data (Li et al., 2017)."""

    Config = NormSettings
    config: NormSettings
    needs_data = False
    smoke: ClassVar[Mapping[str, int | None]] = {"samples": 4}

    def work(self, space: UnitSpace) -> MethodWork:
        """Return the forward passes that score the depth units, and with scope "global" the width groups too."""
        groups = space.groups if self.config.scope == "global" else space.depth_groups
        return MethodWork(depth_calibrations(space, groups, self.config.samples or SAMPLES), memory_setting="samples")

    def short_settings(self, devices: int) -> dict[str, Any]:
        """Return settings with few calibration samples, for checks and smoke runs."""
        return {"samples": min(self.config.samples or FEW_SAMPLES, FEW_SAMPLES)}

    @torch.no_grad()
    def score(self, pipeline: DiffusionPipeline | ModelMixin, dataset: Dataset | None = None) -> Scores:
        """Return the relative magnitude of every width unit and the measured output change of every depth unit.

        A width unit scores the sum of |w|^order over the weights it owns, relative to the mean of its group. This
        equals torch-pruning's MagnitudeImportance(p=order), and makes layers of different size and scale comparable. A
        depth unit scores how much its removal changes the UNet's output. All width scores are multiplied by one factor,
        so that both kinds rank together (see `depth_scores`); without depth units they are not changed.

        Scope "layer" replaces the scores by ranks within their group, so that a budget removes the same fraction of
        each group; depth units rank among all depth units.

        Args:
            pipeline: a pipeline or its UNet, with weights, not on the meta device.
            dataset: EncodedData or CaptionedImages for the measurement of depth units; None: random inputs.

        Raises:
            ValueError: a UNet on the meta device, units that the settings name and the UNet lacks, or more `samples`
                than training pairs.

        """
        model, space, config = denoiser_in(pipeline), space_of(pipeline, self.config), self.config
        if model.device.type == "meta":
            raise UserError("Norm needs weights, and this UNet is on the meta device; load its weights")
        widths = torch.empty(space.num_width, dtype=torch.float64)
        for group in space.width_groups:
            norms = sum_per_unit(model, group, lambda weight: weight.double().abs() ** config.order)
            widths[space.slice(group)] = norms / norms.mean().clamp_min(torch.finfo(torch.float64).tiny)
        data = None if dataset is None or not space.num_depth else as_encoded(pipeline, dataset)
        available = SAMPLES if data is None else max(1, len(data.training_pairs()))
        samples = config.samples or min(SAMPLES, available)
        if config.scope == "global":
            values = joint_scores(widths, pipeline, space, data, samples, config.seed)
        else:
            depths = output_changes(pipeline, space, space.depth_groups, data, samples, config.seed)
            values = ranks(torch.cat([widths, depths]), space)
        return Scores(space, values, self.score_info())
