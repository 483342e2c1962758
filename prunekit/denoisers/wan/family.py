"""The pipeline of Wan 2.1, here for pictures: its latents and conditions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import AutoencoderKLWan
from torch import Tensor

from prunekit.denoisers.flow_matching import FlowFamily, frame_moments, frame_reconstructed, unfitting

TOKENS = 512  # tokens of a text, by the pipeline's default


class WanFamily(FlowFamily):
    """The family of `WanPipeline` for videos of one frame; the protocol `Family` documents the methods."""

    def refusal(self, pipeline: Any) -> str | None:
        """Return why a pipeline is not supported, worded to follow "NAME has"; None if it is supported."""
        if pipeline.transformer_2 is not None or pipeline.config.boundary_ratio is not None:
            return "two transformers, one for each part of the schedule (Wan 2.2): not supported"
        if pipeline.config.expand_timesteps:
            return "a timestep for each token (Wan 2.2): not supported"
        return unfitting(pipeline, AutoencoderKLWan, "z_dim") or super().refusal(pipeline)

    def moments(self, autoencoder: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of pictures' latents, (n, C, h, w) each, normalized channel by channel."""
        return frame_moments(autoencoder, pixels)

    def reconstruct(self, autoencoder: Any, pixels: Tensor) -> Tensor:
        """Return pictures, (n, 3, H, W), encoded and decoded."""
        return frame_reconstructed(autoencoder, pixels)

    def states(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        """Return the texts' states "text" (n, 512, E); after a text's end they are zeros, which the model reads."""
        return {"text": self._encoded(pipeline, texts, None, False)[0]}

    def embeddings(
        self, pipeline: Any, texts: list[str], negatives: list[str] | None, guided: bool, **options: Any
    ) -> dict[str, Tensor]:
        """Return the text embeddings that replace the texts in a pipeline's call, as keyword arguments."""
        names = ("prompt_embeds", "negative_prompt_embeds")
        encoded = self._encoded(pipeline, texts, negatives, guided, **options)
        return {name: value for name, value in zip(names, encoded, strict=True) if value is not None}

    def call_options(self, pipeline: Any, guidance: float) -> dict[str, Any]:
        """Return the guidance scale, and the number of frames."""
        return {**super().call_options(pipeline, guidance), "num_frames": 1}

    def pictures(self, output: Any) -> Any:
        """Return the pictures of a pipeline's output: the only frame of every video."""
        frames = output.frames
        if isinstance(frames, Tensor) and frames.shape[2] == 1:  # latents (n, C, 1, h, w)
            return frames.squeeze(2)
        return [video[0] for video in frames] if isinstance(frames, list) else frames[:, 0]

    def text_length(self, lengths: Mapping[str, int]) -> int:
        """Return the number of tokens of a text, after the pipeline's padding."""
        return TOKENS

    def call_batch(self, pictures: int, guided: bool) -> int:
        """Return the number of samples in one transformer call; guidance calls the model once for each text."""
        return pictures

    def _encoded(
        self, pipeline: Any, texts: list[str], negatives: list[str] | None, guided: bool, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        return pipeline.encode_prompt(
            texts,
            negative_prompt=negatives,
            do_classifier_free_guidance=guided,
            device=pipeline._execution_device,
            **{"max_sequence_length": TOKENS, **options},
        )
