"""APTP as a method: search, then deterministic experts that meet the budget, and a router (ICLR 2025)."""

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from prunekit.cost import CostModel
from prunekit.data.encoded import EncodedData
from prunekit.gates import Gates
from prunekit.methods.aptp.router import ArchitecturePredictor, Router
from prunekit.methods.aptp.search import APTPConfig, SearchObjective
from prunekit.methods.aptp.transport import expert_potentials
from prunekit.methods.base import PruneResult, describe_result
from prunekit.methods.budget import select_mixture
from prunekit.methods.registry import register
from prunekit.methods.search import Codes, SearchMethod


@register("aptp")
class APTP(SearchMethod):
    """Adaptive Prompt-Tailored Pruning: a mixture of pruned experts and a router (Ganjdanesh et al., ICLR 2025).

    `prune` returns N Architectures whose mean cost over the training prompts, by inference routing, meets the budget
    (law 3), the router, and in `info` how many of the training prompts each expert gets.
    """

    Config = APTPConfig
    config: APTPConfig

    def _objective(
        self, unet: UNet2DConditionModel, gates: Gates, cost: CostModel, scheduler: DDPMScheduler, data: EncodedData
    ) -> SearchObjective:
        num_prompts = len(data.training_pairs())
        if self.config.experts > num_prompts:
            raise ValueError(f"experts={self.config.experts} exceed the {num_prompts} training prompts")
        predictor, codes = self._parameters(data.prompts.shape[1], cost.space.size)
        return SearchObjective(unet, gates, predictor, codes, cost, scheduler, data, self.config, unet.device)

    def _decide(self, objective: SearchObjective) -> PruneResult:
        config, codes, cost = self.config, objective.codes.values.detach(), objective.cost
        prompts = objective.data.prompts[objective.pairs]  # (P, Z)
        router = Router.from_codes(objective.predictor, codes)
        if config.balance:
            router = router.shifted(expert_potentials(router.scores(prompts), config.epsilon))
        counts = torch.bincount(router.route(prompts), minlength=config.experts)
        router = router.with_fallback(int(counts.argmax()))
        scores = objective.relaxation.scores(codes).cpu()
        experts = select_mixture(scores, counts, cost, config.budget, config.align)
        info = describe_result(self, experts, cost)
        info["prompts_per_expert"] = counts.tolist()
        shares = counts.double() / counts.sum()
        info["mixture_ratio"] = float((shares * torch.tensor(info["ratio"], dtype=torch.float64)).sum())
        return PruneResult(experts, router, info)

    def _parameters(self, embedding_size: int, num_units: int) -> tuple[ArchitecturePredictor, Codes]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            return ArchitecturePredictor(embedding_size, num_units), Codes(self.config.experts, num_units)
