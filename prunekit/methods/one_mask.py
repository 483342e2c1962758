"""One mask: all experts have one architecture and differ in a few weights, by prompt, by timestep, or by both.

Experts with different masks must divide the training steps, or compete for the weights that they share. One common
architecture avoids both. So another method chooses one architecture, and the experts differ in the changes of its
weights that `fine_tune.deltas` trains. Prompts are clustered by spherical k-means on their embeddings. Timesteps are
divided into bins with equal numbers of the sampler's steps. The method is our own; `recovery.deltas` names the sources
of its parts.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline, ModelMixin
from pydantic import Field
from torch import nn

from prunekit.core.space import UnitSpace
from prunekit.core.timesteps import sampled_timesteps
from prunekit.data.encoded import EncodedData
from prunekit.methods import registry
from prunekit.methods.base import Dataset, Method, budget_cost, describe_result
from prunekit.methods.calibration import as_encoded
from prunekit.methods.registry import register
from prunekit.methods.result import PruneResult
from prunekit.methods.router import Router, clustered_pairs, spherical_kmeans
from prunekit.methods.settings import PruneSettings
from prunekit.methods.timestep_experts import even_bins
from prunekit.methods.workload import MethodWork
from prunekit.runtime.errors import UserError
from prunekit.training.memory import capped
from prunekit.training.trainer import Log


class OneMaskSettings(PruneSettings):
    """Settings of one mask."""

    experts: int = Field(1, gt=0, description="Number of groups of prompts, N.")
    bins: int = Field(
        3, gt=0, le=100, description="Number of bins, K, each with the same number of the sampler's timesteps."
    )
    sampling_steps: int = Field(25, gt=1, description="Number of sampler steps whose timesteps are divided into bins.")
    choice: Literal["norm", "obs", "random", "taylor_sp", "uniarch"] = Field(
        "taylor_sp", description="Method that chooses the architecture."
    )
    choice_settings: dict[str, Any] = Field({}, description="Settings of this method.")


@register("one_mask")
class OneMask(Method):
    """One architecture for all prompts and timesteps; experts change a few of its weights (see fine_tune.deltas)."""

    Config = OneMaskSettings
    config: OneMaskSettings
    smoke: ClassVar[Mapping[str, int | None]] = {"bins": 2}

    @property
    def num_models(self) -> int:
        """Return the number of Architectures: N groups of prompts times K bins."""
        return self.config.experts * self.config.bins

    def fine_tuning(self) -> dict[str, Any]:
        """Return settings by which all experts share one set of weights, with changes per expert."""
        return {"shared_backbone": True, "experts_per_step": None} if self.num_models > 1 else {}

    def work(self, space: UnitSpace) -> MethodWork:
        """Return the work of the method that chooses the architecture."""
        work = self._choice().work(space)
        return replace(work, memory_setting="choice_settings" if work.memory_setting else None)

    def short_settings(self, devices: int) -> dict[str, Any]:
        """Return settings that shorten the method that chooses the architecture."""
        return {"choice_settings": {**self.config.choice_settings, **self._choice().short_settings(devices)}}

    @classmethod
    def smoke_settings(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings at the size of a smoke test, also for the method that chooses the architecture."""
        small, name = capped(super().smoke_settings(settings), {"experts": 2}), settings.get("choice", "taylor_sp")
        given = settings.get("choice_settings") or {}
        if isinstance(name, str) and name in registry.names() and isinstance(given, Mapping):
            small["choice_settings"] = registry.get(name).smoke_settings(given)
        return small

    def choose(
        self,
        pipeline: DiffusionPipeline | ModelMixin,
        dataset: Dataset | None,
        directory: Path | None,
        log: Log | None,
    ) -> PruneResult:
        """Choose one architecture, and assign prompts and timesteps to experts.

        Args:
            pipeline: a pipeline, whose scheduler gives the timesteps of sampling.
            dataset: EncodedData, or CaptionedImages, which are then encoded.
            directory: directory for the checkpoints of the method that chooses; None: no checkpoints.
            log: passed to the method that chooses.

        Raises:
            UserError: no data or no scheduler; fewer prompts than experts; errors of the method that chooses.

        """
        config, scheduler = self.config, getattr(pipeline, "scheduler", None)
        if dataset is None or scheduler is None:
            raise UserError(f"{self.name} needs the whole pipeline, and data: pass EncodedData or CaptionedImages")
        data = as_encoded(pipeline, dataset)
        chosen = self._choice().choose(pipeline, data, directory, log)
        architectures = chosen.architectures * self.num_models
        info = describe_result(self, architectures, budget_cost(pipeline, config))
        info.search, info.gates_ratio, info.one_mask = chosen.info.search, [], True
        bins, router = None, None
        if config.bins > 1:
            timesteps = sampled_timesteps(scheduler, config.sampling_steps)
            bins = even_bins(timesteps, config.bins)
            info.timestep_shares = [float(share) for share in bins.shares(timesteps.tolist())]
        if config.experts > 1:
            router = self._router(data)
            counts = torch.bincount(router.route_rows(data.prompts, data.training_pairs()), minlength=config.experts)
            router = router.with_fallback(int(counts.argmax())).without((counts == 0).nonzero()[:, 0].tolist())
            info.prompts_per_expert = counts.tolist()
        info.mixture_ratio = info.ratio[0]
        return PruneResult(architectures, router, info, bins)

    def clear(self, directory: Path) -> None:
        """Remove the files of the method that chooses the architecture."""
        self._choice().clear(directory)

    def _choice(self) -> Method:
        settings = {name: getattr(self.config, name) for name in PruneSettings.model_fields}
        return registry.get(self.config.choice)(**{**settings, **self.config.choice_settings})

    def _router(self, data: EncodedData) -> Router:
        """Return a router to the nearest cluster center of the training prompts, by cosine similarity."""
        pairs, config = data.training_pairs(), self.config
        if config.experts > len(pairs):
            raise UserError(f"experts={config.experts} is more than the {len(pairs)} training prompts")
        embeddings = data.prompts[clustered_pairs(pairs, config.seed)]
        centers = spherical_kmeans(embeddings, config.experts, config.seed)
        directions = nn.functional.normalize(centers.double(), dim=1)
        return Router(directions, directions.new_zeros(len(directions)))
