"""The pipelines of FLUX.1: their latents and conditions."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from prunekit.denoisers.flow_matching import FlowFamily

MOST_TOKENS = 512  # of a text, by the pipeline's default
GUIDANCE = 3.5  # that a guidance-distilled model is trained and calibrated with


class FLUX(FlowFamily):
    """What `FluxPipeline` does around its transformer. Methods are `Family`'s.

    Guidance is an input of the model (dev), or none (schnell); a negative prompt makes the pipeline call it twice.
    """

    def states(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        """Return the texts' states: "text" (n, T, E) of T5, "pooled" (n, P) of CLIP, and of dev "guidance" (n,)."""
        text, pooled, _ = pipeline.encode_prompt(texts, device=pipeline.vae.device)
        states = {"text": text, "pooled": pooled}
        if pipeline.transformer.config.guidance_embeds:
            states["guidance"] = torch.full((len(texts),), GUIDANCE, device=text.device)
        return states

    def embeddings(
        self, pipeline: Any, texts: list[str], negatives: list[str] | None, guided: bool, **options: Any
    ) -> dict[str, Tensor]:
        """Return a pipeline's keyword arguments that take the place of its texts."""
        device = pipeline._execution_device
        text, pooled, _ = pipeline.encode_prompt(texts, device=device, **options)
        embeddings = {"prompt_embeds": text, "pooled_prompt_embeds": pooled}
        if negatives is not None:
            text, pooled, _ = pipeline.encode_prompt(negatives, device=device, **options)
            embeddings |= {"negative_prompt_embeds": text, "negative_pooled_prompt_embeds": pooled}
        return embeddings

    def texts(self, guidance: float, options: Mapping[str, Any] = MappingProxyType({})) -> int:
        """Return 1: the guidance is an input of the model; 2 where `true_cfg_scale` asks for a second text."""
        return 2 if options.get("true_cfg_scale", 1.0) > 1 else 1

    def text_length(self, lengths: Mapping[str, int]) -> int:
        """Return the tokens of a text, to which the pipeline fills T5's up whatever its tokenizer gives."""
        return MOST_TOKENS

    def call_batch(self, pictures: int, guided: bool) -> int:
        """Return the samples of one transformer call: a second text runs in another call."""
        return pictures
