"""Stable Diffusion 1.x, 2.x and XL: the noise process, the latents and the conditions of their pipelines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from prunekit.core.family import Guided
from prunekit.runtime.errors import UserError

PREDICTIONS = ("epsilon", "v_prediction")
EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
CLIP_TOKENS = 77  # tokens of a text
NOISE_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class DDPM:
    """Diffusion in discrete steps (Ho et al., 2020), with a prediction of the noise or of the velocity.

    scheduler: gives the betas and the prediction type.
    """

    def __init__(self, scheduler: DDPMScheduler):
        self.scheduler = scheduler
        self.num_timesteps: int = scheduler.config.num_train_timesteps

    @property
    def prediction_type(self) -> str:
        """The prediction type: "epsilon" (noise) or "v_prediction" (velocity)."""
        return self.scheduler.config.prediction_type

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw timesteps (count,), int64, uniformly."""
        return torch.randint(self.num_timesteps, (count,), generator=generator)

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the latents noised to the timesteps, (B, C, h, w)."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the prediction target, (B, C, h, w): the noise, or the velocity (Salimans & Ho, 2022).

        Raises:
            UserError: a prediction type other than epsilon and v_prediction.

        """
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timesteps)
        raise UserError(
            f"prediction type {self.prediction_type!r} is not supported; supported: {', '.join(PREDICTIONS)}"
        )

    def weights(self, timesteps: Tensor, gamma: float, form: str) -> Tensor:
        """Return the min-SNR weight of each timestep, (B,) (Hang et al., 2023).

        For noise prediction, the weight is min(SNR, gamma)/SNR in both forms. For velocity prediction, by form:

        - "velocity": min(SNR, gamma)/(SNR + 1) (the min-SNR paper; current diffusers). Where SNR is below gamma, it
          weights the noise error equally at all timesteps, so the weight falls to 0 with the SNR.
        - "published": min(SNR + 1, gamma)/(SNR + 1) (APTP's published code, from an older example of diffusers). The
          weight is 1 wherever SNR + 1 is below gamma.
        """
        snr = compute_snr(self.scheduler, timesteps)  # (B,)
        if self.prediction_type != "v_prediction":
            return snr.clamp(max=gamma) / snr
        limited = snr if form == "velocity" else snr + 1
        return limited.clamp(max=gamma) / (snr + 1)


class StableDiffusion(Guided):
    """The family of Stable Diffusion 1.x, 2.x and XL; the protocol `Family` documents the methods."""

    def refusal(self, pipeline: Any) -> str | None:
        """Return why a pipeline is not supported, worded to follow "NAME has"; None if it is supported."""
        unet, vae, scheduler = pipeline.unet.config, pipeline.vae, pipeline.scheduler.config
        if type(vae) is not AutoencoderKL:
            return f"an autoencoder {type(vae).__name__}, which is not supported"
        for key in ("latents_mean", "latents_std", "shift_factor"):
            if vae.config.get(key) is not None:
                return f"an autoencoder with {key}, which is not supported"
        channels = (vae.config.latent_channels, unet.in_channels, unet.out_channels)
        if len(set(channels)) != 1:
            return (
                f"latents of {channels[0]} channels, but its UNet takes {channels[1]} and gives {channels[2]}, as "
                "models for inpainting have: not supported"
            )
        if "beta_schedule" not in scheduler or scheduler.get("prediction_type") not in PREDICTIONS:
            kind = f"{type(pipeline.scheduler).__name__} with prediction type {scheduler.get('prediction_type')!r}"
            return f"a {kind}, which is not supported"
        return None

    def process(self, scheduler: Any | None) -> DDPM:
        """Return the noise process for training: DDPM with the scheduler's betas and prediction type.

        None gives Stable Diffusion's betas and the prediction type "epsilon", which may not be the UNet's.
        """
        if scheduler is None:
            return DDPM(DDPMScheduler(**NOISE_SCHEDULE, clip_sample=False))
        return DDPM(DDPMScheduler.from_config(scheduler.config, clip_sample=False))

    def moments(self, autoencoder: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of pictures' latents, (n, C, h, w) each, scaled as the UNet takes them."""
        posterior = autoencoder.encode(pixels).latent_dist
        scale = autoencoder.config.scaling_factor
        return posterior.mean * scale, posterior.std * scale

    def states(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        """Return the texts' states: "text" (n, T, E), and for XL "pooled" (n, P)."""
        options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        encoded = pipeline.encode_prompt(texts, device=pipeline._execution_device, **options)
        if len(encoded) <= 2:
            return {"text": encoded[0]}
        return {"text": encoded[0], "pooled": encoded[2]}  # XL encodes to states, none, pooled, none

    def null_states(self, pipeline: Any) -> dict[str, Tensor]:
        """Return the states of the empty text, (1, …); zeros if an XL pipeline has `force_zeros_for_empty_prompt`."""
        states = self.states(pipeline, [""])
        zero = "pooled" in states and pipeline.config.get("force_zeros_for_empty_prompt")
        return {name: torch.zeros_like(value) for name, value in states.items()} if zero else states

    def embeddings(
        self, pipeline: Any, texts: list[str], negatives: list[str] | None, guided: bool, **options: Any
    ) -> dict[str, Tensor]:
        """Return the text embeddings that replace the texts in a pipeline's call, as keyword arguments."""
        encoded = pipeline.encode_prompt(
            prompt=texts,
            device=pipeline._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
            negative_prompt=negatives if guided else None,
            **options,
        )
        return {name: value for name, value in zip(EMBEDDINGS, encoded, strict=False) if value is not None}

    def text_length(self, lengths: Mapping[str, int]) -> int:
        """Return the number of CLIP tokens of a text."""
        return lengths.get("tokenizer", CLIP_TOKENS)

    def sizes(self, height: int, width: int) -> Tensor:
        """Return XL's time ids, (6,): original size, crop and target size of uncropped pictures."""
        return torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)
