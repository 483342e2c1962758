"""The pipelines of Qwen-Image: their latents and conditions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekit.denoisers.flow_matching import FlowFamily, frame_moments, frame_reconstructed

TOKENS = 512  # maximum number of tokens of a text


class QwenImageFamily(FlowFamily):
    """The family of `QwenImagePipeline`; the protocol `Family` documents the methods."""

    negative: ClassVar[str | None] = " "

    def moments(self, autoencoder: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of pictures' latents, (n, C, h, w) each, normalized channel by channel."""
        return frame_moments(autoencoder, pixels)

    def reconstruct(self, autoencoder: Any, pixels: Tensor) -> Tensor:
        """Return pictures, (n, 3, H, W), encoded and decoded."""
        return frame_reconstructed(autoencoder, pixels)

    def states(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        """Return the texts' states "text" (n, T, E), and "mask" (n, T), true where a token counts.

        All texts are padded to 512 tokens with zeros, which the mask leaves out.
        """
        text, mask = pipeline.encode_prompt(texts, device=pipeline._execution_device, max_sequence_length=TOKENS)
        mask = torch.ones(text.shape[:2], device=text.device) if mask is None else mask
        missing = TOKENS - text.shape[1]
        return {"text": F.pad(text, (0, 0, 0, missing)), "mask": F.pad(mask.bool(), (0, missing))}

    def embeddings(
        self, pipeline: Any, texts: list[str], negatives: list[str] | None, guided: bool, **options: Any
    ) -> dict[str, Tensor]:
        """Return the text embeddings that replace the texts in a pipeline's call, as keyword arguments."""
        device = pipeline._execution_device
        text, mask = pipeline.encode_prompt(texts, device=device, **options)
        embeddings = {"prompt_embeds": text, "prompt_embeds_mask": mask}
        if guided:
            text, mask = pipeline.encode_prompt(
                negatives or [str(self.negative)] * len(texts), device=device, **options
            )
            embeddings |= {"negative_prompt_embeds": text, "negative_prompt_embeds_mask": mask}
        return {name: value for name, value in embeddings.items() if value is not None}

    def call_options(self, pipeline: Any, guidance: float) -> dict[str, Any]:
        """Return the guidance scale under the pipeline's name for it, `true_cfg_scale`."""
        return {"true_cfg_scale": guidance}

    def text_length(self, lengths: Mapping[str, int]) -> int:
        """Return the number of tokens of a text, after the padding in `states`."""
        return TOKENS

    def call_batch(self, pictures: int, guided: bool) -> int:
        """Return the number of samples in one transformer call; guidance calls the model once for each text."""
        return pictures
