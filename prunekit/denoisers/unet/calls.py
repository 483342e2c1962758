"""How a UNet is called, and the shapes that a call has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D

from prunekit.core.call import Call, Fill

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from torch import Tensor, nn

REGIONS = (ResnetBlock2D, BasicTransformerBlock)
TIMESTEP = 500  # of an example
SIZES = 6  # original height and width, crop, target height and width (SDXL)


class UNetCalls:
    """What a UNet's calls look like: the part of its description that is about inputs. Methods are `Denoiser`'s."""

    def call(self, noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Call:
        """Return the call that predicts for noisy latents."""
        arguments = {"sample": noisy, "timestep": timesteps, "encoder_hidden_states": conditions["text"]}
        if "pooled" in conditions:
            added = {"text_embeds": conditions["pooled"], "time_ids": conditions["sizes"]}
            return Call({**arguments, "added_cond_kwargs": added})
        return Call(arguments)

    def example(
        self,
        model: UNet2DConditionModel,
        batch: int,
        latent: tuple[int, int],
        text_length: int,
        fill: Fill,
        timesteps: Tensor | None = None,
    ) -> Call:
        """Return a call of the right shapes."""
        noisy = fill("noisy", (batch, self.latent_channels(model), *latent))
        conditions = {"text": fill("text", (batch, text_length, self.text_width(model)))}
        if pooled := self.pooled_width(model):
            conditions["pooled"] = fill("pooled", (batch, pooled))
            conditions["sizes"] = fill("sizes", (batch, SIZES))
        timesteps = torch.tensor(TIMESTEP, device=noisy.device) if timesteps is None else timesteps
        return self.call(noisy, timesteps, conditions)

    def at(self, call: Call, noisy: Tensor, timesteps: Tensor) -> Call:
        """Return the call under the same conditions for other noisy latents at other timesteps."""
        return call.replace(sample=noisy, timestep=timesteps)

    def noisy(self, call: Call) -> Tensor:
        """Return the noisy latents of a call."""
        return call["sample"]

    def text_length(self, call: Call) -> int:
        """Return the tokens of a call's text."""
        return call["encoder_hidden_states"].shape[1]

    def latent_channels(self, model: UNet2DConditionModel) -> int:
        """Return the channels of the latents."""
        return model.config.in_channels

    def text_width(self, model: UNet2DConditionModel) -> int:
        """Return the width of the text states; a config may state it level by level."""
        width = model.config.cross_attention_dim
        return width if isinstance(width, int) else width[0]

    def pooled_width(self, model: UNet2DConditionModel) -> int:
        """Return the width of the pooled text embedding (SDXL); 0 where the UNet takes none."""
        config = model.config
        if config.addition_embed_type != "text_time":
            return 0
        return config.projection_class_embeddings_input_dim - SIZES * config.addition_time_embed_dim

    def blocks(self, model: UNet2DConditionModel, inner: bool = True) -> dict[str, nn.Module]:
        """Return the down blocks, the mid block (`inner`), and the up blocks, by path."""
        blocks = {f"down_blocks.{i}": block for i, block in enumerate(model.down_blocks)}
        if inner and model.mid_block is not None:
            blocks["mid_block"] = model.mid_block
        return blocks | {f"up_blocks.{i}": block for i, block in enumerate(model.up_blocks)}

    def regions(self, model: UNet2DConditionModel) -> list[nn.Module]:
        """Return the live ResBlocks and transformer blocks."""
        return [module for module in model.modules() if isinstance(module, REGIONS)]
