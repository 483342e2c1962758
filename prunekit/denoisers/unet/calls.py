"""The calls of a UNet, and the shapes of their arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D

from prunekit.core.call import Call, Fill, NamedCalls

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from torch import Tensor, nn

REGIONS = (ResnetBlock2D, BasicTransformerBlock)
SIZES = 6  # original height and width, crop, target height and width (SDXL)


class UNetCalls(NamedCalls):
    """The part of a UNet's description that is about inputs; `Denoiser` documents the methods."""

    arguments: ClassVar[Mapping[str, str]] = {
        "noisy": "sample",
        "timestep": "timestep",
        "text": "encoder_hidden_states",
    }

    def call(self, noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Call:
        """Return the call for noisy latents (B, C, h, w); XL's pooled text and sizes are one nested argument."""
        call = super().call(noisy, timesteps, {"text": conditions["text"]})
        if "pooled" not in conditions:
            return call
        added = {"text_embeds": conditions["pooled"], "time_ids": conditions["sizes"]}
        return Call({**call, "added_cond_kwargs": added})

    def example_conditions(
        self, model: UNet2DConditionModel, batch: int, text_length: int, fill: Fill
    ) -> dict[str, Tensor]:
        """Return the conditions of an example call, by role; with sizes if the UNet takes pooled text (XL)."""
        conditions = super().example_conditions(model, batch, text_length, fill)
        if "pooled" in conditions:
            conditions["sizes"] = fill("sizes", (batch, SIZES))
        return conditions

    def text_width(self, model: UNet2DConditionModel) -> int:
        """Return the width of the text states; if the config has one for each level, that of the first level."""
        width = model.config.cross_attention_dim
        return width if isinstance(width, int) else width[0]

    def pooled_width(self, model: UNet2DConditionModel) -> int:
        """Return the width of the pooled text embedding (SDXL); 0 where the UNet takes none."""
        config = model.config
        if config.addition_embed_type != "text_time":
            return 0
        return config.projection_class_embeddings_input_dim - SIZES * config.addition_time_embed_dim

    def blocks(self, model: UNet2DConditionModel, inner: bool = True) -> dict[str, nn.Module]:
        """Return the down blocks, the mid block if `inner` is true, and the up blocks, by path."""
        blocks = {f"down_blocks.{i}": block for i, block in enumerate(model.down_blocks)}
        if inner and model.mid_block is not None:
            blocks["mid_block"] = model.mid_block
        return blocks | {f"up_blocks.{i}": block for i, block in enumerate(model.up_blocks)}

    def regions(self, model: UNet2DConditionModel) -> list[nn.Module]:
        """Return the live ResBlocks and transformer blocks."""
        return [module for module in model.modules() if isinstance(module, REGIONS)]
