"""The pipelines of FLUX.2: their latents and conditions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline
from torch import Tensor

from prunekit.denoisers.flow_matching import FlowFamily, FlowMatching
from prunekit.denoisers.joint import pack, unpack
from prunekit.runtime.errors import UserError

TOKENS = 512  # tokens of a text, after the pipelines' padding
GUIDANCE = 4.0  # default scale of dev's pipeline; dev is trained and calibrated with it here
IMAGE_TOKENS, STEPS = 4096, 50  # picture of 1,024 x 1,024 pixels, default number of steps: for the shift


class FLUX2(FlowFamily):
    """The family of `Flux2Pipeline` and `Flux2KleinPipeline`; the protocol `Family` documents the methods.

    The guidance scale is an input of dev. Distilled klein models have no guidance. Base klein models are guided by a
    second text in another call. The klein pipeline's setting `is_distilled` says which kind of klein it has.
    """

    def refusal(self, pipeline: Any) -> str | None:
        """Return why a pipeline is not supported, worded to follow "NAME has"; None if it is supported."""
        vae = pipeline.vae
        if type(vae) is not AutoencoderKLFlux2:
            return f"an autoencoder {type(vae).__name__}, which is not supported"
        return super().refusal(pipeline)

    def process(self, scheduler: Any | None) -> FlowMatching:
        """Return the noise process for training; a dynamic shift is taken at 1,024 x 1,024 pixels and 50 steps."""
        process = super().process(scheduler)
        if scheduler is not None and scheduler.config.get("use_dynamic_shifting"):
            from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

            process.shift = math.exp(compute_empirical_mu(IMAGE_TOKENS, STEPS))
        return process

    def moments(self, autoencoder: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of pictures' latents, (n, C, h, w) each.

        The running statistics of the autoencoder's batch norm normalize the channels of packed 2 x 2 positions.
        """
        posterior, norm = autoencoder.encode(pixels).latent_dist, autoencoder.bn
        mean, rows, columns = pack(posterior.mean)
        deviation, *_ = pack(posterior.std)
        scale = torch.sqrt(norm.running_var + autoencoder.config.batch_norm_eps).to(mean)
        mean, deviation = (mean - norm.running_mean.to(mean)) / scale, deviation / scale
        return unpack(mean, rows, columns), unpack(deviation, rows, columns)

    def states(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        """Return the texts' states: "text" (n, T, E), and for dev "guidance" (n,)."""
        text, _ = pipeline.encode_prompt(texts, device=pipeline._execution_device)
        states = {"text": text}
        if pipeline.transformer.config.guidance_embeds:
            states["guidance"] = torch.full((len(texts),), GUIDANCE, device=text.device)
        return states

    def embeddings(
        self, pipeline: Any, texts: list[str], negatives: list[str] | None, guided: bool, **options: Any
    ) -> dict[str, Tensor]:
        """Return the text embeddings that replace the texts in a pipeline's call, as keyword arguments.

        Raises:
            UserError: negative prompts, which dev does not take.

        """
        if negatives is not None and not isinstance(pipeline, Flux2KleinPipeline):
            raise UserError(f"{type(pipeline).__name__} takes no negative prompt")
        device = pipeline._execution_device
        embeddings = {"prompt_embeds": pipeline.encode_prompt(texts, device=device, **options)[0]}
        if guided:
            negatives = negatives or [""] * len(texts)
            embeddings["negative_prompt_embeds"] = pipeline.encode_prompt(negatives, device=device, **options)[0]
        return embeddings

    def call_options(self, pipeline: Any, guidance: float) -> dict[str, Any]:
        """Return the guidance scale; 1 for a distilled klein, whose pipeline ignores a larger scale with a warning."""
        return {"guidance_scale": 1.0 if pipeline.config.get("is_distilled") else guidance}

    def texts(self, guidance: float, options: Mapping[str, Any] = MappingProxyType({})) -> int:
        """Return the texts per picture: 2 for a guided base model of klein, else 1."""
        return 2 if guidance > 1 and options.get("is_distilled") is False else 1

    def text_length(self, lengths: Mapping[str, int]) -> int:
        """Return the number of tokens of a text, after the pipelines' padding."""
        return TOKENS

    def call_batch(self, pictures: int, guided: bool) -> int:
        """Return the number of samples in one transformer call; a second text runs in another call."""
        return pictures
