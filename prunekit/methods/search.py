"""Shared parts of the methods that learn soft gates by gradient with a frozen UNet: settings, step and run.

A step draws its global batch once. The resource term depends only on the gates. The UNet runs micro-batches under soft
gates, with per-sample weights that are set for the whole batch, so neither gradient accumulation nor the number of
processes changes the result.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Generic, TypeVar

import torch
from diffusers import DiffusionPipeline, ModelMixin
from pydantic import Field
from torch import Tensor, nn

from prunekit.core.call import Call, predict
from prunekit.core.cost import CostModel
from prunekit.core.family import NoiseProcess
from prunekit.core.gates import Gates, gated
from prunekit.core.registry import denoiser_in, denoiser_of, process_of
from prunekit.core.space import UnitSpace
from prunekit.data.encoded import EncodedData
from prunekit.methods.base import Dataset, Method, budget_cost
from prunekit.methods.budget import budget_limit
from prunekit.methods.calibration import as_encoded
from prunekit.methods.relaxation import DepthGates, Noise, Relaxation
from prunekit.methods.result import PruneResult
from prunekit.methods.settings import PruneSettings
from prunekit.methods.workload import MethodWork, Search
from prunekit.runtime.errors import UserError
from prunekit.runtime.randomness import generator
from prunekit.runtime.tensors import to_device
from prunekit.training.checkpoint import Checkpoints
from prunekit.training.diffusion import (
    SNR_FORM,
    SNR_GAMMA,
    NoisePlan,
    SNRForm,
    attention_kernel,
    denoising_errors,
)
from prunekit.training.distillation import (
    FEATURE_SCALE,
    FeatureBlocks,
    FeatureScale,
    block_outputs,
    distillation_error,
)
from prunekit.training.memory import held, preserved
from prunekit.training.trainer import Log, Objective, Trainer, TrainerConfig

SEARCH = {"steps": 3000, "batch_size": 1024, "learning_rate": 6.4e-3, "warmup_steps": 100}  # of APTP's published code
RATIO_DRAWS = 16  # of the gates' noise, over which `gates_ratio` averages
CHECKPOINTS = "checkpoints"  # folder of a search's checkpoints in the directory of its result


class SearchSettings(PruneSettings):
    """Settings of every method that learns gates; a default is APTP's value, if the paper names one that works."""

    temperature: float = Field(0.4, gt=0, description="Temperature of the gates, gamma of Eq. 9.")
    offset: float = Field(3.0, description="Constant added to every logit, so that all gates start open.")
    noise: Noise = Field(
        "gumbel",
        description="Noise of the gates. gumbel: as in the paper; logistic: of a Bernoulli variable; hard_concrete: "
        "logistic, stretched and clipped so that gates reach 0 and 1.",
    )
    depth_gates: DepthGates = Field(
        "independent",
        description="Gates of whole layers. independent: one logit per layer; cumulative: one softmax, which removes "
        "layers in a fixed order from the middle of the UNet outwards, as in APTP's published code.",
    )
    feature_blocks: FeatureBlocks = Field(
        "none",
        description="Blocks whose outputs are distilled in addition to the denoiser's output. all: as in "
        "the paper; the unscaled errors may outweigh the resource term, so that gates stay "
        "open and the final cut is nearly arbitrary.",
    )
    feature_scale: FeatureScale = Field("sum", description=FEATURE_SCALE)
    distillation_weight: float = Field(
        0.2, ge=0, description="Weight of distillation, lambda_distill of Eq. 25; 0: no pass of the teacher."
    )
    resource_weight: float = Field(2.0, ge=0, description="Weight of the resource term, lambda_res of Eq. 25.")
    snr_gamma: float | None = Field(None, gt=0, description=SNR_GAMMA)
    snr_form: SNRForm = Field("velocity", description=SNR_FORM)
    search: TrainerConfig = Field(
        default_factory=lambda: TrainerConfig(**SEARCH),
        description="Training of the parameters that determine the gates.",
    )


class Codes(nn.Module):
    """The N architecture codes a, (N, D); logits without the offset."""

    def __init__(self, num_experts: int, num_units: int):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(num_experts, num_units))


@dataclass(frozen=True)
class SearchBatch:
    """The draws of a step for its global batch."""

    step: int
    plan: NoisePlan
    pairs: Tensor  # (B,) indices of pairs


