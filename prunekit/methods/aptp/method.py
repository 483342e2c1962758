"""APTP as a method: search, then deterministic experts that meet the budget, and a router (ICLR 2025)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin

from prunekit.core.cost import CostModel
from prunekit.core.family import NoiseProcess
from prunekit.core.gates import Gates
from prunekit.data.encoded import EncodedData
from prunekit.methods.aptp.expert_search import APTPConfig, SearchObjective
from prunekit.methods.aptp.presets import EARLIER_PAPER, PRESET_MARK
from prunekit.methods.base import describe_result
from prunekit.methods.budget import select_mixture
from prunekit.methods.registry import register
from prunekit.methods.result import PruneResult
from prunekit.methods.router import MOST_CLUSTERED, ArchitecturePredictor, HardenedRouter, Router
from prunekit.methods.search import Codes, SearchMethod
from prunekit.methods.transport import assign, expert_potentials
from prunekit.runtime.errors import UserError
from prunekit.runtime.randomness import generator


@register("aptp")
class APTP(SearchMethod[SearchObjective]):
    """Adaptive Prompt-Tailored Pruning: a mixture of pruned experts and a router (Ganjdanesh et al., ICLR 2025).

    `prune` returns N Architectures and the router. The mean cost of the Architectures over the training prompts, under
    inference routing, meets the budget (law 3). `info.prompts_per_expert` counts each expert's training prompts.
    """

    Config = APTPConfig
    config: APTPConfig
    smoke: ClassVar[Mapping[str, int | None]] = {"experts": 2, "warmup": 1}

    @property
    def num_models(self) -> int:
        """Return the number of experts, N."""
        return self.config.experts

    def short_settings(self, devices: int) -> dict[str, Any]:
        """Return settings with two steps of search, both after the warm-up."""
        return {**super().short_settings(devices), "warmup": 0}

    def recorded(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return settings in which a preset has the mark of this version (`PRESET_MARK`)."""
        if settings.get("preset", "default") == "default":
            return settings
        return {**settings, PRESET_MARK: settings.get(PRESET_MARK, getattr(self.config, PRESET_MARK))}

    @classmethod
    def read_recorded(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Return settings in which the `preset: paper` of an earlier version is replaced by the values that it had."""
        if settings.get("preset") != "paper" or PRESET_MARK in settings:
            return settings
        return {**EARLIER_PAPER, **settings, "preset": "default"}

    def _objective(
        self, model: ModelMixin, gates: Gates, cost: CostModel, process: NoiseProcess, data: EncodedData
    ) -> SearchObjective:
        num_prompts = len(data.training_pairs())
        if self.config.experts > num_prompts:
            raise UserError(f"experts={self.config.experts} is more than the {num_prompts} training prompts")
        predictor, codes = self._parameters(data.prompts.shape[1], cost.space.size)
        return SearchObjective(model, gates, predictor, codes, cost, process, data, self.config, model.device)

    def _decide(self, objective: SearchObjective) -> PruneResult:
        config, codes, cost = self.config, objective.codes.values.detach(), objective.cost
        prompts, pairs = objective.data.prompts, objective.pairs
        router = self._router(objective)
        if config.balance:
            router = router.shifted(expert_potentials(router.scores_of(prompts, pairs), config.epsilon))
        counts = torch.bincount(router.route_rows(prompts, pairs), minlength=config.experts)
        router = router.with_fallback(int(counts.argmax())).without((counts == 0).nonzero()[:, 0].tolist())
        scores = objective.relaxation.scores(codes).cpu()
        experts = select_mixture(scores, counts, cost, config.budget, config.align)
        info = describe_result(self, experts, cost)
        info.prompts_per_expert = counts.tolist()
        info.assignment = self._assignment(objective)
        shares = counts.double() / counts.sum()
        info.mixture_ratio = float((shares * torch.tensor(info.ratio, dtype=torch.float64)).sum())
        return PruneResult(experts, router, info)

    def _router(self, objective: SearchObjective) -> Router:
        """Return the router of the trained predictor and codes."""
        predictor, codes = objective.predictor, objective.codes.values.detach()
        if self.config.routing == "cosine":
            return Router.from_codes(predictor, codes)
        return HardenedRouter.of(predictor, codes, objective.hardening, objective.relaxation)

    @torch.no_grad()
    def _assignment(self, objective: SearchObjective) -> dict[str, list[int]]:
        """Return the number of prompts per expert before balancing, over at most MOST_CLUSTERED training prompts.

        nearest: each prompt goes to its nearest code. transport: optimal transport assigns each batch, as in the search
        (Eq. 5-7).
        """
        config = self.config
        counts = {"nearest": torch.zeros(config.experts, dtype=torch.long)}
        counts |= {"transport": torch.zeros(config.experts, dtype=torch.long)}
        order = torch.randperm(len(objective.pairs), generator=generator(config.seed, "assignment"))[:MOST_CLUSTERED]
        for batch in objective.pairs[order].split(config.search.batch_size):
            scores = objective.similarities(objective.data.prompts[batch])
            spread = assign(scores, config.epsilon, config.sinkhorn_iterations)
            for name, experts in (("nearest", scores.argmax(dim=1)), ("transport", spread)):
                counts[name] += torch.bincount(experts.cpu(), minlength=config.experts)
        return {name: prompts.tolist() for name, prompts in counts.items()}

    def _parameters(self, embedding_size: int, num_units: int) -> tuple[ArchitecturePredictor, Codes]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            return ArchitecturePredictor(embedding_size, num_units), Codes(self.config.experts, num_units)
