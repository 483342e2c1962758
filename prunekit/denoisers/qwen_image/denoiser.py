"""The description of QwenImageTransformer2DModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    QwenImageTransformerBlock,
)
from torch import Tensor

from prunekit.core.axes import Layer
from prunekit.core.call import Call, Fill
from prunekit.core.family import Family
from prunekit.core.modulation import Modulation
from prunekit.denoisers.joint import TIMESTEP_UNIT, PackedCalls, TransformerDescription, pack, placed
from prunekit.runtime.errors import UserError

from .family import QwenImageFamily

UNUSUAL = ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")  # flags of variants that edit pictures or layers


class QwenImage(PackedCalls, TransformerDescription):
    """Qwen-Image: joint attention over two streams; each stream has a modulation and a feed-forward."""

    dense = QwenImageTransformer2DModel
    family: ClassVar[Family] = QwenImageFamily()
    inputs = ("encoder_hidden_states", "hidden_states")
    arguments: ClassVar[Mapping[str, str]] = {
        **TransformerDescription.arguments,
        "mask": "encoder_hidden_states_mask",
    }
    classes: ClassVar = {"transformer_blocks": (QwenImageTransformerBlock,)}
    tables: ClassVar[tuple[str, ...]] = ("pos_embed",)
    modulation: ClassVar[Modulation | None] = Modulation(
        "time_text_embed", ("img_mod.1", "txt_mod.1", "norm_out.linear"), unit=TIMESTEP_UNIT, of_timestep_alone=True
    )
    attentions = (Attention,)
    processors = (QwenDoubleStreamAttnProcessor2_0,)

    def check(self, model: Any) -> None:
        """Raise UserError for a variant on which the laws have not been verified."""
        for name in UNUSUAL:
            if model.config.get(name):
                raise UserError(f"a QwenImageTransformer2DModel with {name}=true is not supported")
        super().check(model)

    def stem(self, model: Any) -> Layer:
        """Return the stem: both ends of the model, the text norm, and the timestep embedding."""
        streams = {"img_in": "image", "proj_out": "image", "txt_norm": "text", "txt_in": "text"}
        return Layer("stem", "", streams={**streams, "time_text_embed": "one", "norm_out": "one"})

    def inside(self, model: Any, path: str, block: Any) -> list[Layer]:
        """Return a block's layers: the block with its modulations, its attention, and each stream's feed-forward."""
        return self.joint_block(model, path, block, "img_mlp", "txt_mlp")

    def call(self, noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Call:
        """Return the call for noisy latents (B, C, h, w), packed into tokens; the model takes timesteps t/1000."""
        tokens, rows, columns = pack(noisy)
        given = {**conditions, "mask": conditions["mask"].bool()}  # a stored mask may hold numbers
        call = super().call(tokens, timesteps, given)
        return Call({**call, "img_shapes": [[(1, rows, columns)]]}, **placed(rows, columns))

    def example_conditions(self, model: Any, batch: int, text_length: int, fill: Fill) -> dict[str, Tensor]:
        """Return the conditions of an example call, by role."""
        conditions = super().example_conditions(model, batch, text_length, fill)
        conditions["mask"] = torch.ones(batch, text_length, dtype=torch.bool, device=conditions["text"].device)
        return conditions
