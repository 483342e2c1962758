"""The walk over a UNet in the order of its forward pass, and the check that prunekit supports the UNet."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from diffusers.models.upsampling import Upsample2D
from torch import nn

from prunekit.core.transformer_layers import EmptiedAttention, EmptiedFeedForward, check_plain
from prunekit.runtime.errors import UserError

from .removed import BYPASSED, BypassedModule, BypassedResnet, BypassedTransformer, EmptiedResnet

SUPPORTED = (
    "prunekit supports UNet2DConditionModel with CrossAttnDownBlock2D / DownBlock2D, UNetMidBlock2DCrossAttn or no "
    "mid block, and UpBlock2D / CrossAttnUpBlock2D, as in Stable Diffusion 1.x, 2.x and XL"
)
_PLAIN = {  # values that config entries of a supported model may have
    "only_cross_attention": (False,),
    "mid_block_only_cross_attention": (None, False),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "addition_embed_type": (None, "text_time"),
    "time_embedding_type": ("positional",),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "cross_attention_norm": (None,),
    "attention_type": ("default",),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "resnet_skip_time_act": (False,),
    "class_embeddings_concat": (False,),
}
_BLOCKS = {
    "down_blocks": (CrossAttnDownBlock2D, DownBlock2D),
    "mid_block": (UNetMidBlock2DCrossAttn,),
    "up_blocks": (CrossAttnUpBlock2D, UpBlock2D),
}


@dataclass(frozen=True)
class Site:
    """One layer that the walk visits.

    kind: "resnet", "transformer", "block", "attention", "feedforward", "downsampler" or "upsampler".
    level: level of its output's resolution: 0 after `conv_in`, one more after every downsampler.
    hidden: channels of the hidden state that enters the layer; in up blocks, without the skip.
    is_last: whether it is the last layer of its kind in a down or up block.
    """

    kind: str
    path: str
    module: Any
    level: int
    hidden: int
    is_last: bool = False


def check_supported(unet: nn.Module) -> None:
    """Raise UserError for a model on which the laws have not been verified."""
    if not isinstance(unet, UNet2DConditionModel):
        raise UserError(f"{type(unet).__name__} is not supported: {SUPPORTED}")
    for key, allowed in _PLAIN.items():
        value = unet.config.get(key, allowed[0])
        values = value if isinstance(value, list | tuple) else (value,)
        if any(item not in allowed for item in values):
            raise UserError(f"a UNet with {key}={value!r} is not supported (allowed: {allowed}): {SUPPORTED}")
    for name, classes in _BLOCKS.items():
        blocks = [unet.mid_block] if name == "mid_block" else getattr(unet, name)
        for block in blocks:
            if type(block) not in classes and not (name == "mid_block" and block is None):
                raise UserError(f"{name} with a {type(block).__name__} is not supported: {SUPPORTED}")
    for site in walk(unet):
        _check_site(site)


def _check_site(site: Site) -> None:
    module, expected = (
        site.module,
        {
            "resnet": (ResnetBlock2D, EmptiedResnet),
            "transformer": (Transformer2DModel,),
            "block": (BasicTransformerBlock,),
            "attention": (Attention, EmptiedAttention),
            "feedforward": (FeedForward, EmptiedFeedForward),
            "downsampler": (Downsample2D,),
            "upsampler": (Upsample2D,),
        }[site.kind],
    )
    layers: list[nn.Module] = []
    if isinstance(module, ResnetBlock2D):
        layers = [module.conv1, module.conv2, module.time_emb_proj]
    elif isinstance(module, Attention):
        layers = [module.to_q, module.to_k, module.to_v, module.to_out[0]]
    elif isinstance(module, FeedForward):
        expected = expected if isinstance(module.net[0], GEGLU) else ()
        layers = [module.net[2]]
    if not isinstance(module, expected):
        raise UserError(f"{site.path} is a {type(module).__name__}, which is not supported: {SUPPORTED}")
    check_plain(site.path, layers, (nn.Conv2d, nn.Linear))


def walk(unet: UNet2DConditionModel) -> Iterator[Site]:
    """Yield every live layer between `conv_in` and `conv_norm_out`, in the order of the forward pass.

    Removed layers of a pruned UNet are left out; emptied layers are included.
    """
    hidden, level = unet.conv_in.out_channels, 0
    for index, block in enumerate(unet.down_blocks):
        path = f"down_blocks.{index}"
        hidden = yield from _layers(path, block, level, hidden)
        for position, sampler in enumerate(block.downsamplers or ()):
            level += 1
            if not isinstance(sampler, BypassedModule):
                yield Site("downsampler", f"{path}.downsamplers.{position}", sampler, level, hidden)
    if unet.mid_block is not None:
        hidden = yield from _layers("mid_block", unet.mid_block, level, hidden)
    for index, block in enumerate(unet.up_blocks):
        path = f"up_blocks.{index}"
        hidden = yield from _layers(path, block, level, hidden)
        for position, sampler in enumerate(block.upsamplers or ()):
            level -= 1
            if not isinstance(sampler, BypassedModule):
                yield Site("upsampler", f"{path}.upsamplers.{position}", sampler, level, hidden)


def _layers(path: str, block: CrossAttnDownBlock2D, level: int, hidden: int) -> Generator[Site, None, int]:
    resnets, attentions = block.resnets, getattr(block, "attentions", None) or ()
    in_mid = path == "mid_block"
    for index, resnet in enumerate(resnets):
        if not isinstance(resnet, BypassedResnet):
            is_last = not in_mid and index == len(resnets) - 1
            yield Site("resnet", f"{path}.resnets.{index}", resnet, level, hidden, is_last)
            hidden = resnet.out_channels
        if index < len(attentions) and not isinstance(attentions[index], BypassedTransformer):
            is_last = not in_mid and index == len(attentions) - 1
            yield from _transformer(f"{path}.attentions.{index}", attentions[index], level, hidden, is_last)
    return hidden


def _transformer(path: str, layer: Transformer2DModel, level: int, hidden: int, is_last: bool) -> Iterator[Site]:
    yield Site("transformer", path, layer, level, hidden, is_last)
    for index, block in enumerate(getattr(layer, "transformer_blocks", ())):
        if isinstance(block, BYPASSED):
            continue
        inner = f"{path}.transformer_blocks.{index}"
        yield Site("block", inner, block, level, layer.inner_dim)
        yield Site("attention", f"{inner}.attn1", block.attn1, level, layer.inner_dim)
        if block.attn2 is not None:
            yield Site("attention", f"{inner}.attn2", block.attn2, level, layer.inner_dim)
        yield Site("feedforward", f"{inner}.ff", block.ff, level, layer.inner_dim)


def resolutions(unet: UNet2DConditionModel, sample_size: tuple[int, int]) -> list[tuple[int, int]]:
    """Return (h, w) of every level for a latent size; an upsampler restores the size before its downsampler."""
    size = _conv_size(unet.conv_in, sample_size)
    sizes = [size]
    for block in unet.down_blocks:
        for sampler in block.downsamplers or ():
            if not isinstance(sampler, BypassedModule):
                pad = 1 if sampler.padding == 0 else 0
                size = _conv_size(sampler.conv, (size[0] + pad, size[1] + pad))
            sizes.append(size)
    return sizes


def _conv_size(conv: nn.Conv2d, size: tuple[int, int]) -> tuple[int, int]:
    padding = conv.padding
    assert not isinstance(padding, str)
    height, width = (
        (size[axis] + 2 * padding[axis] - conv.kernel_size[axis]) // conv.stride[axis] + 1 for axis in (0, 1)
    )
    return height, width
