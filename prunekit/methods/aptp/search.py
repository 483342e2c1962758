"""The search of APTP: train the architecture predictor and the codes under a budget, the UNet frozen (Eq. 15, 25).

A step looks at its whole global batch once: predicted embeddings, transport, contrastive and resource terms. The UNet
then runs micro-batches under per-sample gates with weights 1/(N B_i), where B_i counts an expert's samples in the
global batch; so accumulation and processes change nothing.
"""

from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from pydantic import Field, model_validator
from torch import Tensor, nn

from prunekit.cost import CostModel
from prunekit.data.encoded import EncodedData
from prunekit.gates import Gates
from prunekit.methods.aptp.losses import batch_weighted_cost, contrastive_loss, gumbel, gumbel_sigmoid, resource_loss
from prunekit.methods.aptp.router import ArchitecturePredictor, cosine_scores
from prunekit.methods.aptp.transport import assign
from prunekit.methods.base import PruneSettings
from prunekit.randomness import generator
from prunekit.training.diffusion import NoisePlan, attention_kernel, per_sample_mse, target
from prunekit.training.distillation import block_outputs, distillation_error
from prunekit.training.trainer import TrainerConfig


class APTPConfig(PruneSettings):
    """Settings of APTP; defaults are the paper's where it names one and the search can work with it."""

    experts: int = Field(8, gt=0, description="N, the number of experts")
    temperature: float = Field(0.4, gt=0, description="gamma of the Gumbel-sigmoid gates (Eq. 9)")
    offset: float = Field(3.0, description="added to every logit, so that all gates start open")
    epsilon: float = Field(0.05, gt=0, description="entropy weight of the transport (Eq. 5)")
    sinkhorn_iterations: int = Field(3, gt=0, description="Sinkhorn iterations (Eq. 7)")
    contrastive_temperature: float = Field(0.03, gt=0, description="tau of the contrastive loss (Eq. 12)")
    distillation_weight: float = Field(0.2, ge=0, description="lambda_distill of Eq. 25")
    resource_weight: float = Field(2.0, ge=0, description="lambda_res of Eq. 25")
    contrastive_weight: float = Field(100.0, ge=0, description="lambda_cont of Eq. 25")
    balance: bool = Field(
        True,
        description="shift the experts' routing scores so that the training prompts spread as transport spreads them; "
        "off: Eq. 22 as printed, under which one expert may take every prompt",
    )
    warmup: int = Field(500, ge=0, description="first steps, in which a prompt's own embedding is its architecture")
    search: TrainerConfig = Field(
        default_factory=lambda: TrainerConfig(steps=3000, batch_size=1024, learning_rate=6.4e-3, warmup_steps=100),
        description="how the predictor and the codes are trained",
    )

    @model_validator(mode="after")
    def _codes_train(self) -> "APTPConfig":
        if self.search.steps <= self.warmup:
            raise ValueError(
                f"search.steps={self.search.steps} must exceed warmup={self.warmup}: the codes train after it"
            )
        return self


class Codes(nn.Module):
    """The N architecture codes a, (N, D); logits without the offset."""

    def __init__(self, num_experts: int, num_units: int):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(num_experts, num_units))


@dataclass(frozen=True)
class SearchBatch:
    """A step's draws and what follows from the whole batch."""

    plan: NoisePlan
    step: int
    pairs: Tensor  # (B,) indices of pairs
    embeddings: Tensor  # (B, D) e, with gradient
    assignment: Tensor  # (B,) expert of each sample; during the warm-up its own position
    weights: Tensor  # (B,) 1/(N B_i); sum to 1


