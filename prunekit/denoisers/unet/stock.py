"""The stock form of a depth-only pruned UNet: a UNet2DConditionModel that needs no prunekit to load.

In a pruned UNet, a removed down layer pushes a copy of the skip before it. So the pruned UNet equals a smaller stock
UNet if, level by level and in order, the remaining up layers read the skips that the smaller UNet would push. BK-SDM's
models have this property (Kim et al., BK-SDM, 2023). The stock form renumbers the layers: paths of the pruned form are
not valid in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from torch import nn

from prunekit.core.renumbering import rebuilt
from prunekit.core.slicing import dense_config

from .pruned import PrunedUNet2DConditionModel
from .removed import BYPASSED

_Block: TypeAlias = CrossAttnDownBlock2D | DownBlock2D | UNetMidBlock2DCrossAttn | CrossAttnUpBlock2D | UpBlock2D
_BLOCKS = ("down_blocks", "mid_block", "up_blocks")
_PER_LEVEL = (  # config entries with one value for all levels or one per level, outermost first
    "block_out_channels",
    "down_block_types",
    "only_cross_attention",
    "cross_attention_dim",
    "attention_head_dim",
    "transformer_layers_per_block",
)
_PER_LEVEL_REVERSED = ("up_block_types", "reverse_transformer_layers_per_block")  # the same, innermost first


def as_stock(unet: PrunedUNet2DConditionModel) -> UNet2DConditionModel | None:
    """Return a stock UNet with the same function and copied weights, or None if no stock config expresses the cut.

    No stock config expresses a width cut, a layer that lost only its ResBlock or only its attention (unless the block
    lost all attentions), a mid block that lost a part, or skips that do not pair up.
    Works on the meta device. The result has the UNet's dtype, device, training mode, frozen parameters and attention
    processors.
    """
    form = _Form.of(unet)
    if form is None or (config := _config(unet, form)) is None:
        return None
    sources = dict(_sources(unet, form))
    return rebuilt(unet.structure, UNet2DConditionModel, config, sources, unet)


@dataclass(frozen=True)
class _Form:
    """The remaining layers: per level, outermost first, their indices in its down block and in its up block."""

    down: list[list[int]]
    up: list[list[int]]
    has_mid: bool

    @classmethod
    def of(cls, unet: UNet2DConditionModel) -> _Form | None:
        """Return the form of a UNet; None if its remaining layers are not those of a stock UNet."""
        blocks = [*unet.down_blocks, *reversed(unet.up_blocks)]
        live = [layers for block in blocks if (layers := _live_layers(block)) is not None]
        mid = [_is_live(module) for module in _layer_modules(unet.mid_block)]
        if len(live) < len(blocks) or (any(mid) and not all(mid)):
            return None
        down, up = live[: len(unet.down_blocks)], live[len(unet.down_blocks) :]
        size = next((i + 1 for i, block in enumerate(unet.down_blocks) if _is_shut(block)), len(down))
        if any(down[size:]) or any(up[size:]) or (size < len(down) and any(mid)):
            return None
        if not _skips_pair_up(unet, down, up, size):
            return None
        return cls(down[:size], up[:size], any(mid))


def _layer_modules(block: UNetMidBlock2DCrossAttn | None) -> list[nn.Module]:
    return [] if block is None else [*block.resnets, *(getattr(block, "attentions", None) or ())]


def _is_live(module: nn.Module) -> bool:
    return not isinstance(module, BYPASSED)


def _is_shut(block: CrossAttnDownBlock2D | DownBlock2D) -> bool:
    """Return whether the block's downsampler was removed, and with it the levels further in."""
    return any(not _is_live(sampler) for sampler in block.downsamplers or ())


def _live(modules: nn.ModuleList | None) -> list[int]:
    return [index for index, module in enumerate(modules or ()) if _is_live(module)]


def _live_layers(block: _Block) -> list[int] | None:
    """Return the indices of a block's remaining layers; None unless all of them or none have their attention."""
    resnets, attentions = _live(block.resnets), _live(getattr(block, "attentions", None))
    return resnets if attentions in ([], resnets) else None


def _skips_pair_up(unet: UNet2DConditionModel, down: list[list[int]], up: list[list[int]], size: int) -> bool:
    """Return whether the remaining up layers read the skips that a stock UNet of the remaining down layers pushes.

    A skip is named by the module that made it; a removed down layer or downsampler pushes the previous name again.
    """
    skip: Any = "conv_in"
    stack, entered = [skip], []
    for level, block in enumerate(unet.down_blocks):
        entered.append(skip)
        for index in range(len(block.resnets)):
            skip = (level, index) if index in down[level] else skip
            stack.append(skip)
        for sampler in block.downsamplers or ():
            skip = (level, "downsampler") if _is_live(sampler) else skip
            stack.append(skip)
    for level, block in reversed(list(enumerate(reversed(unet.up_blocks)))):
        offered = [stack.pop() for _ in block.resnets]
        read = [offered[index] for index in up[level]]
        if level < size and read != [*((level, index) for index in reversed(down[level])), entered[level]]:
            return False
    return True


