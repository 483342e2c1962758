"""The description of PixArtTransformer2DModel."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor

from prunekit.core.axes import Layer
from prunekit.core.call import Call, Fill
from prunekit.core.family import Family
from prunekit.core.transformer_layers import attention_layer
from prunekit.denoisers.joint import TransformerDescription

from .family import PixArt

TABLES = frozenset({"scale_shift_table"})


class PixArtTransformer(TransformerDescription):
    """PixArt-α and -Σ: self-attention over the image, cross-attention to the text, a feed-forward.

    PixArt-α of 1,024 pixels also takes the picture's size; one embedder embeds its two numbers as two positions.
    """

    dense = PixArtTransformer2DModel
    family: ClassVar[Family] = PixArt()
    arguments: ClassVar[Mapping[str, str]] = {**TransformerDescription.arguments, "mask": "encoder_attention_mask"}
    classes: ClassVar = {"transformer_blocks": (BasicTransformerBlock,)}
    tables: ClassVar[tuple[str, ...]] = ("pos_embed",)
    attentions = (Attention,)
    processors = (AttnProcessor2_0, AttnProcessor)

    def stem(self, model: Any) -> Layer:
        """Return the stem: both ends of the model, the text projection, and the embeddings of timestep and size."""
        streams = {"pos_embed": "image", "proj_out": "image", "caption_projection": "text", "adaln_single": "one"}
        streams["adaln_single.emb.resolution_embedder"] = "two"
        return Layer("stem", "", "one", streams, tables=TABLES)

    def inside(self, model: Any, path: str, block: Any) -> list[Layer]:
        """Return a block's layers: the block with its table of shifts and scales, two attentions, a feed-forward."""
        return [
            Layer("block", path, "image", tables=TABLES),
            attention_layer(f"{path}.attn1", block.attn1, "image", feeds=(f"{path}.norm1",)),
            attention_layer(f"{path}.attn2", block.attn2, "image", "text"),
            self.feedforward(model, f"{path}.ff", block.ff, "image", (f"{path}.norm2",)),
        ]

    def lengths(self, model: Any, latent: tuple[int, int], text_length: int) -> dict[str, int]:
        """Return the number of positions by stream, with "two" for the two numbers of the picture's size."""
        return {**super().lengths(model, latent, text_length), "two": 2}

    def call(self, noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Call:
        """Return the call for noisy latents (B, C, h, w); the picture's size is a nested argument."""
        call = super().call(noisy, timesteps, {name: value for name, value in conditions.items() if name != "sizes"})
        arguments = dict(call)
        if "sizes" in conditions:
            sizes = conditions["sizes"]
            arguments["added_cond_kwargs"] = {"resolution": sizes[:, :2], "aspect_ratio": sizes[:, 2:]}
        return Call(arguments, finish=partial(_mean, channels=noisy.shape[1]))

    def example_conditions(self, model: Any, batch: int, text_length: int, fill: Fill) -> dict[str, Tensor]:
        """Return the conditions of an example call, by role."""
        conditions = super().example_conditions(model, batch, text_length, fill)
        text = conditions["text"]
        conditions["mask"] = torch.ones(batch, text_length, dtype=torch.int64, device=text.device)
        if model.use_additional_conditions:
            conditions["sizes"] = fill("sizes", (batch, 3))
        return conditions

    def text_width(self, model: Any) -> int:
        """Return the width of the text states."""
        config = model.config
        return int(config.cross_attention_dim if config.caption_channels is None else config.caption_channels)


def _mean(output: Tensor, channels: int) -> Tensor:
    """Return the predicted mean; the channels after it are a learned variance, which the pipelines ignore."""
    return output[:, :channels]