@dataclass
class SearchObjective:
    """Everything that one step of the search needs; `gates` are open on `unet` while it trains."""

    unet: UNet2DConditionModel
    gates: Gates
    predictor: ArchitecturePredictor
    codes: Codes
    cost: CostModel
    scheduler: DDPMScheduler
    data: EncodedData
    config: APTPConfig
    device: torch.device

    def __post_init__(self) -> None:
        self.pairs = self.data.training_pairs()
        self.prompts = self.data.prompts[self.pairs].to(self.device)  # (P, Z)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The trained modules."""
        return {"predictor": self.predictor, "codes": self.codes}

    def gate(self, logits: Tensor, noise: Tensor | float = 0.0) -> Tensor:
        """Soft gates of embeddings or codes (Eq. 9), shifted by the offset."""
        return gumbel_sigmoid(logits + self.config.offset, self.config.temperature, noise)

    def batch(self, step: int) -> SearchBatch:
        """Draw a step; at the first step with codes, place them at the centres of the predicted embeddings."""
        config = self.config
        if step == config.warmup:
            with torch.no_grad():
                centres = spherical_kmeans(self.predictor(self.prompts), config.experts, config.seed)
                self.codes.values.copy_(centres)
        size, shape = config.search.batch_size, tuple(self.data.latents.shape[1:])
        steps = self.scheduler.config.num_train_timesteps
        plan = NoisePlan.draw(step, config.seed, size, len(self.pairs), shape, steps)
        embeddings = self.predictor(self.prompts[plan.indices.to(self.device)])
        if step < config.warmup:
            assignment, weights = torch.arange(size), torch.full((size,), 1 / size)
        else:
            with torch.no_grad():
                scores = cosine_scores(embeddings, self.codes.values)
                assignment = assign(scores, config.epsilon, config.sinkhorn_iterations).cpu()
            counts = torch.bincount(assignment, minlength=config.experts)
            weights = 1 / (int((counts > 0).sum()) * counts[assignment])
        return SearchBatch(plan, step, self.pairs[plan.indices], embeddings, assignment, weights)

    def logits(self, batch: SearchBatch) -> Tensor:
        """Return the rows that gates come from: (B, D) embeddings during the warm-up, then the codes (N, D)."""
        return batch.embeddings if batch.step < self.config.warmup else self.codes.values

    def shared_loss(self, batch: SearchBatch) -> dict[str, Tensor]:
        """Return the contrastive term (Eq. 14) and the resource term (Eq. 26) of the whole batch."""
        config, logits = self.config, self.logits(batch)
        soft = self.gate(batch.embeddings, self._noise(batch, "embeddings", batch.embeddings))
        contrast = contrastive_loss(
            self.prompts[batch.plan.indices.to(self.device)], soft, config.contrastive_temperature
        )
        costs = self.cost.macs(self.gate(logits, self._noise(batch, "gates", logits)))
        mean_macs = batch_weighted_cost(costs, batch.assignment)
        return {
            "contrastive": config.contrastive_weight * contrast,
            "resource": config.resource_weight * resource_loss(mean_macs, config.budget * self.cost.dense_macs),
        }

    def micro_loss(self, batch: SearchBatch, positions: Tensor) -> dict[str, Tensor]:
        """Return the denoising and distillation terms of `positions` under their experts' gates (Eq. 25)."""
        plan, pairs, weights = batch.plan, batch.pairs[positions], batch.weights[positions].to(self.device)
        latents = self.data.latents[self.data.image_index[pairs]].to(self.device)
        noise, timesteps = plan.noise[positions].to(self.device), plan.timesteps[positions].to(self.device)
        text = self.data.text[pairs].to(self.device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        inputs = (noisy, timesteps, text)
        with torch.no_grad(), block_outputs(self.unet) as teacher_blocks:
            self.gates.set(self.cost.space.full())
            teacher = self.unet(*inputs).sample
        logits = self.logits(batch)
        if batch.step < self.config.warmup:  # the graph of the whole batch stays with the shared terms
            logits = self.predictor(self.prompts[plan.indices.to(self.device)])
        soft = self.gate(logits, self._noise(batch, "gates", logits))
        self.gates.set(soft, rows=batch.assignment[positions])
        with attention_kernel(noisy), block_outputs(self.unet) as blocks:
            prediction = self.unet(*inputs).sample
        denoising = per_sample_mse(prediction, target(self.scheduler, latents, noise, timesteps))
        error = distillation_error(prediction, teacher, blocks, teacher_blocks)
        return {
            "denoising": (weights * denoising).sum(),
            "distillation": self.config.distillation_weight * (weights * error).sum(),
        }

    def _noise(self, batch: SearchBatch, purpose: str, logits: Tensor) -> Tensor:
        return gumbel(tuple(logits.shape), generator(self.config.seed, purpose, batch.step)).to(logits)


def spherical_kmeans(embeddings: Tensor, count: int, seed: int, iterations: int = 25) -> Tensor:
    """Return `count` centres (N, D) of embeddings (P, D) by cosine similarity; deterministic.

    Starts from k-means++ seeds (Arthur & Vassilvitskii, 2007); a centre keeps the mean length of its members, and
    an empty one stays where it was.
    """
    unit = nn.functional.normalize(embeddings.double(), dim=1)
    source = generator(seed, "kmeans")
    chosen = [int(torch.randint(len(unit), (1,), generator=source))]
    while len(chosen) < count:
        distance = (1 - unit @ unit[chosen].T).amin(1).clamp(min=0).cpu()
        if not bool(distance.sum() > 0):
            distance = torch.ones_like(distance)
        chosen.append(int(torch.multinomial(distance, 1, generator=source)))
    centres = unit[chosen]
    for _ in range(iterations):
        nearest = (unit @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, unit)
        counts = torch.bincount(nearest, minlength=count)[:, None]
        centres = torch.where(counts > 0, nn.functional.normalize(sums, dim=1), centres)
    nearest = (unit @ centres.T).argmax(1)
    members = torch.bincount(nearest, minlength=count).clamp(min=1)
    lengths = torch.zeros(count, dtype=unit.dtype, device=unit.device)
    lengths.index_add_(0, nearest, embeddings.double().norm(dim=1))
    return (centres * (lengths / members).clamp(min=1e-6)[:, None]).to(embeddings)
