"""Calibration samples for the methods that measure: batches of noised latents, equal for any number of processes.

The picture, caption and noise of sample i depend only on the seed and i. Its timestep, if none is given, depends on i
and the number of samples. A batch is a run of consecutive samples, and processes take batches in turn.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from prunekit.core.call import Call, predict
from prunekit.core.registry import denoiser_in, denoiser_of, is_denoiser, process_of
from prunekit.data.encoded import EncodedData, encode
from prunekit.data.images import CaptionedImages
from prunekit.models import resolution_of
from prunekit.runtime.errors import UserError
from prunekit.runtime.randomness import generator

PROBE_SIDE = 32  # largest side of random latents, to limit their cost
PROBE_TEXT_LENGTH = 77
PIXELS = 8  # per latent position along a side, for random inputs
TimestepWeights = Literal["uniform", "noise", "logarithmic"]
TIMESTEP_WEIGHTS = (
    "Weight of a sample by its timestep. uniform: 1; noise: 1 - alpha_bar; logarithmic: from 0.8 without noise "
    "to 1.2 (OBS-Diff)."
)
LOG_STEPS = 25  # sampling steps over which OBS-Diff's weights rise
ROW_TOKENS = 8192  # most latent positions per forward pass of measurements without gradients


@dataclass(frozen=True)
class CalibrationBatch:
    """Some calibration samples, on the denoiser's device and in its dtype."""

    index: int  # of the batch among all batches
    call: Call  # inputs of the denoiser
    latents: Tensor  # (B, C, h, w): clean
    noise: Tensor  # (B, C, h, w)
    timesteps: Tensor  # (B,)

    def __len__(self) -> int:
        return len(self.latents)


def as_encoded(pipeline: Any, dataset: EncodedData | CaptionedImages) -> EncodedData:
    """Return encoded data unchanged; encode captioned images with the pipeline and the embedded prompt encoder.

    Raises:
        ValueError: data of another kind, or images with a denoiser alone, which cannot encode them.

    """
    if isinstance(dataset, EncodedData):
        return dataset
    if not isinstance(dataset, CaptionedImages):
        raise UserError(f"data is EncodedData or CaptionedImages; got {type(dataset).__name__}")
    if is_denoiser(pipeline):
        raise UserError("a UNet alone cannot encode images; pass the whole pipeline, or EncodedData")
    from prunekit.data.prompt_encoder import load_prompt_encoder

    return encode(pipeline, dataset, load_prompt_encoder("emoji"), resolution_of(pipeline))


