"""Timestep experts: cut the denoiser less at the timesteps where a cut does more harm.

The sampler's timesteps are divided into bins, and each bin has its own architecture. All architectures are slices of
one set of weights, which is trained under all of them. As in ALTER (arXiv 2505.21817) and MosaicDiff (arXiv
2510.11962), the parts that run depend on the timestep. The choice of the parts differs from both: `obs` or `taylor_sp`
scores the units once, and each bin multiplies the scores by the output change of a cut at its timesteps, relative to
the mean over bins. One threshold over all bins then meets the budget, and determines the cost of each bin. The MACs are
a mean over the timesteps that the sampler visits.
"""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline, ModelMixin
from pydantic import Field
from torch import Tensor

from prunekit.core.registry import process_of
from prunekit.core.space import UnitSpace
from prunekit.core.timesteps import TimestepBins, sampled_timesteps
from prunekit.data.encoded import EncodedData
from prunekit.methods.base import Dataset, Method, ScoreMethod, budget_cost, describe_result
from prunekit.methods.budget import select_mixture
from prunekit.methods.calibration import as_encoded
from prunekit.methods.depth_scores import output_changes
from prunekit.methods.obs import OBS
from prunekit.methods.registry import register
from prunekit.methods.result import PruneResult
from prunekit.methods.settings import PruneSettings
from prunekit.methods.taylor_sp import TaylorSP
from prunekit.methods.workload import Calibration, MethodWork
from prunekit.runtime.errors import UserError
from prunekit.training.trainer import Log

SCORES: dict[str, type[ScoreMethod]] = {"obs": OBS, "taylor_sp": TaylorSP}


class TimestepExpertsSettings(PruneSettings):
    """Settings of timestep experts."""

    bins: int = Field(
        3, gt=1, le=100, description="Number of bins, K, each with the same number of the sampler's timesteps."
    )
    sampling_steps: int = Field(25, gt=1, description="Number of sampler steps over whose timesteps MACs are averaged.")
    scores: Literal["obs", "taylor_sp"] = Field("obs", description="Method that scores units, over all timesteps.")
    score: dict[str, Any] = Field({}, description="Settings of this method.")
    nested: bool = Field(
        True,
        description="Nested masks: a bin multiplies all scores by one factor, so it keeps every unit "
        "that a smaller bin keeps; false: one factor per group of units.",
    )
    samples: int = Field(
        32, gt=0, description="Number of calibration samples per bin, on which groups are removed one by one."
    )


@register("timestep_experts")
class TimestepExperts(Method):
    """One architecture per bin of timesteps on shared weights, each with its own budget (after ALTER, MosaicDiff)."""

    Config = TimestepExpertsSettings
    config: TimestepExpertsSettings
    smoke: ClassVar[Mapping[str, int | None]] = {"bins": 2, "samples": 2}

    @property
    def num_models(self) -> int:
        """The number K of architectures."""
        return self.config.bins

    def fine_tuning(self) -> dict[str, Any]:
        """Return settings by which all bins train one set of weights, each sample through the slice of its bin."""
        return {"shared_backbone": True, "experts_per_step": None}

    def work(self, space: UnitSpace) -> MethodWork:
        """Return the work that scores the units, and the forward passes that measure the bins."""
        scoring, config = self._scoring().work(space), self.config
        passes = len(space.groups) + 1
        words = f"{passes} forward passes"
        measuring = Calibration("bins", config.bins * config.samples, passes, words)
        return MethodWork((*scoring.calibrations, measuring), memory_setting="samples")

    def short_settings(self, devices: int) -> dict[str, Any]:
        """Return settings with one sample per bin, and the short settings of the method that scores units."""
        scoring = self._scoring()
        return {"samples": 1, "score": {**self.config.score, **scoring.short_settings(devices)}}

    @classmethod
    def smoke_settings(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings at the size of a smoke test, also for the method that scores units."""
        small, name = super().smoke_settings(settings), settings.get("scores", "obs")
        given = settings.get("score") or {}
        if name in SCORES and isinstance(given, Mapping):
            small["score"] = SCORES[name].smoke_settings(given)
        return small

    def choose(
        self,
        pipeline: DiffusionPipeline | ModelMixin,
        dataset: Dataset | None,
        directory: Path | None,
        log: Log | None,
    ) -> PruneResult:
        """Score the units, measure the bins, and meet the budget over all bins by one threshold.

        Args:
            pipeline: a pipeline; its scheduler determines the visited timesteps.
            dataset: EncodedData, or CaptionedImages, which are then encoded.
            directory: folder in which the scores are saved; None: they are not saved.
            log: not used.

        Raises:
            UserError: no data or no scheduler; errors of the method that scores units.

        """
        config = self.config
        if dataset is None:
            raise UserError(f"{self.name} needs data: pass EncodedData or CaptionedImages (norm and random need none)")
        scheduler = getattr(pipeline, "scheduler", None)
        if scheduler is None:
            raise UserError(f"{self.name} needs the whole pipeline: its scheduler determines the visited timesteps")
        data, cost = as_encoded(pipeline, dataset), budget_cost(pipeline, config)
        scores = self._scoring().kept_scores(pipeline, data, directory)
        timesteps = sampled_timesteps(scheduler, config.sampling_steps)
        bins = even_bins(timesteps, config.bins)
        counts = torch.bincount(bins.of(timesteps), minlength=len(bins))
        factors = self._factors(pipeline, cost.space, data, bins)
        architectures = select_mixture(scores.values.cpu() * factors, counts, cost, config.budget, config.align)
        info = describe_result(self, architectures, cost)
        shares = counts.double() / counts.sum()
        info.timestep_shares = shares.tolist()
        info.mixture_ratio = float((shares * torch.tensor(info.ratio, dtype=torch.float64)).sum())
        return PruneResult(architectures, info=info, bins=bins)

    def _scoring(self) -> ScoreMethod:
        settings = {name: getattr(self.config, name) for name in PruneSettings.model_fields}
        return SCORES[self.config.scores](**{**settings, **self.config.score})

    def _factors(self, pipeline: Any, space: UnitSpace, data: EncodedData, bins: TimestepBins) -> Tensor:
        """Return the factors of the scores in each bin, (K, D): output changes of the bin over their mean over bins."""
        config, steps = self.config, process_of(pipeline).num_timesteps
        edges = [0.0, *(bound / steps for bound in bins.bounds), 1.0]
        changes = torch.stack(
            [
                output_changes(pipeline, space, space.groups, data, config.samples, config.seed, span=span)
                for span in pairwise(edges)
            ]
        )  # (K, groups)
        mean = changes.mean(0, keepdim=True).clamp_min(torch.finfo(changes.dtype).tiny)
        ratios = changes / mean
        if config.nested:
            ratios = (changes.sum(1) / mean.sum()).unsqueeze(1).expand_as(ratios)
        sizes = torch.tensor([group.size for group in space.groups])
        return ratios.repeat_interleave(sizes, dim=1)


def even_bins(timesteps: Tensor, count: int) -> TimestepBins:
    """Return `count` bins whose numbers of a sampler's distinct timesteps (n,) are equal or differ by one."""
    visited = timesteps.unique()  # ascending
    if len(visited) < count:
        raise UserError(f"bins={count}, but the sampler visits {len(visited)} timesteps: raise sampling_steps")
    parts = visited.tensor_split(count)
    return TimestepBins(tuple(float(part[0]) for part in parts[1:]))
