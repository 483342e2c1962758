"""The description of CogView4Transformer2DModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import CogView4Transformer2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_cogview4 import CogView4AttnProcessor, CogView4TransformerBlock
from torch import Tensor

from prunekit.core.axes import Layer
from prunekit.core.call import Call, Fill
from prunekit.core.family import Family
from prunekit.core.transformer_layers import EmptiedAttention, attention_layer
from prunekit.denoisers.joint import TransformerDescription
from prunekit.runtime.errors import UserError

from .family import CogView4Family

SIZES = ("original_size", "crop_coords", "target_size")  # arguments of two numbers each, in the order of "sizes"


class EmptiedSharedAttention(EmptiedAttention):
    """An attention without a head: returns the bias of its output projection, which two streams share."""

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Map (B, q, C) and (B, T, C) to outputs of the same shapes."""
        return super().forward(hidden_states), super().forward(encoder_hidden_states)


class CogView4(TransformerDescription):
    """CogView4: image and text share one attention and one feed-forward, and have different modulations.

    The model applies its SiLU once, after the embedding of timestep and sizes, so its modulation cannot be folded.
    """

    dense = CogView4Transformer2DModel
    family: ClassVar[Family] = CogView4Family()
    inputs = ("hidden_states", "encoder_hidden_states")
    classes: ClassVar = {"transformer_blocks": (CogView4TransformerBlock,)}
    attentions = (Attention,)
    processors = (CogView4AttnProcessor,)

    def check(self, model: Any) -> None:
        """Raise UserError for a variant on which the laws have not been verified."""
        given, predicted = model.config.in_channels, model.config.out_channels
        if given != predicted:
            raise UserError(
                f"a CogView4Transformer2DModel with in_channels={given} and out_channels={predicted}, as a control "
                "model has, is not supported: the two must be equal"
            )
        super().check(model)

    def stem(self, model: Any) -> Layer:
        """Return the stem: both ends of the model, the text projection, and the embedding of timestep and sizes."""
        streams = {"patch_embed.proj": "image", "patch_embed.text_proj": "text", "proj_out": "image"}
        return Layer("stem", "", streams={**streams, "time_condition_embed": "one", "norm_out": "one"})

    def inside(self, model: Any, path: str, block: Any) -> list[Layer]:
        """Return a block's layers: the block with its modulation, attention and feed-forward on both streams."""
        norms = (f"{path}.norm2", f"{path}.norm2_context")
        return [
            Layer("block", path, "one"),
            attention_layer(f"{path}.attn1", block.attn1, "joint"),
            self.feedforward(model, f"{path}.ff", block.ff, "joint", norms),
        ]

    def empty(self, model: Any, layer: Layer) -> None:
        """Replace a layer that lost all its units by a module that returns only the bias of its output layer."""
        module = model.get_submodule(layer.path)
        if isinstance(module, Attention):
            model.set_submodule(layer.path, EmptiedSharedAttention(module))
        else:
            super().empty(model, layer)

    def width(self, model: Any) -> int:
        """Return the number of channels of the hidden states that enter a block."""
        return int(model.config.num_attention_heads * model.config.attention_head_dim)

    def call(self, noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Call:
        """Return the call for noisy latents (B, C, h, w); the condition "sizes" becomes three arguments."""
        call = super().call(noisy, timesteps, {name: value for name, value in conditions.items() if name != "sizes"})
        return Call({**call, **dict(zip(SIZES, conditions["sizes"].split(2, dim=1), strict=True))})

    def example_conditions(self, model: Any, batch: int, text_length: int, fill: Fill) -> dict[str, Tensor]:
        """Return the conditions of an example call, by role."""
        conditions = super().example_conditions(model, batch, text_length, fill)
        return {**conditions, "sizes": fill("sizes", (batch, 6))}

    def text_width(self, model: Any) -> int:
        """Return the width of the text states."""
        return int(model.config.text_embed_dim)
