"""The denoising objective: noise a latent, and predict what the scheduler asks for."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import DDPMScheduler, SchedulerMixin, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.training_utils import compute_snr
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from prunekit.errors import UserError
from prunekit.randomness import epoch_indices, generator

SNRForm = Literal["velocity", "published"]
SNR_GAMMA = "min-SNR weights of the denoising error (Hang et al., 2023); 5 is usual, unset: all weights are 1"
SNR_FORM = (  # the setting's description
    "form of the min-SNR weight of a velocity, with snr_gamma set. velocity: min(SNR, gamma)/(SNR + 1), of the min-SNR "
    "paper and current diffusers; published: min(SNR + 1, gamma)/(SNR + 1), of APTP's published code, which weights "
    "the noisiest timesteps by 1. For a noise prediction both are min(SNR, gamma)/SNR"
)
SHORT_ATTENTION = 256  # tokens up to which plain matrix products train faster on a CPU than its flash kernel


def forward_process(scheduler: SchedulerMixin) -> DDPMScheduler:
    """Return the training-time scheduler of any pipeline's scheduler (same betas, same prediction type)."""
    return DDPMScheduler.from_config(scheduler.config, clip_sample=False)


def target(scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return what the UNet should predict, (B, C, h, w): the noise, or the velocity (Salimans & Ho, 2022).

    Raises ValueError for a prediction type other than epsilon and v_prediction.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    raise UserError(f"prediction type {kind!r} is not supported; supported: epsilon, v_prediction")


def shift_timesteps(timesteps: Tensor, shift: float, num_timesteps: int) -> Tensor:
    """Move timesteps towards the noisy end, T·s·t/(T + (s - 1)·t) (Esser et al., 2024, Eq. 23); 1 changes nothing."""
    shifted = num_timesteps * shift * timesteps / (num_timesteps + (shift - 1) * timesteps)
    return shifted.long().clamp(max=num_timesteps - 1)


def denoising_errors(
    prediction: Tensor,
    scheduler: DDPMScheduler,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    snr_gamma: float | None = None,
    snr_form: SNRForm = "velocity",
) -> Tensor:
    """Return each sample's denoising error, (B,), float32: of the noise or the velocity, as the scheduler asks.

    snr_gamma: multiplies each error by its min-SNR weight (`snr_weights`). snr_form: form of that weight.
    """
    errors = per_sample_mse(prediction, target(scheduler, latents, noise, timesteps))
    if snr_gamma is None:
        return errors
    return errors * snr_weights(scheduler, timesteps, snr_gamma, snr_form)


def snr_weights(scheduler: DDPMScheduler, timesteps: Tensor, gamma: float, form: SNRForm = "velocity") -> Tensor:
    """Return the min-SNR weight of each timestep, (B,) (Hang et al., 2023).

    A noise prediction has min(SNR, gamma)/SNR in both forms. A velocity prediction has, by form:

    - "velocity": min(SNR, gamma)/(SNR + 1) (the min-SNR paper; current diffusers). It counts the error of the clean
      latent alike at all noisy timesteps, so the weight falls to 0 with the SNR.
    - "published": min(SNR + 1, gamma)/(SNR + 1) (APTP's published code, from an older example of diffusers). The weight
      is 1 wherever SNR + 1 is below gamma.
    """
    snr = compute_snr(scheduler, timesteps)  # (B,)
    if scheduler.config.prediction_type != "v_prediction":
        return snr.clamp(max=gamma) / snr
    limited = snr if form == "velocity" else snr + 1
    return limited.clamp(max=gamma) / (snr + 1)


@contextmanager
def attention_kernel(unet: UNet2DConditionModel, latents: Tensor, recomputed: bool = False) -> Iterator[None]:
    """Run a UNet's passes within as a training step runs them fastest, by the UNet's input (B, C, h, w).

    For few tokens on a CPU, attention is plain matrix products in the precision that it is called in. There (8x8
    latents, heads of 16 channels, bfloat16) they are 4 times as fast as torch's own, which computes in float32, and 14
    times as fast as its flash kernel with the backward pass; for many tokens flash is faster. Results agree to
    rounding.
    recomputed: activations are made anew in the backward pass, outside of this context, where another kernel would not
    fit what the first one saved; then the choice is torch's.
    """
    few = latents.shape[-2] * latents.shape[-1] <= SHORT_ATTENTION
    if not few or latents.device.type != "cpu" or recomputed:
        yield
        return
    own = [m for m in unet.modules() if isinstance(m, Attention) and type(m.processor) is AttnProcessor2_0]
    before = [module.processor for module in own]
    plain = AttnProcessor()
    for module in own:
        module.processor = plain
    try:
        with sdpa_kernel(SDPBackend.MATH):  # of other networks
            yield
    finally:
        for module, processor in zip(own, before, strict=True):
            module.processor = processor


@dataclass(frozen=True)
class NoisePlan:
    """What step `step` draws for its global batch: a function of (seed, step) and position alone."""

    indices: Tensor  # (B,) into the training items
    timesteps: Tensor  # (B,)
    noise: Tensor  # (B, C, h, w)
    choice: Tensor  # (B,) uniform in [0, 1): a caption's choice
    drop: Tensor  # (B,) uniform in [0, 1): caption dropout
    posterior: Tensor | None = None  # (B, C, h, w): what latents that are kept as moments are sampled with

    @classmethod
    def draw(
        cls,
        step: int,
        seed: int,
        batch_size: int,
        num_items: int,
        latent_shape: tuple[int, ...],
        num_timesteps: int,
        sampled: bool = False,
    ) -> "NoisePlan":
        """Draw the plan of a step; latent_shape is (C, h, w). sampled: `posterior` too, from a stream of its own."""
        source = generator(seed, "noise", step)
        return cls(
            indices=epoch_indices(num_items, batch_size, seed, step),
            timesteps=torch.randint(num_timesteps, (batch_size,), generator=source),
            noise=torch.randn(batch_size, *latent_shape, generator=source),
            choice=torch.rand(batch_size, generator=source),
            drop=torch.rand(batch_size, generator=source),
            posterior=torch.randn(batch_size, *latent_shape, generator=generator(seed, "posterior", step))
            if sampled
            else None,
        )

    def posterior_at(self, positions: Tensor) -> Tensor | None:
        """Return what the latents of some positions (n,) are sampled with, (n, C, h, w), or None."""
        return None if self.posterior is None else self.posterior[positions]


def per_sample_mse(prediction: Tensor, reference: Tensor) -> Tensor:
    """Return the mean squared error of each sample, (B,), in float32."""
    return (prediction.float() - reference.float()).square().flatten(1).mean(1)
