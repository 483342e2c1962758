"""Depth pruning by ablation: remove the whole layers whose removal alone changes the denoiser's output least.

Each layer is removed alone, and the change of the dense model's output is measured on calibration samples over the
whole schedule, as Amber-Image (arXiv 2602.17047) ranks the blocks of Qwen-Image. A transformer without some of its
blocks keeps the dense model's class, so other tools can load it (see the docs on export).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline, ModelMixin
from pydantic import Field

from prunekit.core.registry import denoiser_in
from prunekit.core.space import UnitSpace
from prunekit.methods.base import Dataset, ScoreMethod, space_of
from prunekit.methods.budget import Scores
from prunekit.methods.calibration import as_encoded
from prunekit.methods.depth_scores import depth_calibrations, output_changes
from prunekit.methods.registry import register
from prunekit.methods.result import PruneResult
from prunekit.methods.settings import PruneSettings
from prunekit.methods.workload import MethodWork
from prunekit.runtime.errors import UserError
from prunekit.training.trainer import Log

FEW_SAMPLES = 4  # calibration samples of a check


class DepthSettings(PruneSettings):
    """Settings of depth pruning."""

    depth: Literal["aptp", "all", "blocks", "none"] = Field("all", description="Which whole layers may be removed.")
    samples: int = Field(16, gt=0, description="Calibration samples on which each removal is measured.")


@register("depth")
class Depth(ScoreMethod):
    """Remove the whole layers whose removal alone changes the output least (as Amber-Image, 2026)."""

    Config = DepthSettings
    config: DepthSettings
    needs_data = False
    smoke: ClassVar[Mapping[str, int | None]] = {"samples": 4}

    def work(self, space: UnitSpace) -> MethodWork:
        """Return the forward passes that measure the layers."""
        return MethodWork(depth_calibrations(space, space.depth_groups, self.config.samples), memory_setting="samples")

    def short_settings(self, devices: int) -> dict[str, Any]:
        """Return settings with few calibration samples, for checks and smoke runs."""
        return {"samples": min(self.config.samples, FEW_SAMPLES)}

    def score(self, pipeline: DiffusionPipeline | ModelMixin, dataset: Dataset | None = None) -> Scores:
        """Return the output change of every whole layer; parts of layers score infinity, so that they stay.

        Args:
            pipeline: a pipeline or its denoiser, with weights, not on the meta device.
            dataset: EncodedData or CaptionedImages; None: random inputs.

        Raises:
            UserError: a denoiser on the meta device, no removable layer, or more `samples` than training pairs.

        """
        model, space, config = denoiser_in(pipeline), space_of(pipeline, self.config), self.config
        if model.device.type == "meta":
            raise UserError("depth measures outputs, and this model is on the meta device; load it with its weights")
        if not space.num_depth:
            raise UserError("depth removes whole layers, and the settings allow none: set prune.depth=all")
        data = None if dataset is None else as_encoded(pipeline, dataset)
        changes = output_changes(pipeline, space, space.depth_groups, data, config.samples, config.seed)
        widths = torch.full((space.num_width,), torch.inf, dtype=torch.float64)
        return Scores(space, torch.cat([widths, changes]), self.score_info())

    def choose(
        self,
        pipeline: DiffusionPipeline | ModelMixin,
        dataset: Dataset | None,
        directory: Path | None,
        log: Log | None,
    ) -> PruneResult:
        """Choose as the base class does; raise UserError if removing whole layers alone cannot meet the budget."""
        result = super().choose(pipeline, dataset, directory, log)
        (architecture,) = result.architectures
        if not bool(architecture.values[: architecture.space.num_width].all()):
            raise UserError(
                f"depth cannot meet budget={self.config.budget:g} by removing whole layers alone; choose a larger "
                "budget, or a method that cuts widths too"
            )
        return result
