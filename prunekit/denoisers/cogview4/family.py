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

TOKENS = 224  # tokens of an encoded text: the length that the pipeline's documentation names, a multiple of 16
EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds")
USUAL = MappingProxyType({"use_dynamic_shifting": True, "time_shift_type": "linear"})  # config of CogView4's scheduler
PATCH = 4  # latent positions in one token
IMAGE_TOKENS = 4096  # tokens of a picture of 1,024 x 1,024 pixels


class CogView4Flow(FlowMatching):
    """Flow matching for a model that reads the timestep before the shift.

    The pipeline shifts the noise level by the size of the picture but passes the model the timesteps of a uniform
    schedule. At timestep t the noise level is σ = s·τ/(1 + (s - 1)·τ), where τ = t/1000.
    """

    def __init__(self, scheduler: Any | None = None):
        super().__init__(scheduler)
        self.config: Mapping[str, Any] = USUAL if scheduler is None else scheduler.config
        self.fixed, self.shift = self.shift, 1.0  # timesteps are drawn without a shift

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the latents noised to the timesteps, (B, C, h, w), with the shift for a picture of their size."""
        height, width = latents.shape[-2:]
        shift = self.size_shift(height * width // PATCH or IMAGE_TOKENS)  # a probe of one position has 0 tokens
        times = timesteps.to(latents) / self.num_timesteps
        return super().noised(latents, noise, self.num_timesteps * shift * times / (1 + (shift - 1) * times))

    def size_shift(self, tokens: int) -> float:
        """Return the shift for a picture's number of tokens, as `pipeline_cogview4.calculate_shift` computes it."""
        if not self.config.get("use_dynamic_shifting"):
            return self.fixed
        base, most = self.config.get("base_shift", 0.25), self.config.get("max_shift", 0.75)
        mu = (tokens / self.config.get("base_image_seq_len", 256)) ** 0.5 * most + base
        return float(mu if self.config.get("time_shift_type") == "linear" else math.exp(mu))


class CogView4Family(FlowFamily):
    """The family of `CogView4Pipeline`; the protocol `Family` documents the methods.

    The pipeline pads the texts of a batch on the left, to the longest text and then to a multiple of 16 tokens. The
    model reads the padding like other tokens.
    """

    def refusal(self, pipeline: Any) -> str | None:
        """Return why a pipeline is not supported, worded to follow "NAME has"; None if it is supported."""
        vae, channels = pipeline.vae, pipeline.transformer.config.in_channels
        if type(vae) is not AutoencoderKL:
            return f"an autoencoder {type(vae).__name__}, which is not supported"
        if vae.config.latent_channels != channels:
            return (
                f"latents of {vae.config.latent_channels} channels, but its transformer takes {channels}: not supported"
            )
        return super().refusal(pipeline)

    def process(self, scheduler: Any | None) -> CogView4Flow:
        """Return the noise process for training with a pipeline's scheduler; None means CogView4's scheduler."""
        return CogView4Flow(scheduler)

    def states(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        """Return the texts' states "text" (n, 224, E), as the pipeline encodes them beside a text of 224 tokens.

        All texts have the same length, so that their states can be cached. Longer texts are truncated.
        """
        settings = {"padding": "max_length", "max_length": TOKENS, "truncation": True, "return_tensors": "pt"}
        tokens = pipeline.tokenizer(texts, **settings).input_ids
        encoder = pipeline.text_encoder
        text = encoder(tokens.to(pipeline._execution_device), output_hidden_states=True).hidden_states[-2]
        return {"text": text}

    def embeddings(
        self, pipeline: Any, texts: list[str], negatives: list[str] | None, guided: bool, **options: Any
    ) -> dict[str, Tensor]:
        """Return the text embeddings that replace the texts in a pipeline's call, as keyword arguments."""
        encoded = pipeline.encode_prompt(texts, negatives, guided, device=pipeline._execution_device, **options)
        return {name: value for name, value in zip(EMBEDDINGS, encoded, strict=True) if value is not None}

    def text_length(self, lengths: Mapping[str, int]) -> int:
        """Return the number of tokens of a text, after the padding in `states`."""
        return TOKENS

    def sizes(self, height: int, width: int) -> Tensor:
        """Return original size, crop and target size of uncropped pictures, (6,)."""
        return torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)

    def call_batch(self, pictures: int, guided: bool) -> int:
        """Return the number of samples in one transformer call; guidance calls the model once for each text."""
        return pictures
