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
from prunekit.denoisers.joint import TransformerDescription
from prunekit.runtime.errors import UserError

from .family import ZImageFamily

STREAMS = {"noise_refiner": "image", "context_refiner": "text", "layers": "joint"}  # by list of blocks
TABLES = frozenset({"x_pad_token", "cap_pad_token"})
SIZES = {"all_patch_size": (2,), "all_f_patch_size": (1,), "siglip_feat_dim": None}  # of all published models


class ZImage(TransformerDescription):
    """Z-Image: two blocks refine the image, two the text, then thirty run on both.

    Image and text are each filled up to a multiple of 32 tokens, which take part like the others.

    A second norm stands behind each branch of a block (`attention_norm2`, `ffn_norm2`) and divides the branch's output
    by its root mean square. So a gate, which sits before the branch's last linear layer, does this:

    - At 0 and 1 it is the cut: the masked branch and the sliced one have the same output before the norm.
    - In between, only the gates' ratios inside a branch count: one factor on all of them is divided out again, down to
      an output of about the norm's epsilon. So their common factor has nearly no gradient, and a branch is not closed
      by lowering all its gates: its output jumps to 0 only where all of them are 0. The block's own gate mixes behind
      the norms and has no such jump.
    - A branch without units gives the norm zeros, of which the norm makes zeros: it has no bias, and its epsilon keeps
      the division finite. So an emptied branch adds nothing, and both its norms go with its last unit.
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
        """UserError for a variant on which the laws have not been verified."""
        for name, value in SIZES.items():
            found = model.config[name]
            found = tuple(found) if isinstance(found, list) else found
            if found != value:
                raise UserError(f"a ZImageTransformer2DModel with {name}={found!r} is not supported, only {value!r}")
        super().check(model)

    def stem(self, model: Any) -> Layer:
        """Both ends, the embeddings of text and time step, and the tokens that fill both streams up."""
        streams = {"all_x_embedder": "image", "cap_embedder": "text", "t_embedder": "one", "all_final_layer": "joint"}
        streams |= {f"all_final_layer.{size}.adaLN_modulation": "one" for size in model.all_final_layer}
        return Layer("stem", "", "joint", streams, tables=TABLES)

    def inside(self, model: Any, path: str, block: Any) -> list[Layer]:
        """The block with its modulation, its attention and its feed-forward, each between two norms."""
        stream = STREAMS[path.partition(".")[0]]
        attention, feedforward = ([f"{path}.{name}_norm{place}" for place in (1, 2)] for name in ("attention", "ffn"))
        return [
            Layer("block", path, stream, {"adaLN_modulation": "one"}),
            attention_layer(f"{path}.attention", block.attention, stream, feeds=attention),
            self.feedforward(model, f"{path}.feed_forward", block.feed_forward, stream, feedforward),
        ]

    def width(self, model: Any) -> int:
        """Channels of the hidden states that enter a block."""
        return int(model.dim)

    def lengths(self, model: Any, latent: tuple[int, int], text_length: int) -> dict[str, int]:
        """The tokens of the image and of the text, each filled up, both together, and one."""
        image, text = _filled((latent[0] // 2) * (latent[1] // 2)), _filled(text_length)
        return {"image": image, "text": text, "joint": image + text, "one": 1}

    def call(self, noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Call:
        """Return the call that predicts for noisy latents (B, C, h, w).

        The model takes pictures as videos of one frame, and 1 - t/1000; it predicts the opposite of the direction from
        data to noise. With "mask" (B, T), each text is its own tokens alone: a list of (T_b, E).
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
        return (1000 - timesteps) / 1000

    def noisy(self, call: Call) -> Tensor:
        """Return the noisy latents of a call, (B, C, h, w)."""
        return super().noisy(call).squeeze(2)

    def starting(self, call: Call) -> Tensor:
        """Return the noisy latents of a call as the pipeline takes them: pictures, (B, C, h, w)."""
        return self.noisy(call)

    def text_length(self, call: Call) -> int:
        """Return the tokens of a call's longest text."""
        return max(map(len, call["cap_feats"]))

    def latent_channels(self, model: Any) -> int:
        """Return the channels of the latents."""
        return int(model.config.in_channels)

    def latent_size(self, model: Any) -> tuple[int, int]:
        """Return the latent's size that the pipelines take by default: the config says none."""
        return (128, 128)

    def text_width(self, model: Any) -> int:
        """Return the width of the text states."""
        return int(model.config.cap_feat_dim)


def _filled(tokens: int) -> int:
    """Return the tokens of a stream, with those that fill it up."""
    return -(-tokens // SEQ_MULTI_OF) * SEQ_MULTI_OF


def _direction(output: Sequence[Tensor]) -> Tensor:
    """Return the direction from data to noise, (B, C, h, w), of the model's output: a picture (C, 1, h, w) a sample."""
    return -torch.stack(list(output)).squeeze(2)