def _config(unet: UNet2DConditionModel, form: _Form) -> dict[str, Any] | None:
    """Return the stock config; None if the mid block and the innermost level need different transformer blocks."""
    config = dense_config(unet)
    gone = len(unet.down_blocks) - len(form.down)
    for key in _PER_LEVEL:
        if isinstance(config[key], list | tuple):
            config[key] = config[key][: len(form.down)]
    for key in _PER_LEVEL_REVERSED:
        if isinstance(config[key], list | tuple):
            config[key] = config[key][gone:]
    blocks = {"down_block_types": unet.down_blocks[: len(form.down)], "up_block_types": unet.up_blocks[gone:]}
    for (key, modules), plain in zip(blocks.items(), ("DownBlock2D", "UpBlock2D"), strict=True):
        names = zip(modules, config[key], strict=True)
        config[key] = tuple(plain if _lost_attentions(block) else name for block, name in names)
    layers = [len(indices) for indices in form.down]
    config["layers_per_block"] = layers[0] if len(set(layers)) == 1 else layers
    if not form.has_mid:
        config["mid_block_type"] = None
    transformers = _transformer_blocks(unet, form)
    return None if transformers is None else {**config, **transformers}


def _lost_attentions(block: _Block) -> bool:
    """Return whether a block still has layers but lost all its attentions."""
    return bool(_live(block.resnets)) and hasattr(block, "attentions") and not _live(block.attentions)


def _transformer_blocks(unet: UNet2DConditionModel, form: _Form) -> dict[str, Any] | None:
    """Return the config entries with each layer's number of transformer blocks; {} if none was removed.

    A stock mid block takes the number of the innermost level's first layer. None if the mid block has another number.
    """
    if all(map(_is_live, _all_transformer_blocks(unet))):
        return {}
    size = len(form.down)
    down = [_block_counts(unet.down_blocks[level], form.down[level]) for level in range(size)]
    up = [_block_counts(unet.up_blocks[-1 - level], form.up[level]) for level in range(size)]
    if form.has_mid:
        (mid,) = _block_counts(unet.mid_block, range(len(unet.mid_block.attentions)))
        down[-1] = down[-1] or [mid]
        if down[-1][0] != mid:
            return None
    return {"transformer_layers_per_block": down, "reverse_transformer_layers_per_block": up[::-1]}


def _all_transformer_blocks(unet: UNet2DConditionModel) -> Iterator[nn.Module]:
    for name, module in unet.named_modules():
        if name.rpartition(".")[2] == "transformer_blocks":
            yield from module


def _block_counts(block: _Block, layers: list[int] | range) -> list[int]:
    attentions = getattr(block, "attentions", None)
    return [len(_live(attentions[index].transformer_blocks)) for index in layers if attentions and _live(attentions)]


def _sources(unet: UNet2DConditionModel, form: _Form) -> Iterator[tuple[str, str]]:
    """Yield (path in the stock form, path in the UNet) of modules that together hold all weights."""
    yield from ((name, name) for name, _ in unet.named_children() if name not in _BLOCKS)
    if form.has_mid:
        yield from _layer_sources(unet, "mid_block", "mid_block", list(range(len(unet.mid_block.resnets))))
    levels, size = len(unet.down_blocks), len(form.down)
    for level in range(size):
        path, source = f"down_blocks.{level}", f"down_blocks.{level}"
        yield from _layer_sources(unet, path, source, form.down[level])
        if level < size - 1:
            yield f"{path}.downsamplers", f"{source}.downsamplers"
        path, source = f"up_blocks.{size - 1 - level}", f"up_blocks.{levels - 1 - level}"
        yield from _layer_sources(unet, path, source, form.up[level])
        if level > 0:
            yield f"{path}.upsamplers", f"{source}.upsamplers"


def _layer_sources(unet: UNet2DConditionModel, path: str, source: str, layers: list[int]) -> Iterator[tuple[str, str]]:
    attentions = getattr(unet.get_submodule(source), "attentions", None) or ()
    for new, old in enumerate(layers):
        yield f"{path}.resnets.{new}", f"{source}.resnets.{old}"
        if old >= len(attentions) or not _is_live(attentions[old]):
            continue
        to, of = f"{path}.attentions.{new}", f"{source}.attentions.{old}"
        yield from ((f"{to}.{name}", f"{of}.{name}") for name in ("norm", "proj_in", "proj_out"))
        for index, live in enumerate(_live(attentions[old].transformer_blocks)):
            yield f"{to}.transformer_blocks.{index}", f"{of}.transformer_blocks.{live}"
