"""The pipelines of PixArt-α and PixArt-Σ: their latents and conditions."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler
from torch import Tensor

from prunekit.denoisers.flow_matching import AsAsked, FlowMatching, TransformerFamily, masked_embeddings
from prunekit.denoisers.unet.family import DDPM

MOST_TOKENS = 300  # maximum number of tokens of a text in PixArt-Σ; 120 in PixArt-α
NOISE_SCHEDULE = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}


class PixArt(AsAsked, TransformerFamily):
    """The family of PixArt's pipelines; the protocol `Family` documents the methods."""

    def refusal(self, pipeline: Any) -> str | None:
        """Return why a pipeline is not supported, worded to follow "NAME has"; None if it is supported."""
        vae = pipeline.vae
        return None if type(vae) is AutoencoderKL else f"an autoencoder {type(vae).__name__}, which is not supported"

    def process(self, scheduler: Any | None) -> DDPM | FlowMatching:
        """Return the noise process for training with a pipeline's scheduler; None means PixArt's scheduler."""
        if scheduler is None:
            return DDPM(DDPMScheduler(**NOISE_SCHEDULE, clip_sample=False))
        if scheduler.config.get("use_flow_sigmas"):
            return FlowMatching(scheduler)
        return DDPM(DDPMScheduler.from_config(scheduler.config, clip_sample=False))

    def states(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        """Return the texts' states "text" (n, T, E), and "mask" (n, T), 1 where a token counts."""
        states, mask, *_ = pipeline.encode_prompt(
            texts, do_classifier_free_guidance=False, device=pipeline._execution_device
        )
        return {"text": states, "mask": mask}

    def embeddings(
        self, pipeline: Any, texts: list[str], negatives: list[str] | None, guided: bool, **options: Any
    ) -> dict[str, Tensor]:
        """Return the text embeddings that replace the texts in a pipeline's call, as keyword arguments."""
        return masked_embeddings(pipeline, texts, negatives, guided, **options)

    def draws_one_step(self, pipeline: Any) -> bool:
        """Return whether a pipeline, with its scheduler, can draw with a single scheduler step.

        For a single step, diffusers' pipeline of PixArt-α takes the second output of `scheduler.step`, the predicted
        clean latents. Some schedulers, such as its own DPMSolverMultistepScheduler, return only one output.
        """
        if type(pipeline).__name__ != "PixArtAlphaPipeline":
            return True
        scheduler, latents = copy.deepcopy(pipeline.scheduler), torch.zeros(1, 1, 1, 1)
        scheduler.set_timesteps(1)
        return len(scheduler.step(latents, scheduler.timesteps[0], latents, return_dict=False)) > 1

    def text_length(self, lengths: Mapping[str, int]) -> int:
        """Return the number of T5 tokens of a text."""
        return min(MOST_TOKENS, lengths.get("tokenizer", MOST_TOKENS))

    def sizes(self, height: int, width: int) -> Tensor:
        """Return height, width, and the aspect ratio, (3,), which PixArt-α of 1,024 pixels takes."""
        return torch.tensor([height, width, height / width], dtype=torch.float32)
