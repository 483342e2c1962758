"""The pipeline of CogView4: its noise process, latents and conditions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from prunekit.denoisers.flow_matching import FlowFamily, FlowMatching

TOKENS = 224  # of an encoded text: the length that the pipeline's documentation names, a multiple of 16
EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds")
USUAL = MappingProxyType({"use_dynamic_shifting": True, "time_shift_type": "linear"})  # of CogView4's own scheduler
PATCH = 4  # positions of a latent in one token
IMAGE_TOKENS = 4096  # of a picture of 1,024 pixels


class CogView4Flow(FlowMatching):
    """Flow matching whose model reads the timestep before the shift.

    The pipeline shifts the noise level by the size of the picture but gives the model the timesteps of a uniform
    schedule: at timestep t the noise level is σ = s·τ/(1 + (s - 1)·τ), where τ = t/1000.
    """

    def __init__(self, scheduler: Any | None = None):
        super().__init__(scheduler)
        self.config: Mapping[str, Any] = USUAL if scheduler is None else scheduler.config
        self.fixed, self.shift = self.shift, 1.0  # timesteps are drawn without a shift

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return latents at the timesteps, (B, C, h, w); the shift is that of a picture of h x w latent positions."""
        height, width = latents.shape[-2:]
        shift = self.size_shift(height * width // PATCH or IMAGE_TOKENS)  # a probe of one position has no size
        times = timesteps.to(latents) / self.num_timesteps
        return super().noised(latents, noise, self.num_timesteps * shift * times / (1 + (shift - 1) * times))

    def size_shift(self, tokens: int) -> float:
        """Return the shift of a picture of so many tokens, as `pipeline_cogview4.calculate_shift` computes it."""
        if not self.config.get("use_dynamic_shifting"):
            return self.fixed
        base, most = self.config.get("base_shift", 0.25), self.config.get("max_shift", 0.75)
        mu = (tokens / self.config.get("base_image_seq_len", 256)) ** 0.5 * most + base
        return float(mu if self.config.get("time_shift_type") == "linear" else math.exp(mu))


class CogView4Family(FlowFamily):
    """What `CogView4Pipeline` does around its transformer. Methods are `Family`'s.

    The pipeline fills a batch of texts up to its longest one, then to a multiple of 16, with padding on the left that
    the model reads like other tokens.
    """

    def refusal(self, pipeline: Any) -> str | None:
        """Return why a pipeline is not supported, as "NAME has" goes on: its autoencoder, latents or scheduler."""
        vae, channels = pipeline.vae, pipeline.transformer.config.in_channels
        if type(vae) is not AutoencoderKL:
            return f"an autoencoder {type(vae).__name__}, which is not supported"
        if vae.config.latent_channels != channels:
            return (
                f"latents of {vae.config.latent_channels} channels, but its transformer takes {channels}: not supported"
            )
        return super().refusal(pipeline)

    def process(self, scheduler: Any | None) -> CogView4Flow:
        """Return the training-time process of a pipeline's scheduler; of None, that of CogView4's own."""
        return CogView4Flow(scheduler)

    def states(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        """Return the texts' states "text" (n, 224, E), as the pipeline gives them beside a text of 224 tokens.

        T is the same for all texts, so that they can be cached. Longer texts are cut.
        """
        settings = {"padding": "max_length", "max_length": TOKENS, "truncation": True, "return_tensors": "pt"}
        tokens = pipeline.tokenizer(texts, **settings).input_ids
        encoder = pipeline.text_encoder
        text = encoder(tokens.to(pipeline.vae.device), output_hidden_states=True).hidden_states[-2]
        return {"text": text}

    def embeddings(
        self, pipeline: Any, texts: list[str], negatives: list[str] | None, guided: bool, **options: Any
    ) -> dict[str, Tensor]:
        """Return a pipeline's keyword arguments that take the place of its texts."""
        encoded = pipeline.encode_prompt(texts, negatives, guided, device=pipeline._execution_device, **options)
        return {name: value for name, value in zip(EMBEDDINGS, encoded, strict=True) if value is not None}

    def text_length(self, lengths: Mapping[str, int]) -> int:
        """Return the tokens of a text, to which `states` fills it up."""
        return TOKENS

    def sizes(self, height: int, width: int) -> Tensor:
        """Return original size, crop and target size of uncropped pictures, (6,)."""
        return torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)

    def call_batch(self, pictures: int, guided: bool) -> int:
        """Return the samples of one transformer call: guidance calls the model once for each text."""
        return pictures
