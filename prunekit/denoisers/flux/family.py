"""The pipelines of FLUX.1: their latents and conditions."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from prunekit.denoisers.flow_matching import FlowFamily

MOST_TOKENS = 512  # tokens of a text, by the pipeline's default
GUIDANCE = 3.5  # scale for training and calibrating a guidance-distilled model


class FLUX(FlowFamily):
    """The family of `FluxPipeline`; the protocol `Family` documents the methods.

    The guidance scale is an input of dev; schnell has no guidance. With a negative prompt and `true_cfg_scale` above 1,
    the pipeline calls the model twice per step.
    """

    def states(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        """Return the texts' states: "text" (n, T, E) of T5, "pooled" (n, P) of CLIP, and for dev "guidance" (n,)."""
        text, pooled, _ = pipeline.encode_prompt(texts, device=pipeline._execution_device)
        states = {"text": text, "pooled": pooled}
        if pipeline.transformer.config.guidance_embeds:
            states["guidance"] = torch.full((len(texts),), GUIDANCE, device=text.device)
        return states

    def embeddings(
        self, pipeline: Any, texts: list[str], negatives: list[str] | None, guided: bool, **options: Any
    ) -> dict[str, Tensor]:
        """Return the text embeddings that replace the texts in a pipeline's call, as keyword arguments."""
        device = pipeline._execution_device
        text, pooled, _ = pipeline.encode_prompt(texts, device=device, **options)
        embeddings = {"prompt_embeds": text, "pooled_prompt_embeds": pooled}
        if negatives is not None:
            text, pooled, _ = pipeline.encode_prompt(negatives, device=device, **options)
            embeddings |= {"negative_prompt_embeds": text, "negative_pooled_prompt_embeds": pooled}
        return embeddings

    def texts(self, guidance: float, options: Mapping[str, Any] = MappingProxyType({})) -> int:
        """Return the texts per picture: 1, since guidance is an input of the model; 2 for `true_cfg_scale` above 1."""
        return 2 if options.get("true_cfg_scale", 1.0) > 1 else 1

    def text_length(self, lengths: Mapping[str, int]) -> int:
        """Return the number of tokens of a text: the pipeline pads T5's to 512, whatever its tokenizer's limit is."""
        return MOST_TOKENS

    def call_batch(self, pictures: int, guided: bool) -> int:
        """Return the number of samples in one transformer call; a second text runs in another call."""
        return pictures