def calibration_batches(
    pipeline: DiffusionPipeline | ModelMixin,
    data: EncodedData | None,
    count: int,
    batch_size: int,
    seed: int,
    timestep: int | None = None,
    share: tuple[int, int] = (0, 1),
    span: tuple[float, float] = (0.0, 1.0),
) -> Iterator[CalibrationBatch]:
    """Yield `count` calibration samples in batches of `batch_size` (the last may be smaller).

    Args:
        pipeline: a pipeline, whose scheduler adds the noise; or its denoiser, with the usual noise of its family.
        data: source of the training pairs, which are drawn without repetition. None: Gaussian latents of the model's
            size (no side above 32) and Gaussian text states.
        count: number of samples in all batches together.
        batch_size: samples per batch.
        seed: seed of the draws.
        timestep: timestep of all samples; None: sample i has the middle of the i-th of `count` equal parts of `span`.
        share: (index, number) of processes: only batches index, index + number, … are made.
        span: start and end of the part of the schedule from which timesteps come, as fractions of the schedule.

    Raises:
        ValueError: more samples than there are training pairs, before the first batch.

    """
    model, process = denoiser_in(pipeline), process_of(pipeline)
    denoiser = denoiser_of(model)
    pairs = None if data is None else _draw_pairs(data, count, seed)
    starts = range(share[0] * batch_size, count, share[1] * batch_size)

    def batch(start: int) -> CalibrationBatch:
        samples = range(start, min(start + batch_size, count))
        if timestep is None:
            low, high = (math.floor(part * process.num_timesteps) for part in span)
            timesteps = torch.tensor([low + (2 * i + 1) * (high - low) // (2 * count) for i in samples])
        else:
            timesteps = torch.full((len(samples),), timestep)
        if data is None or pairs is None:
            call = _random_call(model, seed, samples)
            latents = denoiser.noisy(call)
        else:
            chosen = pairs[samples.start : samples.stop]
            latents = data.latents[data.image_index[chosen]]
            call = denoiser.call(latents, timesteps, data.conditions(chosen))
        noise = _normal(seed, "noise", samples, tuple(latents.shape[1:]))
        call = denoiser.at(call, process.noised(latents, noise, timesteps), timesteps)
        latents, noise = (values.to(model.device, model.dtype) for values in (latents, noise))
        return CalibrationBatch(start // batch_size, call.to(model), latents, noise, timesteps.to(model.device))

    return (batch(start) for start in starts)


def num_probes(pipeline: DiffusionPipeline | ModelMixin, data: EncodedData | None) -> int:
    """Return the number of calibration samples in one forward pass without gradients."""
    sides = _probe_sides(denoiser_in(pipeline)) if data is None else data.latents.shape[-2:]
    return max(1, ROW_TOKENS // (sides[0] * sides[1]))


@contextmanager
def evaluation_mode(model: ModelMixin) -> Iterator[None]:
    """Switch every module to evaluation mode inside the context; on exit restore the mode of each module."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def sample_weights(kind: TimestepWeights, pipeline: DiffusionPipeline | ModelMixin, timesteps: Tensor) -> Tensor:
    """Return the weight of each sample by its timestep (n,), float32; see `TIMESTEP_WEIGHTS`."""
    ones = torch.ones(len(timesteps), 1, 1, 1, device=timesteps.device)
    if kind == "uniform":
        return ones.flatten()
    process = process_of(pipeline)
    if kind == "noise":
        return process.noised(torch.zeros_like(ones), ones, timesteps).square().flatten()
    place = timesteps.float() / process.num_timesteps * LOG_STEPS  # position among LOG_STEPS steps, the noisiest last
    return 0.8 + 0.4 * (1 + place).log() / math.log(LOG_STEPS)


def layer_values(model: nn.Module, paths: Sequence[str], call: Call) -> dict[str, tuple[Tensor, Tensor]]:
    """Run a model until all layers at `paths` have run; return the input and output of each layer."""
    values: dict[str, tuple[Tensor, Tensor]] = {}
    with ExitStack() as stack:
        for path in paths:

            def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor, path: str = path) -> None:
                values[path] = (arguments[0], output)
                if len(values) == len(paths):
                    raise _ReachedError

            handle = model.get_submodule(path).register_forward_hook(hook)
            stack.callback(handle.remove)
        with suppress(_ReachedError):
            predict(model, call)
    return values


class _ReachedError(Exception):
    """Ends a forward pass once all requested layers have run."""


def _draw_pairs(data: EncodedData, count: int, seed: int) -> Tensor:
    pairs = data.training_pairs()
    if count > len(pairs):
        raise UserError(
            f"the data is smaller than the calibration set: samples={count}, but there are {len(pairs)} "
            f"training pairs; set samples to {len(pairs)} or fewer"
        )
    return pairs[torch.randperm(len(pairs), generator=generator(seed, "calibration", "pairs"))[:count]]


def _normal(seed: int, purpose: str, samples: range, shape: tuple[int, ...]) -> Tensor:
    """Return Gaussian values (len(samples), *shape); every sample has its own random stream."""
    return torch.stack([torch.randn(shape, generator=generator(seed, "calibration", purpose, i)) for i in samples])


def _probe_sides(model: ModelMixin) -> tuple[int, int]:
    sides = denoiser_of(model).latent_size(model) or (PROBE_SIDE, PROBE_SIDE)
    return min(sides[0], PROBE_SIDE), min(sides[1], PROBE_SIDE)


def _random_call(model: ModelMixin, seed: int, samples: range) -> Call:
    """Return a call of clean Gaussian latents and conditions; every sample has its own random streams."""
    denoiser, sides = denoiser_of(model), _probe_sides(model)

    def fill(name: str, shape: tuple[int, ...]) -> Tensor:
        if name == "sizes":
            height, width = (PIXELS * side for side in sides)
            return denoiser.family.sizes(height, width).expand(shape)
        return _normal(seed, "latents" if name == "noisy" else name, samples, shape[1:])

    return denoiser.example(model, len(samples), sides, PROBE_TEXT_LENGTH, fill)
