"""The frozen encoders of a pipeline: pictures to latents, captions to text states; and rows that are made on demand."""

import json
from functools import cached_property
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from prunekit.core.registry import denoiser_in, denoiser_of, family_of
from prunekit.data.fingerprint import Fingerprint
from prunekit.data.images import CaptionedImages
from prunekit.data.rows import Rows

BATCH = 64
BATCH_SIDE = 256  # pixels up to which so many pictures go through the autoencoder at once
AUTOENCODER_SETTINGS = ("scaling_factor", "norm_num_groups", "act_fn", "force_upcast")
SHIFTS = ("shift_factor", "latents_mean", "latents_std", "batch_norm_eps")  # of those autoencoders that have them
TEXT_SETTINGS = ("hidden_act", "num_attention_heads", "layer_norm_eps", "eos_token_id")


class FrozenEncoders:
    """What of a pipeline is run once over a data set, at one resolution (pixels of a side)."""

    def __init__(self, pipeline: DiffusionPipeline, resolution: int):
        self.pipeline, self.vae, self.resolution = pipeline, pipeline.vae, resolution
        self.family = family_of(pipeline)

    @cached_property
    def roles(self) -> frozenset[str]:
        """What the denoiser is called with, such as "text" and "sizes"."""
        model, asked = denoiser_in(self.pipeline), set()

        def fill(role: str, shape: tuple[int, ...]) -> Tensor:
            asked.add(role)
            return torch.zeros(shape)

        denoiser_of(model).example(model, 1, (2, 2), 1, fill)
        return frozenset(asked)

    @property
    def batch(self) -> int:
        """Pictures that go through the autoencoder at once, by the resolution alone."""
        return max(1, min(BATCH, BATCH * BATCH_SIDE**2 // self.resolution**2))

    @cached_property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, h, w) of one picture."""
        blank = torch.zeros(1, 3, self.resolution, self.resolution, dtype=torch.uint8)
        return tuple(self.moments(blank)["mean"].shape[1:])

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the posterior of pictures (n, 3, h, w) uint8: `mean` and `deviation` (n, C, h, w), scaled, float32."""
        if not len(pixels):
            empty = torch.empty(0, *self.latent_shape)
            return {"mean": empty, "deviation": empty}
        mean, deviation = self.family.moments(self.vae, pixels.to(self.vae.device, self.vae.dtype) / 127.5 - 1)
        return {"mean": mean.float().cpu(), "deviation": deviation.float().cpu()}

    @torch.no_grad()
    def states(self, texts: list[str]) -> dict[str, Tensor]:
        """Return captions' states, `text` (n, T, E), and what else of them the denoiser takes, by role; float32."""
        return {name: value.float().cpu() for name, value in self.family.states(self.pipeline, texts).items()}

    @torch.no_grad()
    def null_states(self) -> dict[str, Tensor]:
        """Return the states of the empty caption (1, …), as the pipeline guides away from it."""
        return {name: value.float().cpu() for name, value in self.family.null_states(self.pipeline).items()}

    @cached_property
    def picture_key(self) -> str:
        """A digest of all that a picture's latent depends on beside the picture."""
        config = self.vae.config
        settings = [config.get(name) for name in AUTOENCODER_SETTINGS]
        settings += [config[name] for name in SHIFTS if config.get(name) is not None]
        return Fingerprint("latents", self.resolution, str(self.vae.dtype), *settings).add_module(self.vae).key()

    @cached_property
    def text_key(self) -> str:
        """A digest of all that a caption's states depend on beside the caption."""
        zeros = self.pipeline.config.get("force_zeros_for_empty_prompt")
        fingerprint = Fingerprint("text", type(self.pipeline).__name__, zeros)
        for suffix in ("", "_2", "_3"):
            encoder = getattr(self.pipeline, f"text_encoder{suffix}", None)
            if encoder is not None:
                settings = [getattr(encoder.config, name, None) for name in TEXT_SETTINGS]
                fingerprint.add(str(encoder.dtype), *settings).add_module(encoder)
                fingerprint.add(_rules(getattr(self.pipeline, f"tokenizer{suffix}")))
        return fingerprint.key()


class LiveLatents(Rows):
    """Latents (n, C, h, w) that the autoencoder makes of the pictures each time they are requested."""

    def __init__(self, encoders: FrozenEncoders, images: CaptionedImages):
        super().__init__(images.num_images, encoders.latent_shape)
        self.encoders, self.images = encoders, images

    def _take(self, index: Tensor) -> Tensor:
        parts = [
            self.images.pixels(part.tolist(), self.encoders.resolution) for part in index.split(self.encoders.batch)
        ]
        means = [self.encoders.moments(pixels)["mean"] for pixels in parts if len(pixels)]
        return torch.cat(means) if means else torch.empty(0, *self.shape[1:])


class CaptionStates:
    """The states of captions made on demand; those that were asked for last stay for the caller of their other part."""

    def __init__(self, encoders: FrozenEncoders, captions: list[str]):
        self.encoders, self.captions = encoders, captions
        self._last: tuple[list[int], dict[str, Tensor]] = ([], {})

    def take(self, index: list[int]) -> dict[str, Tensor]:
        """Return the states of the captions with these indices."""
        if not self._last[1] or self._last[0] != index:
            texts = [self.captions[i] for i in index]
            parts = [self.encoders.states(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
            self._last = (index, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        return self._last[1]


class LiveText(Rows):
    """One part, such as "text" or "pooled", of captions' states, which the text encoders make when it is requested."""

    def __init__(self, states: CaptionStates, name: str, row_shape: tuple[int, ...]):
        super().__init__(len(states.captions), row_shape)
        self.states, self.name = states, name

    def _take(self, index: Tensor) -> Tensor:
        return self.states.take(index.tolist())[self.name] if len(index) else torch.empty(0, *self.shape[1:])


def _rules(tokenizer: Any) -> str:
    """All that a tokenizer goes by; what a call sets in it, length and padding, is left out."""
    chat = getattr(tokenizer, "chat_template", None)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor, which takes pictures too
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {name: value for name, value in rules.items() if name not in ("truncation", "padding")}
    parts = [rules, tokenizer.model_max_length, tokenizer.pad_token_id, *([] if chat is None else [chat])]
    return json.dumps(parts, sort_keys=True)
