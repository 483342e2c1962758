"""The pipelines of Sana 1.0 and 1.5: their latents and conditions."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderDC
from torch import Tensor

from prunekit.denoisers.flow_matching import AsAsked, FlowFamily, masked_embeddings, unfitting

TOKENS = 300  # tokens of a text, by the pipeline's default
INSTRUCTION = "complex_human_instruction"  # a text before each prompt by default, not before negative prompts


class Sana(AsAsked, FlowFamily):
    """The family of `SanaPipeline`; the protocol `Family` documents the methods.

    The pipeline puts an instruction before every prompt, and keeps the states of 300 tokens: the first and the last
    299. The empty text, which guidance leads away from, has no instruction.
    """

    scale: ClassVar[int] = 32

    def refusal(self, pipeline: Any) -> str | None:
        """Return why a pipeline is not supported, worded to follow "NAME has"; None if it is supported."""
        return unfitting(pipeline, AutoencoderDC) or super().refusal(pipeline)

    def moments(self, autoencoder: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pictures' scaled latents, (n, C, h, w), and zeros: the autoencoder draws no random latents."""
        latents = autoencoder.encode(pixels).latent * autoencoder.config.scaling_factor
        return latents, torch.zeros_like(latents)

    def reconstruct(self, autoencoder: Any, pixels: Tensor) -> Tensor:
        """Return pictures, (n, 3, H, W), encoded and decoded."""
        reconstructed: Tensor = autoencoder.decode(autoencoder.encode(pixels).latent).sample
        return reconstructed

    def states(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        """Return the texts' states "text" (n, 300, E), and "mask" (n, 300), 1 where a token counts."""
        return self._states(pipeline, texts, _instruction(pipeline))

    def null_states(self, pipeline: Any) -> dict[str, Tensor]:
        """Return the states of the empty text, (1, 300, …), without an instruction before it."""
        return self._states(pipeline, [""], None)

    def embeddings(
        self, pipeline: Any, texts: list[str], negatives: list[str] | None, guided: bool, **options: Any
    ) -> dict[str, Tensor]:
        """Return the text embeddings that replace the texts in a pipeline's call, as keyword arguments."""
        given = {INSTRUCTION: _instruction(pipeline), **options}
        return masked_embeddings(pipeline, texts, negatives, guided, **given)

    def text_length(self, lengths: Mapping[str, int]) -> int:
        """Return the number of tokens of a text, after the pipeline's padding."""
        return TOKENS

    def _states(self, pipeline: Any, texts: list[str], instruction: list[str] | None) -> dict[str, Tensor]:
        states, mask, *_ = pipeline.encode_prompt(
            texts,
            do_classifier_free_guidance=False,
            device=pipeline._execution_device,
            **{INSTRUCTION: instruction},
        )
        return {"text": states, "mask": mask}


def _instruction(pipeline: Any) -> list[str]:
    """Return the lines of the instruction that a pipeline puts before a prompt by default."""
    return list(inspect.signature(type(pipeline).__call__).parameters[INSTRUCTION].default)
