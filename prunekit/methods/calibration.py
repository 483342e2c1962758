"""The inputs on which a score method measures: fixed batches of noised latents, the same for any number of processes.

What sample i is depends on the seed and i alone: its picture, its caption, its noise and, where no timestep is given,
its timestep. A batch is a run of neighbouring samples; processes take batches in turn.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from prunekit.data.encoded import EncodedData, encode
from prunekit.data.images import CaptionedImages
from prunekit.errors import UserError
from prunekit.methods.base import unet_of
from prunekit.models import resolution_of
from prunekit.randomness import generator
from prunekit.timing import text_width
from prunekit.training.diffusion import forward_process

PROBE_SIDE = 32  # random latents are no larger than this, for their cost
PROBE_TEXT_LENGTH = 77
ROW_TOKENS = 8192  # latent positions that run through the UNet at once while it is measured without gradients


@dataclass(frozen=True)
class CalibrationBatch:
    """Some calibration samples, on the UNet's device and in its dtype."""

    index: int  # of the batch among all batches
    noisy: Tensor  # (B, C, h, w): what the UNet gets
    timesteps: Tensor  # (B,) int64
    latents: Tensor  # (B, C, h, w): clean
    noise: Tensor  # (B, C, h, w)
    conditions: dict[str, Any]  # the UNet's keyword arguments

    def __len__(self) -> int:
        return len(self.noisy)


def as_encoded(pipeline: Any, dataset: EncodedData | CaptionedImages) -> EncodedData:
    """Return encoded data as it is; captioned images encoded with the pipeline and the embedded prompt encoder.

    Raises:
        ValueError: data of another kind, or images where there is only a UNet, which cannot encode them.

    """
    if isinstance(dataset, EncodedData):
        return dataset
    if not isinstance(dataset, CaptionedImages):
        raise UserError(f"data is EncodedData or CaptionedImages; got {type(dataset).__name__}")
    if isinstance(pipeline, UNet2DConditionModel):
        raise UserError("a UNet alone cannot encode images; pass the whole pipeline, or EncodedData")
    from prunekit.data.prompt_encoder import load_prompt_encoder

    return encode(pipeline, dataset, load_prompt_encoder("emoji"), resolution_of(pipeline))


def noise_schedule(pipeline: DiffusionPipeline | UNet2DConditionModel) -> DDPMScheduler:
    """Return the forward process of a pipeline's scheduler; for a UNet alone, Stable Diffusion's betas.

    It noises. What the UNet predicts, noise or velocity, only a pipeline's scheduler tells.
    """
    scheduler = getattr(pipeline, "scheduler", None)
    if scheduler is None:
        return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    return forward_process(scheduler)


def calibration_batches(
    pipeline: DiffusionPipeline | UNet2DConditionModel,
    data: EncodedData | None,
    count: int,
    batch_size: int,
    seed: int,
    timestep: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> Iterator[CalibrationBatch]:
    """Yield `count` calibration samples in batches of `batch_size` (the last may be smaller).

    Args:
        pipeline: a pipeline or its UNet; its scheduler noises the latents (a UNet alone: `noise_schedule`).
        data: training pairs are drawn from it without repetition. None: Gaussian latents of the UNet's sample size (no
            side above 32) and Gaussian text states.
        count: samples of all batches together.
        batch_size: samples of one batch.
        seed: what the draws are keyed by.
        timestep: of all samples; None: sample i has the middle of the i-th of `count` equal parts of the schedule.
        share: (process, processes): only batches process, process + processes, … are made.

    Raises:
        ValueError: more samples than there are training pairs, before the first batch.

    """
    unet, scheduler = unet_of(pipeline), noise_schedule(pipeline)
    pairs = None if data is None else _draw_pairs(data, count, seed)
    num_timesteps = scheduler.config.num_train_timesteps
    starts = range(share[0] * batch_size, count, share[1] * batch_size)

    def batch(start: int) -> CalibrationBatch:
        samples = range(start, min(start + batch_size, count))
        if data is None:
            latents, conditions = _random_inputs(unet, seed, samples)
        else:
            chosen = pairs[samples.start : samples.stop]
            latents, conditions = data.latents[data.image_index[chosen]], data.conditions(chosen)
        noise = _normal(seed, "noise", samples, tuple(latents.shape[1:]))
        if timestep is None:
            timesteps = torch.tensor([(2 * i + 1) * num_timesteps // (2 * count) for i in samples])
        else:
            timesteps = torch.full((len(samples),), timestep)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        parts = (noisy, timesteps, latents, noise, conditions)
        return CalibrationBatch(start // batch_size, *(_to(part, unet) for part in parts))

    return (batch(start) for start in starts)


def num_probes(pipeline: DiffusionPipeline | UNet2DConditionModel, data: EncodedData | None) -> int:
    """How many samples of the calibration data run through the UNet at once without gradients."""
    sides = _probe_sides(unet_of(pipeline)) if data is None else data.latents.shape[-2:]
    return max(1, ROW_TOKENS // (sides[0] * sides[1]))


@contextmanager
def evaluation_mode(unet: UNet2DConditionModel) -> Iterator[None]:
    """Switch every module to evaluation, and back to the mode that each was in."""
    training = [module for module in unet.modules() if module.training]
    unet.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _draw_pairs(data: EncodedData, count: int, seed: int) -> Tensor:
    pairs = data.training_pairs()
    if count > len(pairs):
        raise UserError(
            f"a calibration set smaller than asked: samples={count}, but there are {len(pairs)} training pairs; "
            f"set samples to {len(pairs)} or fewer"
        )
    return pairs[torch.randperm(len(pairs), generator=generator(seed, "calibration", "pairs"))[:count]]


def _normal(seed: int, purpose: str, samples: range, shape: tuple[int, ...]) -> Tensor:
    """Gaussian values (len(samples), *shape), each sample's from its own stream."""
    return torch.stack([torch.randn(shape, generator=generator(seed, "calibration", purpose, i)) for i in samples])


def _probe_sides(unet: UNet2DConditionModel) -> tuple[int, int]:
    size = unet.config.sample_size or PROBE_SIDE
    sides = (size, size) if isinstance(size, int) else size
    return min(sides[0], PROBE_SIDE), min(sides[1], PROBE_SIDE)


def _random_inputs(unet: UNet2DConditionModel, seed: int, samples: range) -> tuple[Tensor, dict[str, Any]]:
    config = unet.config
    latents = _normal(seed, "latents", samples, (config.in_channels, *_probe_sides(unet)))
    text = _normal(seed, "text", samples, (PROBE_TEXT_LENGTH, text_width(unet)))
    conditions: dict[str, Any] = {"encoder_hidden_states": text}
    if config.addition_embed_type == "text_time":  # SDXL: pooled text; original size, crop and target size
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        height, breadth = (8.0 * side for side in _probe_sides(unet))
        time_ids = torch.tensor([height, breadth, 0, 0, height, breadth]).expand(len(samples), -1)
        conditions["added_cond_kwargs"] = {
            "text_embeds": _normal(seed, "pooled", samples, (width,)),
            "time_ids": time_ids,
        }
    return latents, conditions


def _to(value: Any, unet: UNet2DConditionModel) -> Any:
    """Move to the UNet's device, floating point to its dtype."""
    if isinstance(value, dict):
        return {name: _to(part, unet) for name, part in value.items()}
    return value.to(unet.device, unet.dtype if value.is_floating_point() else None)
