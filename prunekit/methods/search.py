"""What the methods share that learn soft gates by gradient while the UNet stays frozen: settings, step and run.

A step draws its global batch once. The resource term looks at the gates alone; the UNet runs micro-batches under soft
gates with per-sample weights that are set for the whole batch, so accumulation and processes change nothing.
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
RATIO_DRAWS = 16  # of the gates' noise, when their cost is told
CHECKPOINTS = "checkpoints"  # folder of a search's checkpoints in the directory of its result


class SearchSettings(PruneSettings):
    """Settings of every method that learns gates; defaults are APTP's paper's where it names one that works."""

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
    """What a step draws for its global batch."""

    step: int
    plan: NoisePlan
    pairs: Tensor  # (B,) indices of pairs


@dataclass
class GateSearchObjective:
    """The terms of a search step that all such methods share; `gates` are open on `model` while it trains.

    A subclass makes this the `Objective` of a trainer: it sets `codes`, and has the modules that are trained, the batch
    of a step, and the losses, which say under which logits each sample runs.
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
        """Soft gates of logits (N, D), shifted by the offset (Eq. 9); their noise is keyed by (seed, purpose, step)."""
        return self.relaxation.gates(logits, generator(self.config.seed, purpose, batch.step))

    @torch.no_grad()
    def gates_ratio(self, logits: Tensor) -> list[float]:
        """Return what the soft gates of logits (N, D) cost, each over the dense cost: means over their noise."""
        draws = (self.relaxation.gates(logits, generator(self.config.seed, "ratio", i)) for i in range(RATIO_DRAWS))
        return (
            torch.stack([self.cost.expected_total(gates) for gates in draws]).mean(0) / self.cost.dense_total
        ).tolist()

    def resource_term(self, mean_cost: Tensor) -> Tensor:
        """Weighted distance of a mean cost, in what `cost.total` counts, to the budget (Eq. 26): a scalar."""
        return self.config.resource_weight * resource_loss(mean_cost, self.config.budget * self.cost.dense_total)

    def sample_terms(
        self, batch: SearchBatch, positions: Tensor, logits: Tensor, rows: Tensor, weights: Tensor
    ) -> dict[str, Tensor]:
        """Return the denoising and the distillation term of some of a batch's samples (Eq. 25).

        Args:
            batch: from `draw`.
            positions: (n,) the samples' places in the batch.
            logits: (N, D), what the gates come from.
            rows: (n,) which row of the logits each sample runs under.
            weights: (n,) what each sample counts; over the whole batch they sum to 1.

        Returns:
            Scalars: "denoising", and "distillation" from the ungated model, which does not run where its weight is 0.

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
    """A method that learns gates on data, then decides. A subclass has `_objective` and `_decide`."""

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
        """Search on a data set; called again for the same directory, go on where an earlier call was cut off.

        Args:
            pipeline: a Stable Diffusion pipeline, whose UNet stays as it is. Its scheduler says what the UNet
                predicts, so a UNet alone is refused.
            dataset: encoded data, or captioned images, which are then encoded with the embedded prompt encoder.
            directory: where checkpoints go, for resuming; a temporary one if None.
            log: takes one row a few steps.

        Returns:
            Boolean Architectures that meet the budget (law 3), and in `info.search` the training's figures.

        Raises:
            UserError: a UNet without its scheduler, a budget below the floor of the space, or data that the method
                cannot learn from.

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
        """Return what is trained, at its start."""
        raise NotImplementedError

    def _decide(self, objective: ObjectiveT) -> PruneResult:
        """Return the result of a trained objective."""
        raise NotImplementedError
