"""Uni-Arch: one architecture, learned as APTP learns its codes (Ganjdanesh et al., ICLR 2025, Table 3).

Uni-Arch is the first row of APTP's ablation: the same gates, losses and budget with a single code, and without router,
contrastive term and transport. That row is trained without distillation (distillation_weight=0). The default here uses
distillation; the paper's table has no row for one learned architecture with distillation.
"""

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from prunekit.core.cost import CostModel
from prunekit.core.family import NoiseProcess
from prunekit.core.gates import Gates
from prunekit.data.encoded import EncodedData
from prunekit.methods.base import describe_result
from prunekit.methods.budget import select
from prunekit.methods.registry import register
from prunekit.methods.result import PruneResult
from prunekit.methods.search import Codes, GateSearchObjective, SearchBatch, SearchMethod, SearchSettings


class UniArchConfig(SearchSettings):
    """Settings of Uni-Arch: those of the search."""


class UniArchObjective(GateSearchObjective):
    """One code (1, D), learned with the denoising, distillation and resource terms of Eq. 25; all gates start open."""

    def __init__(
        self,
        model: ModelMixin,
        gates: Gates,
        cost: CostModel,
        process: NoiseProcess,
        data: EncodedData,
        config: SearchSettings,
        device: torch.device,
    ):
        super().__init__(model, gates, cost, process, data, config, device)
        self.codes = Codes(1, cost.space.size).to(device)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Return the code, by the name that checkpoints give it."""
        return {"codes": self.codes}

    def batch(self, step: int) -> SearchBatch:
        """Draw a step's pairs, timesteps and noise."""
        return self.draw(step)

    def shared_loss(self, batch: SearchBatch) -> dict[str, Tensor]:
        """Return the resource term of the code's gates (Eq. 26)."""
        return {"resource": self.resource_term(self.cost.expected_total(self.gate(batch, self.codes.values))[0])}

    def micro_loss(self, batch: SearchBatch, positions: Tensor) -> dict[str, Tensor]:
        """Return the denoising and distillation terms of `positions`; every sample runs under the one code."""
        rows = torch.zeros(len(positions), dtype=torch.long, device=self.device)
        weights = torch.full((len(positions),), 1 / len(batch.pairs), device=self.device)
        return self.sample_terms(batch, positions, self.codes.values, rows, weights)


@register("uniarch")
class UniArch(SearchMethod[UniArchObjective]):
    """One learned architecture for all prompts, without a router (Uni-Arch of APTP's ablation, ICLR 2025).

    `prune` returns the Architecture with the highest scores of the learned code within the budget (`select`, law 3).
    """

    Config = UniArchConfig
    config: UniArchConfig

    def _objective(
        self, model: ModelMixin, gates: Gates, cost: CostModel, process: NoiseProcess, data: EncodedData
    ) -> UniArchObjective:
        return UniArchObjective(model, gates, cost, process, data, self.config, model.device)

    def _decide(self, objective: UniArchObjective) -> PruneResult:
        scores = objective.relaxation.scores(objective.codes.values.detach())[0]
        architecture = select(scores, objective.cost, self.config.budget, self.config.align)
        return PruneResult([architecture], info=describe_result(self, [architecture], objective.cost))