@dataclass
class GateSearchObjective:
    """Terms of a search step that these methods share; `gates` must be active on `model` during the training.

    A subclass completes the `Objective` of a trainer: it sets `codes` and defines `modules`, `batch`, `shared_loss` and
    `micro_loss`. The losses determine the logits under which each sample runs.
    """

    model: ModelMixin
    gates: Gates
    cost: CostModel
    process: NoiseProcess
    data: EncodedData
    config: SearchSettings
    device: torch.device
    codes: Codes = field(init=False)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Return the modules that are trained, by the names that checkpoints give them."""
        raise NotImplementedError

    def batch(self, step: int) -> SearchBatch:
        """Return the global batch of a step; the same on every process."""
        raise NotImplementedError

    def shared_loss(self, batch: Any) -> dict[str, Tensor]:
        """Return the terms that are functions of the whole batch: scalars."""
        raise NotImplementedError

    def micro_loss(self, batch: Any, positions: Tensor) -> dict[str, Tensor]:
        """Return terms summed over `positions` (n,), so that all positions together give the step's loss."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        self.pairs = self.data.training_pairs()  # (P,)
        config, num_width = self.config, self.cost.space.num_width
        self.relaxation = Relaxation(num_width, config.noise, config.depth_gates, config.temperature, config.offset)

    def draw(self, step: int) -> SearchBatch:
        """Draw a step's pairs, timesteps and noise: a function of (seed, step) alone."""
        size, shape = self.config.search.batch_size, tuple(self.data.latents.shape[1:])
        sampled = self.data.deviations is not None
        plan = NoisePlan.draw(step, self.config.seed, size, len(self.pairs), shape, self.process, sampled)
        return SearchBatch(step, plan, self.pairs[plan.indices])

    def gate(self, batch: SearchBatch, logits: Tensor, purpose: str = "gates") -> Tensor:
        """Return soft gates of logits (N, D), shifted by the offset (Eq. 9); (seed, purpose, step) keys their noise."""
        return self.relaxation.gates(logits, generator(self.config.seed, purpose, batch.step))

    @torch.no_grad()
    def gates_ratio(self, logits: Tensor) -> list[float]:
        """Return the N costs of the soft gates of logits (N, D) over the dense cost, averaged over draws of noise."""
        draws = (self.relaxation.gates(logits, generator(self.config.seed, "ratio", i)) for i in range(RATIO_DRAWS))
        return (
            torch.stack([self.cost.expected_total(gates) for gates in draws]).mean(0) / self.cost.dense_total
        ).tolist()

    def resource_term(self, mean_cost: Tensor) -> Tensor:
        """Return the weighted distance of a mean cost, in the unit of `cost.total`, to the budget (Eq. 26)."""
        return self.config.resource_weight * resource_loss(mean_cost, self.config.budget * self.cost.dense_total)

    def sample_terms(
        self, batch: SearchBatch, positions: Tensor, logits: Tensor, rows: Tensor, weights: Tensor
    ) -> dict[str, Tensor]:
        """Return the denoising and distillation terms of some samples of a batch (Eq. 25).

        Args:
            batch: from `draw`.
            positions: (n,) positions of the samples in the batch.
            logits: (N, D), logits of the gates.
            rows: (n,) row of the logits under which each sample runs.
            weights: (n,) weight of each sample; over the whole batch they sum to 1.

        Returns:
            Scalars: "denoising", and "distillation" from the ungated model, unless distillation_weight is 0.

        """
        pairs, weights = batch.pairs[positions], to_device(weights, self.device)
        latents = to_device(self.data.draw_latents(pairs, batch.plan.posterior_at(positions)), self.device)
        drawn = (batch.plan.noise, batch.plan.timesteps)
        noise, timesteps = (to_device(values[positions], self.device) for values in drawn)
        noisy = self.process.noised(latents, noise, timesteps)
        call = denoiser_of(self.model).call(noisy, timesteps, self.data.conditions(pairs, self.device))
        weight = self.config.distillation_weight
        which = self.config.feature_blocks if weight else "none"
        teacher = self._teacher(call, noisy) if weight else None
        self.gates.set(self.gate(batch, logits), rows=rows)
        kernel = attention_kernel(self.model, noisy, self.config.search.gradient_checkpointing)
        with kernel, block_outputs(self.model, which) as blocks:
            prediction = predict(self.model, call)
        sample = (latents, noise, timesteps)
        denoising = denoising_errors(prediction, self.process, *sample, self.config.snr_gamma, self.config.snr_form)
        terms = {"denoising": (weights * denoising).sum()}
        if teacher is not None:
            error = distillation_error(prediction, teacher[0], blocks, teacher[1], self.config.feature_scale)
            terms["distillation"] = weight * (weights * error).sum()
        return terms

    @torch.no_grad()
    def _teacher(self, call: Call, noisy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the ungated model's output and its blocks' outputs."""
        self.gates.set(self.cost.space.full())
        with attention_kernel(self.model, noisy), block_outputs(self.model, self.config.feature_blocks) as blocks:
            return predict(self.model, call), blocks


def resource_loss(mean_cost: Tensor, target: Tensor | float) -> Tensor:
    """Return the distance of a cost to its target, log(max / min) (APTP, Eq. 26 and 31); 0 where they agree.

    Args:
        mean_cost: MACs or nanoseconds, above 0: a scalar.
        target: in the same unit, above 0.

    """
    target = target.to(mean_cost) if isinstance(target, Tensor) else mean_cost.new_full((), target)
    return (mean_cost.log() - target.log()).abs()


ObjectiveT = TypeVar("ObjectiveT", bound=GateSearchObjective)


class SearchMethod(Method, Generic[ObjectiveT]):
    """A method that learns gates on data, then chooses Architectures; a subclass has `_objective` and `_decide`."""

    Config = SearchSettings
    config: SearchSettings
    undistilled: ClassVar[Mapping[str, Any]] = {"distillation_weight": 0.0}

    def work(self, space: UnitSpace) -> MethodWork:
        """Return the training of the gates."""
        search = Search(self.config.search, has_teacher=self.config.distillation_weight > 0)
        return MethodWork(search=search, memory_setting="search.micro_batch")

    def choose(
        self,
        pipeline: DiffusionPipeline | ModelMixin,
        dataset: Dataset | None,
        directory: Path | None,
        log: Log | None,
    ) -> PruneResult:
        """Search on a data set, then choose; a call with the directory of an interrupted call resumes it.

        Args:
            pipeline: a whole pipeline, whose denoiser is not changed. A denoiser alone is refused, because the
                scheduler determines what the denoiser predicts.
            dataset: encoded data, or captioned images, which are then encoded with the embedded prompt encoder.
            directory: folder of the checkpoints; None: a temporary folder.
            log: function that takes a row every few steps.

        Returns:
            Boolean Architectures that meet the budget (law 3), and in `info.search` the training's figures.

        Raises:
            UserError: a denoiser without its scheduler, a budget below the smallest cost in the space, or data that the
                method cannot learn from.

        """
        if getattr(pipeline, "scheduler", None) is None:
            raise UserError(f"{self.name} needs the whole pipeline: its scheduler determines what the UNet predicts")
        if dataset is None:
            raise UserError(f"{self.name} needs data: pass EncodedData or CaptionedImages (norm and random need none)")
        data = as_encoded(pipeline, dataset)
        cost = budget_cost(pipeline, self.config)
        budget_limit(cost, self.config.budget)  # refuses a budget below the floor before the search
        model = denoiser_in(pipeline)
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory())) if directory is None else directory
            stack.enter_context(preserved(model))
            stack.enter_context(held(self.config.search, model.eval().requires_grad_(False)))
            gates = stack.enter_context(gated(model, cost.space))
            objective = self._objective(model, gates, cost, process_of(pipeline), data)
            training: Objective = objective
            trainer = Trainer(self.config.search, training, folder / CHECKPOINTS, f"{self.name} search", log)
            figures = trainer.fit()
        result = self._decide(objective)
        result.info.search, result.info.gates_ratio = figures, objective.gates_ratio(objective.codes.values)
        return result

    def clear(self, directory: Path) -> None:
        """Remove the checkpoints."""
        Checkpoints(directory / CHECKPOINTS).clear()

    def _objective(
        self, model: ModelMixin, gates: Gates, cost: CostModel, process: NoiseProcess, data: EncodedData
    ) -> ObjectiveT:
        """Return the objective before its training."""
        raise NotImplementedError

    def _decide(self, objective: ObjectiveT) -> PruneResult:
        """Return the result of a trained objective."""
        raise NotImplementedError
