"""The search of APTP: train the architecture predictor and the codes under a budget, with a frozen UNet (Eq. 15, 25).

A step computes the predicted embeddings, the transport, and the contrastive and resource terms once for its whole
global batch. The UNet then runs micro-batches under per-sample gates. A sample has the weight 1/(M B_i), where B_i is
the number of samples of its expert in the global batch, and M the number of experts with samples. So neither gradient
accumulation nor the number of processes changes the result.

Eq. 15 and 25 divide by all N experts instead of M. An expert without samples has no mean to add, and dividing by N
would lower the weight of the denoising and distillation terms against the resource and contrastive terms whenever an
expert is empty.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import ModelMixin
from pydantic import Field, model_validator
from torch import Tensor, nn

from prunekit.core.cost import CostModel
from prunekit.core.family import NoiseProcess
from prunekit.core.gates import Gates
from prunekit.data.encoded import EncodedData
from prunekit.methods.aptp.losses import (
    batch_weighted_cost,
    contrastive_loss,
    counts_of,
    maximum_loss,
    spread_loss,
)
from prunekit.methods.aptp.presets import PRESET_SEARCH, PRESETS
from prunekit.methods.router import ArchitecturePredictor, Hardening, clustered_pairs, cosine_scores, spherical_kmeans
from prunekit.methods.search import SEARCH, Codes, GateSearchObjective, SearchBatch, SearchSettings
from prunekit.methods.transport import assign
from prunekit.runtime.errors import UserError
from prunekit.runtime.randomness import generator
from prunekit.runtime.tensors import to_device
from prunekit.training.trainer import TrainerConfig


class APTPConfig(SearchSettings):
    """Settings of APTP; defaults are the paper's values, except where another value measured better (docs/aptp.md)."""

    preset: Literal["default", "paper", "published_code"] = Field(
        "default",
        description="Source of settings that are not given. default: the best measured values; paper: "
        "the paper, and its published code where the paper gives no value; published_code: "
        "the code, also where it differs from the paper.",
    )

    experts: int = Field(8, gt=0, description="Number of experts, N.")
    epsilon: float = Field(0.05, gt=0, description="Entropy weight of the transport, epsilon of Eq. 5.")
    sinkhorn_iterations: int = Field(3, gt=0, description="Number of Sinkhorn iterations (Eq. 7).")
    contrastive_temperature: float = Field(
        0.03, gt=0, description="Temperature of the contrastive loss, tau of Eq. 12."
    )
    contrastive_weight: float = Field(100.0, ge=0, description="Weight of the contrastive loss, lambda_cont of Eq. 25.")
    transport: bool = Field(
        True,
        description="Assign the prompts of a batch by optimal transport (Eq. 5-7, 20-21); false: each prompt to its "
        "nearest code.",
    )
    similarity: Literal["cosine", "hardened"] = Field(
        "cosine",
        description="Similarity that assigns prompts to codes in training. cosine: of e and a (Eq. 5); hardened: of "
        "their gates rounded to 0 or 1, weighted by 1/sqrt(width), as in the published code.",
    )
    routing: Literal["cosine", "hardened"] = Field(
        "cosine",
        description="Similarity that routes prompts at inference. cosine: of e and a (Eq. 22); hardened: "
        "of their gates rounded to 0 or 1, as in the published code, without its noise. With "
        "similarity=hardened and routing=cosine one expert may get every prompt "
        "(docs/aptp.md).",
    )
    codes: Literal["random", "kmeans"] = Field(
        "random",
        description="Initial codes. random: random orthogonal directions; kmeans: the k-means centers of the predicted "
        "embeddings.",
    )
    spread_weight: float = Field(
        0.0, ge=0, description="Weight of a term that rewards the spread of costs in a batch; published code: 0.1."
    )
    maximum_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the gap between the most expensive sample and the dense cost; published code: 0.1.",
    )
    balance: bool = Field(
        True,
        description="Shift the experts' routing scores so that training prompts are distributed as by "
        "transport; false: Eq. 22 without a shift, with which one expert may get every "
        "prompt.",
    )
    warmup: int = Field(
        500,
        ge=0,
        description="Number of first steps in which a prompt's embedding is its architecture, before the "
        "codes are used.",
    )

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        preset = data.get("preset") if isinstance(data, dict) else None
        if not isinstance(preset, str) or preset not in PRESETS:
            return data
        search = data.get("search") or SEARCH
        if isinstance(search, TrainerConfig):
            search = search.model_dump(exclude_unset=True)
        if isinstance(search, Mapping):
            data = {**data, "search": {**PRESET_SEARCH, **search}}
        return {**PRESETS[data["preset"]], **data}

    @model_validator(mode="after")
    def _codes_train(self) -> "APTPConfig":
        if self.search.steps <= self.warmup:
            raise UserError(
                f"search.steps={self.search.steps} must exceed warmup={self.warmup}: the codes train after it"
            )
        return self


@dataclass(frozen=True)
class RoutedBatch(SearchBatch):
    """The draws of a step, with the embeddings, experts and weights of the whole batch."""

    embeddings: Tensor  # (B, D) e, with gradient
    assignment: Tensor  # (B,) expert of each sample; during the warm-up its position in the batch
    weights: Tensor  # (B,) 1/(M B_i), M experts with samples; sum to 1


