"""The pipelines of Stable Diffusion 3 and 3.5: their latents and conditions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from prunekit.denoisers.flow_matching import FlowFamily, unfitting

EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
CLIP_TOKENS, MOST_TOKENS = 77, 256  # tokens of CLIP; maximum of T5, by the pipeline's default


class StableDiffusion3(FlowFamily):
    """The family of `StableDiffusion3Pipeline`; the protocol `Family` documents the methods."""

    def refusal(self, pipeline: Any) -> str | None:
        """Return why a pipeline is not supported, worded to follow "NAME has"; None if it is supported."""
        return unfitting(pipeline, AutoencoderKL) or super().refusal(pipeline)

    def states(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        """Return the texts' states: "text" (n, T, E), CLIP's tokens and then T5's, and "pooled" (n, P)."""
        encoded = self._encoded(pipeline, texts, None, False)
        return {"text": encoded[0], "pooled": encoded[2]}

    def embeddings(
        self, pipeline: Any, texts: list[str], negatives: list[str] | None, guided: bool, **options: Any
    ) -> dict[str, Tensor]:
        """Return the text embeddings that replace the texts in a pipeline's call, as keyword arguments."""
        encoded = self._encoded(pipeline, texts, negatives if guided else None, guided, **options)
        return {name: value for name, value in zip(EMBEDDINGS, encoded, strict=True) if value is not None}

    def call_options(self, pipeline: Any, guidance: float) -> dict[str, Any]:
        """Return the guidance scale and the number of T5 tokens of a text."""
        return {**super().call_options(pipeline, guidance), **_tokens(pipeline)}

    def text_length(self, lengths: Mapping[str, int]) -> int:
        """Return the number of tokens of a text: CLIP's plus T5's."""
        return lengths.get("tokenizer", CLIP_TOKENS) + min(MOST_TOKENS, lengths.get("tokenizer_3", MOST_TOKENS))

    @torch.no_grad()
    def _encoded(
        self, pipeline: Any, texts: list[str], negatives: list[str] | None, guided: bool, **options: Any
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        return pipeline.encode_prompt(
            prompt=texts,
            prompt_2=None,
            prompt_3=None,
            device=pipeline._execution_device,
            do_classifier_free_guidance=guided,
            negative_prompt=negatives,
            **{**_tokens(pipeline), **options},
        )


def _tokens(pipeline: Any) -> dict[str, int]:
    """Return the number of T5 tokens of a text: the most that its tokenizer gives, up to the pipeline's 256."""
    tokenizer = pipeline.tokenizer_3
    return {"max_sequence_length": MOST_TOKENS if tokenizer is None else min(MOST_TOKENS, tokenizer.model_max_length)}
