"""The frozen encoders of a pipeline (pictures to latents, captions to text states), and rows computed on demand."""

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
BATCH_SIDE = 256  # largest side in pixels at which an autoencoder batch holds BATCH pictures
AUTOENCODER_SETTINGS = ("scaling_factor", "norm_num_groups", "act_fn", "force_upcast")
SHIFTS = ("shift_factor", "latents_mean", "latents_std", "batch_norm_eps")  # only some autoencoders have these
TEXT_SETTINGS = ("hidden_act", "num_attention_heads", "layer_norm_eps", "eos_token_id")


class FrozenEncoders:
    """A pipeline's autoencoder and text encoders, at one picture resolution (side in pixels)."""

    def __init__(self, pipeline: DiffusionPipeline, resolution: int):
        self.pipeline, self.vae, self.resolution = pipeline, pipeline.vae, resolution
        self.family = family_of(pipeline)

    @cached_property
    def roles(self) -> frozenset[str]:
        """The roles of the tensors that the denoiser takes, such as "text" and "sizes"."""
        model, asked = denoiser_in(self.pipeline), set()

        def fill(role: str, shape: tuple[int, ...]) -> Tensor:
            asked.add(role)
            return torch.zeros(shape)

        denoiser_of(model).example(model, 1, (2, 2), 1, fill)
        return frozenset(asked)

    @property
    def batch(self) -> int:
        """The number of pictures per autoencoder batch; it depends on the resolution only."""
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
        device = self.pipeline._execution_device  # that of an offloaded autoencoder's weights may differ
        mean, deviation = self.family.moments(self.vae, pixels.to(device, self.vae.dtype) / 127.5 - 1)
        return {"mean": mean.float().cpu(), "deviation": deviation.float().cpu()}

    @torch.no_grad()
    def states(self, texts: list[str]) -> dict[str, Tensor]:
        """Return captions' states by role, float32: `text` (n, T, E), and the others that the denoiser takes."""
        return {name: value.float().cpu() for name, value in self.family.states(self.pipeline, texts).items()}

    @torch.no_grad()
    def null_states(self) -> dict[str, Tensor]:
        """Return the states of the empty caption, (1, …) each, as the pipeline's guidance uses them."""
        return {name: value.float().cpu() for name, value in self.family.null_states(self.pipeline).items()}

    @cached_property
    def picture_key(self) -> str:
        """A digest of everything that a picture's latent depends on, except the picture."""
        config = self.vae.config
        settings = [config.get(name) for name in AUTOENCODER_SETTINGS]
        settings += [config[name] for name in SHIFTS if config.get(name) is not None]
        return Fingerprint("latents", self.resolution, str(self.vae.dtype), *settings).add_module(self.vae).key()

    @cached_property
    def text_key(self) -> str:
        """A digest of everything that a caption's states depend on, except the caption."""
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
    """Latents (n, C, h, w) that the autoencoder computes from the pictures at every request."""

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
    """Caption states computed on demand; the last result is cached, as each part of it is requested separately."""

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
    """One part of the caption states, such as "text" or "pooled", which the text encoders compute on demand."""

    def __init__(self, states: CaptionStates, name: str, row_shape: tuple[int, ...]):
        super().__init__(len(states.captions), row_shape)
        self.states, self.name = states, name

    def _take(self, index: Tensor) -> Tensor:
        return self.states.take(index.tolist())[self.name] if len(index) else torch.empty(0, *self.shape[1:])


def _rules(tokenizer: Any) -> str:
    """Return a tokenizer's rules as JSON, without truncation and padding, which every call sets."""
    chat = getattr(tokenizer, "chat_template", None)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor, which also takes pictures, holds a tokenizer
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {name: value for name, value in rules.items() if name not in ("truncation", "padding")}
    parts = [rules, tokenizer.model_max_length, tokenizer.pad_token_id, *([] if chat is None else [chat])]
    return json.dumps(parts, sort_keys=True)
