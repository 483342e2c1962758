"""The pipelines of Z-Image: their latents and conditions."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prunekit.denoisers.flow_matching import FlowFamily

TOKENS = 512  # maximum number of tokens of a text


class ZImageFamily(FlowFamily):
    """The family of `ZImagePipeline`; the protocol `Family` documents the methods.

    The pipeline adds `guidance_scale` times the difference of both texts' predictions to the prompt's prediction. So
    its scale is one less than in other pipelines, and 0 switches guidance off.
    """

    def refusal(self, pipeline: Any) -> str | None:
        """Return why a pipeline is not supported, worded to follow "NAME has"; None if it is supported."""
        if type(pipeline.vae) is not AutoencoderKL:
            return f"an autoencoder {type(pipeline.vae).__name__}, which is not supported"
        return super().refusal(pipeline)

    def states(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        """Return the texts' states "text" (n, T, E), and "mask" (n, T), true where a token counts.

        All texts are padded to 512 tokens with zeros, which the mask leaves out.
        """
        states = self._encoded(pipeline, texts, pipeline._execution_device)
        text = pad_sequence([*states, states[0].new_zeros(TOKENS, states[0].shape[1])], batch_first=True)[:-1]
        lengths = torch.tensor([len(tokens) for tokens in states], device=text.device)
        return {"text": text, "mask": torch.arange(TOKENS, device=text.device) < lengths[:, None]}

    def embeddings(
        self, pipeline: Any, texts: list[str], negatives: list[str] | None, guided: bool, **options: Any
    ) -> dict[str, Any]:
        """Return the embeddings that replace the texts in a pipeline's call: lists with one tensor for each text."""
        device = pipeline._execution_device
        embeddings = {"prompt_embeds": self._encoded(pipeline, texts, device, **options)}
        if guided:
            negatives = negatives or [""] * len(texts)
            embeddings["negative_prompt_embeds"] = self._encoded(pipeline, negatives, device, **options)
        return embeddings

    def texts(self, guidance: float, options: Mapping[str, Any] = MappingProxyType({})) -> int:
        """Return the texts per picture: 2 for a guided call, which also runs on the negative text, else 1."""
        return 2 if guidance > 0 else 1

    def text_length(self, lengths: Mapping[str, int]) -> int:
        """Return the largest number of tokens of a text."""
        return TOKENS

    def _encoded(self, pipeline: Any, texts: list[str], device: torch.device, **options: Any) -> list[Tensor]:
        """Return each text's states (T_i, E); `texts` is copied, because the pipeline writes into its list."""
        states, _ = pipeline.encode_prompt(list(texts), device, do_classifier_free_guidance=False, **options)
        return states
