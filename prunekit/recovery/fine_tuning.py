"""Fine-tune a sliced denoiser by denoising and by distillation from the dense denoiser (APTP, Eq. 30)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from pydantic import Field, model_validator
from torch import Tensor, nn

from prunekit.core.call import predict
from prunekit.core.family import NoiseProcess
from prunekit.core.registry import denoiser_of
from prunekit.data.encoded import EncodedData
from prunekit.recovery.deltas import DeltaConfig
from prunekit.recovery.low_rank import LoraConfig, attach, merge, merged
from prunekit.runtime.errors import UserError
from prunekit.runtime.tensors import to_device
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
from prunekit.training.memory import held, is_lowered, offloaded, preserved
from prunekit.training.trainer import Log, Trainer, TrainerConfig


class FineTuneConfig(TrainerConfig):
    """Settings of the fine-tuning of sliced models."""

    denoising_weight: float = Field(1e-4, ge=0, description="Weight of the denoising error, alpha_DDPM of Eq. 30.")
    distillation_weight: float = Field(
        1.0, ge=0, description="Weight of distillation, alpha_distill of Eq. 30; 0: no teacher."
    )
    feature_blocks: FeatureBlocks = Field(
        "all",
        description="Blocks whose outputs are distilled. all: Eq. 29; down_up: without the mid block, which with "
        "denoising_weight=1 is BK-SDM's distillation (Kim et al., 2023); none: only the output.",
    )
    feature_scale: FeatureScale = Field("sum", description=FEATURE_SCALE)
    shared_backbone: bool = Field(
        False,
        description="Share one set of weights among the experts of a mixture: it is trained under all "
        "masks, and experts are sliced from it; false: separate weights.",
    )
    experts_per_step: int | None = Field(
        None,
        gt=0,
        description="With shared_backbone: number of experts that a step trains, drawn by their shares of the prompts; "
        "1: the whole batch runs through one expert; unset: every prompt runs through its own expert.",
    )
    caption_dropout: float = Field(
        0.1, ge=0, le=1, description="Fraction of captions replaced by the empty caption, for classifier-free guidance."
    )
    snr_gamma: float | None = Field(None, gt=0, description=SNR_GAMMA)
    snr_form: SNRForm = Field("velocity", description=SNR_FORM)
    lora: LoraConfig | None = Field(
        None,
        description="Train only low-rank changes of the layers, and merge them afterwards; unset: train all weights.",
    )

    deltas: DeltaConfig | None = Field(
        None,
        description="With shared_backbone: each expert adds its own low-rank changes, and changes of biases and norms, "
        "to the shared weights; unset: none.",
    )

    @model_validator(mode="after")
    def _excludes(self) -> FineTuneConfig:
        if self.deltas is not None and not self.shared_backbone:
            raise UserError("fine_tune.deltas needs fine_tune.shared_backbone=true: they change shared weights")
        if self.lora is not None and self.shared_backbone:
            raise UserError("fine_tune.lora and fine_tune.shared_backbone exclude each other: remove one of them")
        return self

    def dense_passes(self, ratio: float) -> float:
        """Return the cost of training on one sample, in forward passes of the dense model.

        A backward pass counts as two forward passes of the student, or as one if the weights are frozen. Gradient
        checkpointing adds one, and the teacher adds one of the dense model. The low-rank changes of `lora`, a few
        percent of a layer's MACs, are not counted. ratio: the student's MACs as a fraction of the dense model's.
        """
        passes = (2 if self.lora is not None else 3) + self.gradient_checkpointing
        return passes * ratio + (self.distillation_weight > 0)


@dataclass
class FineTuningObjective:
    """Denoising and distillation of one student on the pairs that it will serve."""

    student: ModelMixin
    teacher: ModelMixin
    process: NoiseProcess
    data: EncodedData
    pairs: Tensor  # (P_i,) indices of pairs
    config: FineTuneConfig
    seed: int
    device: torch.device

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Return the student, by the name that checkpoints give it."""
        return {"student": self.student}

    def batch(self, step: int) -> NoisePlan:
        """Draw a step's pairs, timesteps and noise."""
        sizes = (self.config.batch_size, len(self.pairs), tuple(self.data.latents.shape[1:]), self.process)
        return NoisePlan.draw(step, self.seed, *sizes, sampled=self.data.deviations is not None)

    def shared_loss(self, batch: NoisePlan) -> dict[str, Tensor]:
        """Return no terms: none of them needs the whole batch."""
        return {}

    def micro_loss(self, batch: NoisePlan, positions: Tensor) -> dict[str, Tensor]:
        """Return the terms of Eq. 30, summed over `positions` and divided by the batch size."""
        return self.terms(self.student, batch, positions)

    def terms(self, student: ModelMixin, batch: NoisePlan, positions: Tensor) -> dict[str, Tensor]:
        """Return the terms of `micro_loss` for a given student."""
        pairs = self.pairs[batch.indices[positions]]
        latents = to_device(self.data.draw_latents(pairs, batch.posterior_at(positions)), self.device)
        dropped = batch.drop[positions] < self.config.caption_dropout
        conditions = self.data.conditions(pairs, self.device, dropped)
        noise, timesteps = (to_device(values[positions], self.device) for values in (batch.noise, batch.timesteps))
        noisy = self.process.noised(latents, noise, timesteps)
        call = denoiser_of(student).call(noisy, timesteps, conditions)
        weight, size = self.config.distillation_weight, self.config.batch_size
        which: FeatureBlocks = self.config.feature_blocks if weight else "none"
        kernel = attention_kernel(student, noisy, self.config.gradient_checkpointing)
        with kernel, block_outputs(student, which) as blocks:
            prediction = predict(student, call)
        drawn = (latents, noise, timesteps)
        denoising = denoising_errors(prediction, self.process, *drawn, self.config.snr_gamma, self.config.snr_form)
        terms = {"denoising": self.config.denoising_weight * denoising.sum() / size}
        if weight:
            kernel = attention_kernel(self.teacher, noisy)
            with kernel, torch.no_grad(), block_outputs(self.teacher, which) as teacher_blocks:
                teacher = predict(self.teacher, call)
            error = distillation_error(prediction, teacher, blocks, teacher_blocks, self.config.feature_scale)
            terms["distillation"] = weight * error.sum() / size
        return terms


