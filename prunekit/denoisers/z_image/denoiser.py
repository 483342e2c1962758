"""The description of ZImageTransformer2DModel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_z_image import (
    SEQ_MULTI_OF,
    ZImageTransformerBlock,
    ZSingleStreamAttnProcessor,
)
from diffusers.models.transformers.transformer_z_image import FeedForward as ZImageFeedForward
from torch import Tensor

from prunekit.core.axes import Layer
from prunekit.core.call import Call
from prunekit.core.family import Family
from prunekit.core.transformer_layers import attention_layer
from prunekit.denoisers.joint import TIMESTEP_UNIT, TransformerDescription
from prunekit.runtime.errors import UserError

from .family import ZImageFamily

STREAMS = {"noise_refiner": "image", "context_refiner": "text", "layers": "joint"}  # stream of each list of blocks
TABLES = frozenset({"x_pad_token", "cap_pad_token"})
SIZES = {"all_patch_size": (2,), "all_f_patch_size": (1,), "siglip_feat_dim": None}  # config of all published models


class ZImage(TransformerDescription):
    """Z-Image: two blocks refine the image, two the text, then thirty run on both.

    Image and text are each padded to a multiple of 32 tokens. The padding tokens take part like the others.

    A second norm follows each branch of a block (`attention_norm2`, `ffn_norm2`) and divides the branch's output by its
    root mean square. The gates of a branch sit before its last linear layer, with these effects:

    - Gates of 0 and 1 equal the cut: the masked branch and the sliced branch have the same output before the norm.
    - Between 0 and 1, only the ratios of a branch's gates count. The norm divides out a common factor of all gates, as
      long as the branch's output is larger than about the norm's epsilon. So the common factor has almost no gradient,
      and lowering all gates of a branch does not close it: the output jumps to 0 only where all its gates are 0. The
      block's own gate acts after the norms and has no such jump.
    - For a branch without units, the norm reads zeros and returns zeros: it has no bias, and its epsilon keeps the
      division finite. So an emptied branch adds nothing, and both its norms are removed with its last unit.
    """

    dense = ZImageTransformer2DModel
    family: ClassVar[Family] = ZImageFamily()
    lists = tuple(STREAMS)
    inputs = ("x",)
    arguments: ClassVar[Mapping[str, str]] = {"noisy": "x", "timestep": "t", "text": "cap_feats"}
    layers_in_config = ("n_refiner_layers", "n_refiner_layers", "n_layers")
    classes: ClassVar = dict.fromkeys(STREAMS, (ZImageTransformerBlock,))
    attentions = (Attention,)
    processors = (ZSingleStreamAttnProcessor,)
    feedforwards = (ZImageFeedForward,)
    feedforward_inputs = ("w1", "w3")
    feedforward_output = "w2"

    def check(self, model: Any) -> None:
        """Raise UserError for a variant on which the laws have not been verified."""
        for name, value in SIZES.items():
            found = model.config[name]
            found = tuple(found) if isinstance(found, list) else found
            if found != value:
                raise UserError(f"a ZImageTransformer2DModel with {name}={found!r} is not supported, only {value!r}")
        super().check(model)

    def stem(self, model: Any) -> Layer:
        """Return the stem: both ends of the model, the embeddings of text and timestep, and the padding tokens."""
        streams = {"all_x_embedder": "image", "cap_embedder": "text", "t_embedder": "one", "all_final_layer": "joint"}
        streams |= {f"all_final_layer.{size}.adaLN_modulation": "one" for size in model.all_final_layer}
        return Layer("stem", "", "joint", streams, tables=TABLES)

    def inside(self, model: Any, path: str, block: Any) -> list[Layer]:
        """Return a block's layers: the block with its modulation, an attention and a feed-forward between norms."""
        stream = STREAMS[path.partition(".")[0]]
        attention, feedforward = ([f"{path}.{name}_norm{place}" for place in (1, 2)] for name in ("attention", "ffn"))
        return [
            Layer("block", path, stream, {"adaLN_modulation": "one"}),
            attention_layer(f"{path}.attention", block.attention, stream, feeds=attention),
            self.feedforward(model, f"{path}.feed_forward", block.feed_forward, stream, feedforward),
        ]

    def width(self, model: Any) -> int:
        """Return the number of channels of the hidden states that enter a block."""
        return int(model.dim)

    def lengths(self, model: Any, latent: tuple[int, int], text_length: int) -> dict[str, int]:
        """Return the number of positions by stream: "image" and "text" with padding, "joint" (both), and "one" (1)."""
        image, text = _filled((latent[0] // 2) * (latent[1] // 2)), _filled(text_length)
        return {"image": image, "text": text, "joint": image + text, "one": 1}

    def call(self, noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Call:
        """Return the call for noisy latents (B, C, h, w).

        The model takes pictures as videos of one frame and timesteps as 1 - t/1000. It predicts the negative of the
        direction from data to noise. With "mask" (B, T), the texts are a list of (T_b, E), without masked tokens.
        """
        text, mask = conditions["text"], conditions.get("mask")
        given = text if mask is None else [tokens[kept] for tokens, kept in zip(text, mask.bool(), strict=True)]
        call = super().call(noisy.unsqueeze(2), timesteps, {"text": text})
        return Call({**call, "cap_feats": given}, finish=_direction)

    def at(self, call: Call, noisy: Tensor, timesteps: Tensor) -> Call:
        """Return the call under the same conditions for other noisy latents at other timesteps."""
        return super().at(call, noisy.unsqueeze(2), timesteps.expand(len(noisy)))

    def taken(self, timesteps: Tensor) -> Tensor:
        """Return timesteps as the model takes them: 0 is noise, 1 is data."""
        return (TIMESTEP_UNIT - timesteps) / TIMESTEP_UNIT

    def noisy(self, call: Call) -> Tensor:
        """Return the noisy latents of a call, (B, C, h, w)."""
        return super().noisy(call).squeeze(2)

    def starting(self, call: Call) -> Tensor:
        """Return the noisy latents of a call as the pipeline takes them: pictures, (B, C, h, w)."""
        return self.noisy(call)

    def text_length(self, call: Call) -> int:
        """Return the number of tokens of a call's longest text."""
        return max(map(len, call["cap_feats"]))

    def latent_channels(self, model: Any) -> int:
        """Return the number of channels of the latents."""
        return int(model.config.in_channels)

    def latent_size(self, model: Any) -> tuple[int, int]:
        """Return the pipelines' default latent size (h, w), because the config has none."""
        return (128, 128)

    def text_width(self, model: Any) -> int:
        """Return the width of the text states."""
        return int(model.config.cap_feat_dim)


def _filled(tokens: int) -> int:
    """Return the number of tokens of a stream after padding to a multiple of 32."""
    return -(-tokens // SEQ_MULTI_OF) * SEQ_MULTI_OF


def _direction(output: Sequence[Tensor]) -> Tensor:
    """Return the direction from data to noise, (B, C, h, w), from the model's output, (C, 1, h, w) per sample."""
    return -torch.stack(list(output)).squeeze(2)
