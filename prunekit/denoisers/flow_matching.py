"""Flow matching, and what transformers' pipelines do alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prunekit.core.family import Guided
from prunekit.core.timesteps import middle_shift

STEPS = 1000  # of a schedule, where none is given
MASKED = (  # what pipelines call texts with masks
    "prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
)
DRAW_MEAN, DRAW_STD = 0.0, 1.0  # of the logit of a training sigma, before the shift


class FlowMatching:
    """A straight path from data to noise, x = (1 - σ)·x₀ + σ·ε, along which the model predicts ε - x₀.

    A timestep is 1000·σ, floating point. Training draws the logit of σ from a normal distribution, then shifts σ to the
    noise as the sampler does, σ' = s·σ/(1 + (s - 1)·σ) (Esser et al., 2024, Eq. 19 and 23).

    scheduler: a FlowMatchEulerDiscreteScheduler, or another one of flow matching, which says the shift; None: 1. A
        shift that depends on the picture's size is taken at the middle of its range.
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
        """Return latents at the timesteps, (B, C, h, w)."""
        sigmas = (timesteps.to(latents) / self.num_timesteps).view(-1, *[1] * (latents.dim() - 1))
        return torch.lerp(latents, noise, sigmas)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the denoiser should predict, (B, C, h, w): the direction from data to noise."""
        return noise - latents

    def weights(self, timesteps: Tensor, gamma: float, form: str) -> Tensor:
        """Return ones, (B,): the draw of timesteps is the weighting."""
        return torch.ones_like(timesteps, dtype=torch.float32)


def frame_moments(autoencoder: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of pictures' latents by an autoencoder of videos: a picture is one frame.

    pixels: (n, 3, H, W) from -1 to 1. The latents are (n, C, h, w), normalised channel by channel.
    """
    config = autoencoder.config
    posterior = autoencoder.encode(pixels.unsqueeze(2)).latent_dist
    mean, deviation = (
        torch.tensor(values, device=pixels.device, dtype=pixels.dtype).view(1, -1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    return (posterior.mean.squeeze(2) - mean) / deviation, posterior.std.squeeze(2) / deviation


def frame_reconstructed(autoencoder: Any, pixels: Tensor) -> Tensor:
    """Return pictures, (n, 3, H, W), encoded and decoded by an autoencoder of videos."""
    decoded: Tensor = autoencoder.decode(autoencoder.encode(pixels.unsqueeze(2)).latent_dist.mean).sample
    return decoded[:, :, 0]


class TransformerFamily(Guided):
    """What the pipelines of these transformers do alike. Methods are `Family`'s."""

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
        """Return the tokens of a text."""
        raise NotImplementedError

    def sizes(self, height: int, width: int) -> Tensor:
        """Return no numbers: the denoiser is not told the picture's size."""
        return torch.zeros(0)


class AsAsked(Guided):
    """The part of a `Family` whose pipelines would draw a picture in a usual size near the requested one."""

    def call_options(self, pipeline: Any, guidance: float) -> dict[str, Any]:
        """Return the guidance scale, and that the size is the requested one."""
        return {**super().call_options(pipeline, guidance), "use_resolution_binning": False}


def unfitting(pipeline: Any, kind: Any, latent_channels: str = "latent_channels") -> str | None:
    """Return why a pipeline's autoencoder or latents are not supported, as "NAME has" goes on; None where they are.

    kind: the class of autoencoder that is supported. latent_channels: what its config calls the latents' channels.
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
    """Return the keyword arguments that take the place of texts, for a pipeline whose texts have masks."""
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
    """Return a call's embeddings with no negative text beside them, where the pipeline has one by default."""
    return {"negative_prompt": None, **embeddings}


class FlowFamily(TransformerFamily):
    """Of models that are trained by flow matching."""

    def refusal(self, pipeline: Any) -> str | None:
        """Return why a pipeline is not supported, as "NAME has" goes on."""
        scheduler = pipeline.scheduler.config
        if "shift" not in scheduler and not scheduler.get("use_flow_sigmas"):
            return f"a {type(pipeline.scheduler).__name__}, which is not a flow-matching scheduler: not supported"
        return None

    def process(self, scheduler: Any | None) -> FlowMatching:
        """Return the training-time process of a pipeline's scheduler."""
        return FlowMatching(scheduler)