def fine_tune(
    student: ModelMixin,
    teacher: ModelMixin,
    data: EncodedData,
    config: FineTuneConfig,
    directory: Path,
    *,
    scheduler: Any,
    pairs: Tensor | None = None,
    seed: int = 0,
    title: str = "fine-tune",
    log: Log | None = None,
    milestones: Mapping[int, Callable[[], None]] | None = None,
    objective: Callable[..., FineTuningObjective] = FineTuningObjective,
    offload_teacher: bool = False,
) -> dict[str, float]:
    """Train a sliced denoiser in place (Eq. 30); resume an interrupted call from `directory`.

    Args:
        student: the sliced denoiser, float32; with low-rank changes, its frozen weights may be lowered
            (`training.memory.lower`).
        teacher: the dense model, which is not changed.
        data: the encoded pairs.
        config: settings of the training and of the losses.
        directory: folder of the checkpoints.
        scheduler: scheduler of the pipeline, which defines the noise process.
        pairs: indices (P_i,) of the training pairs that this student serves; all training pairs by default.
        seed: seed of the order of pairs and of the noise.
        title: title of the training in the log and the progress line.
        log: function that takes each row of the log.
        milestones: functions by step, called after that step with the current (averaged) weights in the student.
        objective: class of the losses; for a backbone of several experts partial(BackboneObjective, mixture=...), where
            the student is a dense model that is sliced afterwards.
        offload_teacher: keep the teacher's weights in host memory, and copy each layer's weights to the device while
            that layer runs.

    Returns:
        The trainer's figures: steps, seconds, loss and its terms.

    Raises:
        UserError: no training pairs, or a student with lowered weights without `config.lora`.

    """
    pairs = data.training_pairs() if pairs is None else pairs
    if not len(pairs):
        raise UserError(f"{title}: there are no training pairs")
    if is_lowered(student) and config.lora is None:
        raise UserError(f"{title}: weights in bfloat16 can change only by fine_tune.lora; train float32 weights")
    device = student.device
    student.train().requires_grad_(True)
    if config.lora is not None:
        attach(student, config.lora, seed)
        milestones = {step: partial(_merged, student, call) for step, call in (milestones or {}).items()}
    process = denoiser_of(student).family.process(scheduler)
    inputs = (student, teacher, process, data, pairs, config, seed, device)
    with ExitStack() as stack:
        stack.enter_context(preserved(teacher))
        stack.enter_context(held(config, student, teacher.eval().requires_grad_(False)))
        if offload_teacher:
            stack.enter_context(offloaded(teacher, device))
        student_objective = objective(*inputs)
        figures = Trainer(_trained(config), student_objective, directory, title, log, milestones).fit()
    if config.lora is not None:
        merge(student)
    student.eval().requires_grad_(False)
    return figures


def _trained(config: FineTuneConfig) -> FineTuneConfig:
    """Return the settings, with the learning rate of `lora` if it sets one."""
    rate = None if config.lora is None else config.lora.learning_rate
    return config if rate is None else config.model_copy(update={"learning_rate": rate})


def _merged(student: ModelMixin, call: Callable[[], None]) -> None:
    with merged(student):
        call()
