"""Flow matching, and the parts that the pipelines of transformer denoisers share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prunekit.core.family import Guided
from prunekit.core.timesteps import middle_shift

STEPS = 1000  # timesteps of the noise process, where no scheduler gives their number
MASKED = (  # names of the pipelines' arguments for text embeddings and their masks
    "prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
)
DRAW_MEAN, DRAW_STD = 0.0, 1.0  # normal distribution of a training sigma's logit, before the shift


class FlowMatching:
    """A straight path from data to noise, x = (1 - σ)·x₀ + σ·ε, along which the model predicts ε - x₀.

    A timestep is 1000·σ, floating point. Training draws the logit of σ from a normal distribution, then shifts σ toward
    noise as the sampler does, σ' = s·σ/(1 + (s - 1)·σ) (Esser et al., 2024, Eq. 19 and 23).

    scheduler: a flow-matching scheduler, such as FlowMatchEulerDiscreteScheduler, whose config gives the shift s. None:
        s = 1. A shift that depends on the picture's size is taken at the middle of its range.
    """

    def __init__(self, scheduler: Any | None = None):
        config = {} if scheduler is None else scheduler.config
        self.num_timesteps: int = config.get("num_train_timesteps", STEPS)
        self.shift = float(config.get("shift") or config.get("flow_shift") or 1.0)
        if config.get("use_dynamic_shifting"):
            self.shift = math.exp(middle_shift(config))

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw timesteps (count,), floating point."""
        logits = torch.randn(count, generator=generator) * DRAW_STD + DRAW_MEAN
        sigmas = torch.sigmoid(logits)
        return self.num_timesteps * self.shift * sigmas / (1 + (self.shift - 1) * sigmas)

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the latents noised to the timesteps, (B, C, h, w)."""
        sigmas = (timesteps.to(latents) / self.num_timesteps).view(-1, *[1] * (latents.dim() - 1))
        return torch.lerp(latents, noise, sigmas)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the prediction target, (B, C, h, w): the direction from data to noise."""
        return noise - latents

    def weights(self, timesteps: Tensor, gamma: float, form: str) -> Tensor:
        """Return ones, (B,), because the distribution of the drawn timesteps is the weighting."""
        return torch.ones_like(timesteps, dtype=torch.float32)


def frame_moments(autoencoder: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of pictures' latents from a video autoencoder; a picture is one frame.

    pixels: (n, 3, H, W) from -1 to 1. The latents are (n, C, h, w), normalized channel by channel.
    """
    config = autoencoder.config
    posterior = autoencoder.encode(pixels.unsqueeze(2)).latent_dist
    mean, deviation = (
        torch.tensor(values, device=pixels.device, dtype=pixels.dtype).view(1, -1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    return (posterior.mean.squeeze(2) - mean) / deviation, posterior.std.squeeze(2) / deviation


def frame_reconstructed(autoencoder: Any, pixels: Tensor) -> Tensor:
    """Return pictures, (n, 3, H, W), encoded and decoded by a video autoencoder."""
    decoded: Tensor = autoencoder.decode(autoencoder.encode(pixels.unsqueeze(2)).latent_dist.mean).sample
    return decoded[:, :, 0]


class TransformerFamily(Guided):
    """The part of a `Family` that transformer pipelines share; `Family` documents the methods."""

    def states(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        """Return the texts' states by role."""
        raise NotImplementedError

    def null_states(self, pipeline: Any) -> dict[str, Tensor]:
        """Return the states of the empty text, (1, …)."""
        return self.states(pipeline, [""])

    def moments(self, autoencoder: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of pictures' latents, (n, C, h, w) each, shifted and scaled."""
        posterior, config = autoencoder.encode(pixels).latent_dist, autoencoder.config
        scale, shift = config.scaling_factor, config.get("shift_factor") or 0.0
        return (posterior.mean - shift) * scale, posterior.std * scale

    def text_length(self, lengths: Mapping[str, int]) -> int:
        """Return the number of tokens of a text."""
        raise NotImplementedError

    def sizes(self, height: int, width: int) -> Tensor:
        """Return an empty tensor, because the denoiser does not take the picture's size."""
        return torch.zeros(0)


class AsAsked(Guided):
    """The part of a `Family` whose pipelines by default round a requested size to a standard one."""

    def call_options(self, pipeline: Any, guidance: float) -> dict[str, Any]:
        """Return the guidance scale, and the option that keeps the requested size."""
        return {**super().call_options(pipeline, guidance), "use_resolution_binning": False}


def unfitting(pipeline: Any, kind: Any, latent_channels: str = "latent_channels") -> str | None:
    """Return why a pipeline's autoencoder or latents are not supported, worded to follow "NAME has"; None if they are.

    kind: supported class of autoencoder. latent_channels: its config's key for the number of latent channels.
    """
    config, vae = pipeline.transformer.config, pipeline.vae
    if type(vae) is not kind:
        return f"an autoencoder {type(vae).__name__}, which is not supported"
    made, taken = vae.config[latent_channels], config.in_channels
    given = config.out_channels or taken
    if made == taken == given:
        return None
    return f"latents of {made} channels, but its transformer takes {taken} and gives {given}: not supported"


def masked_embeddings(
    pipeline: Any, texts: list[str], negatives: list[str] | None, guided: bool, **options: Any
) -> dict[str, Tensor]:
    """Return the text embeddings and masks that replace the texts in a pipeline's call, as keyword arguments."""
    encoded = pipeline.encode_prompt(
        texts,
        do_classifier_free_guidance=guided,
        negative_prompt=negatives if negatives is not None else "",
        device=pipeline._execution_device,
        **options,
    )
    given = {name: value for name, value in zip(MASKED, encoded, strict=True) if value is not None}
    return left_out(given)


def left_out(embeddings: dict[str, Any]) -> dict[str, Any]:
    """Return a call's embeddings with `negative_prompt=None`, which replaces the pipeline's default negative text."""
    return {"negative_prompt": None, **embeddings}


class FlowFamily(TransformerFamily):
    """The part of a `Family` that models trained by flow matching share."""

    def refusal(self, pipeline: Any) -> str | None:
        """Return why a pipeline is not supported, worded to follow "NAME has"; None if it is supported."""
        scheduler = pipeline.scheduler.config
        if "shift" not in scheduler and not scheduler.get("use_flow_sigmas"):
            return f"a {type(pipeline.scheduler).__name__}, which is not a flow-matching scheduler: not supported"
        return None

    def process(self, scheduler: Any | None) -> FlowMatching:
        """Return the noise process for training with a pipeline's scheduler."""
        return FlowMatching(scheduler)
