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

TOKENS = 512  # of a text, to which the pipelines fill it up
GUIDANCE = 4.0  # the default of dev's pipeline, with which it is trained and calibrated here
IMAGE_TOKENS, STEPS = 4096, 50  # of a picture of 1,024 pixels, and of the pipelines' default, for the schedule's shift


class FLUX2(FlowFamily):
    """What `Flux2Pipeline` and `Flux2KleinPipeline` do around their transformer. Methods are `Family`'s.

    Guidance is an input of dev. Of klein, the distilled models have none, and the base models are guided by a second
    text in another call; the pipeline's setting `is_distilled` says which it is.
    """

    def refusal(self, pipeline: Any) -> str | None:
        """Return why a pipeline is not supported, as "NAME has" goes on: its autoencoder or scheduler."""
        vae = pipeline.vae
        if type(vae) is not AutoencoderKLFlux2:
            return f"an autoencoder {type(vae).__name__}, which is not supported"
        return super().refusal(pipeline)

    def process(self, scheduler: Any | None) -> FlowMatching:
        """Return the training-time process; a shift by size and steps is that of 1,024 pixels in 50 steps."""
        process = super().process(scheduler)
        if scheduler is not None and scheduler.config.get("use_dynamic_shifting"):
            from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

            process.shift = math.exp(compute_empirical_mu(IMAGE_TOKENS, STEPS))
        return process

    def moments(self, autoencoder: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of pictures' latents, (n, C, h, w) each.

        The autoencoder's batch norm, by its running statistics, normalizes channels of 2 x 2 neighbours.
        """
        posterior, norm = autoencoder.encode(pixels).latent_dist, autoencoder.bn
        mean, rows, columns = pack(posterior.mean)
        deviation, *_ = pack(posterior.std)
        scale = torch.sqrt(norm.running_var + autoencoder.config.batch_norm_eps).to(mean)
        mean, deviation = (mean - norm.running_mean.to(mean)) / scale, deviation / scale
        return unpack(mean, rows, columns), unpack(deviation, rows, columns)

    def states(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        """Return the texts' states: "text" (n, T, E), and of dev "guidance" (n,)."""
        text, _ = pipeline.encode_prompt(texts, device=pipeline.vae.device)
        states = {"text": text}
        if pipeline.transformer.config.guidance_embeds:
            states["guidance"] = torch.full((len(texts),), GUIDANCE, device=text.device)
        return states

    def embeddings(
        self, pipeline: Any, texts: list[str], negatives: list[str] | None, guided: bool, **options: Any
    ) -> dict[str, Tensor]:
        """Return a pipeline's keyword arguments that take the place of its texts.

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
        """Return the guidance scale; of a distilled klein 1, since its pipeline warns of one that it ignores."""
        return {"guidance_scale": 1.0 if pipeline.config.get("is_distilled") else guidance}

    def texts(self, guidance: float, options: Mapping[str, Any] = MappingProxyType({})) -> int:
        """Return 2 where a base model of klein is guided; else 1."""
        return 2 if guidance > 1 and options.get("is_distilled") is False else 1

    def text_length(self, lengths: Mapping[str, int]) -> int:
        """Return the tokens of a text, to which the pipelines fill it up."""
        return TOKENS

    def call_batch(self, pictures: int, guided: bool) -> int:
        """Return the samples of one transformer call: a second text runs in another call."""
        return pictures
