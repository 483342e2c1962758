"""The description of SanaTransformer2DModel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0
from diffusers.models.transformers.sana_transformer import GLUMBConv, SanaAttnProcessor2_0, SanaTransformerBlock
from torch import Tensor, nn

from prunekit.core.axes import Axis, Layer
from prunekit.core.call import Fill
from prunekit.core.emptied import Emptied, EmptiedLayer
from prunekit.core.family import Family
from prunekit.core.record import kept_groups
from prunekit.core.space import UnitGroup
from prunekit.core.transformer_layers import attention_layer, channel_groups, check_plain
from prunekit.denoisers.joint import TransformerDescription
from prunekit.runtime.errors import UserError

from .family import Sana

TABLES = frozenset({"scale_shift_table"})
OVER_HEADS = "rms_norm_across_heads"  # `qk_norm` of Sana 1.5


class SanaTransformer(TransformerDescription):
    """Sana 1.0 and 1.5: linear attention over the image, cross-attention to the text, a convolutional feed-forward.

    Linear attention sums the products of a head's keys and values in a matrix and multiplies the queries by it. The
    matrix has a row for each channel of the head, and one for the sum of the keys. The stream "state" stands for these
    rows: it has one position per row.
    """

    dense = SanaTransformer2DModel
    family: ClassVar[Family] = Sana()
    arguments: ClassVar[Mapping[str, str]] = {**TransformerDescription.arguments, "mask": "encoder_attention_mask"}
    classes: ClassVar = {"transformer_blocks": (SanaTransformerBlock,)}
    tables: ClassVar[tuple[str, ...]] = ("patch_embed",)
    attentions = (Attention,)
    processors = (SanaLinearAttnProcessor2_0, SanaAttnProcessor2_0)

    def check(self, model: Any) -> None:
        """Raise UserError for a variant on which the laws have not been verified."""
        config = model.config
        if config.guidance_embeds:
            raise UserError("a SanaTransformer2DModel with guidance_embeds=true (SANA-Sprint) is not supported")
        if config.timestep_scale != 1.0:
            raise UserError(f"a SanaTransformer2DModel with timestep_scale={config.timestep_scale} is not supported")
        if config.qk_norm not in (None, OVER_HEADS):
            raise UserError(f"a SanaTransformer2DModel with qk_norm={config.qk_norm!r} is not supported")
        if config.cross_attention_dim is None:
            raise UserError("a SanaTransformer2DModel without cross-attention is not supported")
        super().check(model)

    def _check_module(self, path: str, module: nn.Module) -> None:
        if isinstance(module, GLUMBConv):
            check_plain(path, [module.conv_inverted, module.conv_depth, module.conv_point], (nn.Conv2d,))
        super()._check_module(path, module)

    def stem(self, model: Any) -> Layer:
        """Return the stem: both ends of the model, the text projection and its norm, and the timestep embedding."""
        streams = {"patch_embed": "image", "proj_out": "image", "time_embed": "one"}
        return Layer(
            "stem", "", "one", {**streams, "caption_projection": "text", "caption_norm": "text"}, tables=TABLES
        )

    def inside(self, model: Any, path: str, block: Any) -> list[Layer]:
        """Return a block's layers: the block with its table of shifts and scales, two attentions, a feed-forward."""
        over_heads = model.config.qk_norm == OVER_HEADS
        linear = attention_layer(f"{path}.attn1", block.attn1, "image", feeds=(f"{path}.norm1",), over_heads=over_heads)
        if linear.products is not None:
            linear = replace(linear, products=("image", "state"))
        return [
            Layer("block", path, "image", tables=TABLES),
            linear,
            attention_layer(f"{path}.attn2", block.attn2, "image", "text", over_heads=over_heads),
            _feedforward(model, f"{path}.ff", block.ff, f"{path}.norm2"),
        ]

    def empty(self, model: Any, layer: Layer) -> None:
        """Replace a layer that lost all its units by a module that returns its output bias; a feed-forward has none."""
        module = model.get_submodule(layer.path)
        if isinstance(module, GLUMBConv):
            model.set_submodule(layer.path, EmptiedLayer(module, "conv_point"))
        else:
            super().empty(model, layer)

    def lengths(self, model: Any, latent: tuple[int, int], text_length: int) -> dict[str, int]:
        """Return the number of positions by stream, with "state", the rows of a linear attention's matrix."""
        return {**super().lengths(model, latent, text_length), "state": model.config.attention_head_dim + 1}

    def width(self, model: Any) -> int:
        """Return the number of channels of the hidden states that enter a block."""
        return int(model.config.num_attention_heads * model.config.attention_head_dim)

    def text_width(self, model: Any) -> int:
        """Return the width of the text states."""
        return int(model.config.caption_channels)

    def example_conditions(self, model: Any, batch: int, text_length: int, fill: Fill) -> dict[str, Tensor]:
        """Return the conditions of an example call, by role."""
        conditions = super().example_conditions(model, batch, text_length, fill)
        device = conditions["text"].device
        return {**conditions, "mask": torch.ones(batch, text_length, dtype=torch.int64, device=device)}


def _feedforward(model: Any, path: str, module: Any, norm: str) -> Layer:
    """Describe a convolutional feed-forward.

    The first convolution returns two runs of channels, the second is depthwise, and the last one reads the product of
    the runs. A unit owns a group of channels in both runs. A zero before the last convolution, which has no bias,
    removes the unit.
    """
    if isinstance(module, Emptied):
        return Layer("feedforward", path, "image", feeds=(norm,))
    inner = module.conv_point.in_channels
    groups = kept_groups(model, f"feedforward:{path}") or channel_groups(inner)
    return Layer(
        "feedforward",
        path,
        "image",
        group=UnitGroup("feedforward", path, groups, inner // groups),
        axes=(Axis("conv_inverted", "out", copies=2), Axis("conv_depth", "each", copies=2), Axis("conv_point", "in")),
        feeds=(norm,),
    )