class SearchObjective(GateSearchObjective):
    """Objective of APTP's search, with the predictor and the N codes that it trains."""

    config: APTPConfig

    def __init__(
        self,
        model: ModelMixin,
        gates: Gates,
        predictor: ArchitecturePredictor,
        codes: Codes,
        cost: CostModel,
        process: NoiseProcess,
        data: EncodedData,
        config: APTPConfig,
        device: torch.device,
    ):
        super().__init__(model, gates, cost, process, data, config, device)
        self.predictor, self.codes = predictor.to(device), codes.to(device)
        self.hardening = Hardening.of(cost.space, device)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Return the predictor and the codes, by the names that checkpoints give them."""
        return {"predictor": self.predictor, "codes": self.codes}

    def batch(self, step: int) -> RoutedBatch:
        """Draw a step and assign its samples to experts; at the first step after the warm-up, initialize the codes."""
        config, drawn = self.config, self.draw(step)
        if step == config.warmup:
            self._place_codes()
        size, embeddings = len(drawn.pairs), self._embeddings(drawn)
        if step < config.warmup:
            assignment = torch.arange(size, device=self.device)
            weights = torch.full((size,), 1 / size, device=self.device)
        else:
            with torch.no_grad():
                scores = self._similarities(drawn, embeddings)
                chosen = assign(scores, config.epsilon, config.sinkhorn_iterations) if config.transport else None
                assignment = scores.argmax(dim=1) if chosen is None else chosen
            counts = counts_of(assignment, config.experts)
            weights = 1 / ((counts > 0).sum() * counts[assignment])
        return RoutedBatch(step, drawn.plan, drawn.pairs, embeddings, assignment, weights)

    def shared_loss(self, batch: RoutedBatch) -> dict[str, Tensor]:
        """Return the contrastive (Eq. 14) and resource (Eq. 26) terms; also spread and maximum, if one has a weight."""
        config = self.config
        soft = self.gate(batch, batch.embeddings, "embeddings")
        contrast = contrastive_loss(self._prompts(batch), soft, config.contrastive_temperature)
        logits = batch.embeddings if batch.step < config.warmup else self.codes.values
        costs = self.cost.expected_total(self.gate(batch, logits))  # (N,), during the warm-up (B,)
        terms = {"contrastive": config.contrastive_weight * contrast}
        terms["resource"] = self.resource_term(batch_weighted_cost(costs, batch.assignment))
        if config.spread_weight or config.maximum_weight:
            ratios = costs[batch.assignment] / self.cost.dense_total  # (B,)
            terms["spread"] = config.spread_weight * spread_loss(ratios)
            terms["maximum"] = config.maximum_weight * maximum_loss(ratios)
        return terms

    def micro_loss(self, batch: RoutedBatch, positions: Tensor) -> dict[str, Tensor]:
        """Return the denoising and distillation terms of `positions` under their experts' gates (Eq. 25).

        During the warm-up the embeddings are computed again, because the graph of the batch's embeddings belongs to
        the shared terms.
        """
        logits = self._embeddings(batch) if batch.step < self.config.warmup else self.codes.values
        own = to_device(positions, self.device)
        return self.sample_terms(batch, positions, logits, batch.assignment[own], batch.weights[own])

    @torch.no_grad()
    def _place_codes(self) -> None:
        """Initialize the codes: random orthogonal directions, or k-means centers of the predicted embeddings."""
        config, codes = self.config, self.codes.values
        if config.codes == "random":
            draw = torch.randn(codes.shape, generator=generator(config.seed, "codes"))
            codes.copy_(torch.linalg.qr(draw.T).Q.T[: len(codes)])
            return
        embedded = self.predictor(self.data.prompts[clustered_pairs(self.pairs, config.seed)].to(self.device))
        codes.copy_(spherical_kmeans(embedded, config.experts, config.seed))

    def _similarities(self, batch: SearchBatch, embeddings: Tensor) -> Tensor:
        """Return the similarity of each prompt of a batch to each code, (B, N)."""
        if self.config.similarity == "cosine":
            return cosine_scores(embeddings, self.codes.values)
        prompt_gates, code_gates = self.gate(batch, embeddings, "embeddings"), self.gate(batch, self.codes.values)
        return cosine_scores(self.hardening(prompt_gates), self.hardening(code_gates))

    @torch.no_grad()
    def similarities(self, prompts: Tensor) -> Tensor:
        """Return the similarity of prompts (B, Z) to the codes, (B, N), as in training but without noise."""
        embeddings, codes = self.predictor(prompts.to(self.device)), self.codes.values
        if self.config.similarity == "cosine":
            return cosine_scores(embeddings, codes)
        prompt_gates, code_gates = (self.hardening.of_logits(logits, self.relaxation) for logits in (embeddings, codes))
        return cosine_scores(prompt_gates, code_gates)

    def _embeddings(self, batch: SearchBatch) -> Tensor:
        """Return e (B, D) of the whole batch (Eq. 4)."""
        return self.predictor(self._prompts(batch))

    def _prompts(self, batch: SearchBatch) -> Tensor:
        """Return z (B, Z) of the whole batch."""
        return to_device(self.data.prompts[batch.pairs], self.device)
