"""The structure of a UNet: its layers, the axes of their units, its depth units, and its streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from prunekit.core.axes import Activation, Axis, Layer, Passage
from prunekit.core.modulation import Modulation
from prunekit.core.record import kept_groups
from prunekit.core.space import UnitGroup
from prunekit.core.transformer_layers import (
    EmptiedAttention,
    EmptiedFeedForward,
    attention_layer,
    feedforward_layer,
    keep_heads,
)

from .removed import EmptiedResnet, bypass
from .walk import Site, check_supported, resolutions, walk

_NORM_OF = {"attn1": "norm1", "attn2": "norm2", "ff": "norm3"}  # the LayerNorm that only feeds this layer
_RESNET_AXES = {  # by the number of channel runs in the timestep projection: 2 for scale and shift, else 1
    shifts: (
        Axis("conv1", "out"),
        Axis("time_emb_proj", "out", copies=shifts),
        Axis("norm2", "each"),
        Axis("conv2", "in"),
    )
    for shifts in (1, 2)
}
_EMPTIED = {"resnet": EmptiedResnet, "attention": EmptiedAttention, "feedforward": EmptiedFeedForward}


class UNetStructure:
    """The part of a UNet's description that slicing needs. The class file of an export contains it too.

    Streams are the levels (0 after `conv_in`, one more after every downsampler), "text", and "one": a vector for each
    sample, such as the timestep embedding.
    """

    policies: ClassVar[tuple[str, ...]] = ("aptp", "all", "blocks", "none")
    richest: ClassVar[str] = "blocks"
    tables: ClassVar[tuple[str, ...]] = ()
    modulation: ClassVar[Modulation | None] = None  # not folded: it has few parameters, and a low rank errs by percents

    def check(self, model: nn.Module) -> None:
        """Raise UserError for a model on which the laws have not been verified."""
        check_supported(model)

    def layers(self, model: UNet2DConditionModel) -> list[Layer]:
        """Return all live layers in the order of the forward pass, starting with the stem."""
        return [_stem(model), *(_layer(model, site) for site in walk(model))]

    def groups(self, model: UNet2DConditionModel, policy: str) -> list[UnitGroup]:
        """Return the width groups of all layers, then the depth groups of a policy; see `prunekit.discover`."""
        sites = list(walk(model))
        groups = [layer.group for site in sites if (layer := _layer(model, site)).group is not None]
        if policy != "none":
            groups += [group for site in sites if (group := _depth_group(model, site, policy)) is not None]
        return groups + (_stages(model, sites) if policy == "blocks" else [])

    def passage(self, model: UNet2DConditionModel, group: UnitGroup) -> Passage:
        """Return where the hidden state enters and leaves a depth group; in up blocks, without the joined skip."""
        if group.kind == "stage":
            return Passage(group.covers[0], group.covers[-1], ("hidden_states",))
        if isinstance(model.get_submodule(group.path), ResnetBlock2D | EmptiedResnet):
            return Passage(group.path, group.path, ("input_tensor",), group.channels)
        return Passage(group.path, group.path, ("hidden_states",))

    def lengths(self, model: UNet2DConditionModel, latent: tuple[int, int], text_length: int) -> dict[str, int]:
        """Return the number of positions by stream: every level, "text", and "one" (1 per sample)."""
        sizes = resolutions(model, latent)
        levels = {str(level): height * width for level, (height, width) in enumerate(sizes)}
        return {**levels, "text": text_length, "one": 1}

    def after_cut(self, model: nn.Module, layer: Layer, kept: Sequence[int]) -> None:
        """Update an attention's number of heads and its widths."""
        module = model.get_submodule(layer.path)
        if isinstance(module, Attention):
            keep_heads(module, len(kept), layer.units.channels)

    def empty(self, model: nn.Module, layer: Layer) -> None:
        """Replace a layer that lost all its units by a module that keeps its output bias."""
        model.set_submodule(layer.path, _EMPTIED[layer.kind](model.get_submodule(layer.path)))

    def bypass(self, model: nn.Module, group: UnitGroup) -> None:
        """Replace the modules that a depth group covers by modules that pass the hidden state on."""
        for cover in group.covers:
            bypass(model, cover, group.channels)


def _stem(unet: UNet2DConditionModel) -> Layer:
    """Return the stem: both ends of the UNet, the timestep embedding, and (SDXL) the embedding of text and sizes."""
    streams = {"conv_in": "0", "conv_norm_out": "0", "conv_out": "0", "time_embedding": "one", "add_embedding": "one"}
    embeddings = [unet.time_embedding, getattr(unet, "add_embedding", None)]
    activations = [Activation(unet.conv_norm_out.num_channels, "0")]
    activations += [Activation(each.linear_1.out_features, "one") for each in embeddings if each is not None]
    return Layer("stem", "", streams=streams, activations=tuple(activations))


def _layer(unet: UNet2DConditionModel, site: Site) -> Layer:
    describe = {"resnet": _resnet, "attention": _attention, "feedforward": _feedforward}.get(site.kind)
    return Layer(site.kind, site.path, str(site.level)) if describe is None else describe(unet, site)


def _resnet(unet: UNet2DConditionModel, site: Site) -> Layer:
    """Describe a ResBlock. Its units are the channel groups of `norm2`; a zero before `conv2` removes a unit."""
    module, stream = site.module, str(site.level)
    if isinstance(module, EmptiedResnet):
        return Layer("resnet", site.path, stream)
    groups, width = module.norm2.num_groups, module.norm2.num_channels
    shifts = 2 if module.time_embedding_norm == "scale_shift" else 1  # scale and shift, one after the other
    activations = [Activation(width, stream, "unit"), Activation(module.in_channels, stream, "any")]
    if not module.skip_time_act:
        activations.append(Activation(module.time_emb_proj.in_features, "one", "any"))
    return Layer(
        "resnet",
        site.path,
        stream,
        {"time_emb_proj": "one"},
        UnitGroup("resnet", site.path, groups, width // groups),
        _RESNET_AXES[shifts],
        feeds=(f"{site.path}.norm1",),
        activations=tuple(activations),
    )


def _attention(unet: UNet2DConditionModel, site: Site) -> Layer:
    keys = "text" if getattr(site.module, "is_cross_attention", False) else None
    return attention_layer(site.path, site.module, str(site.level), keys, feeds=_feeds(site))


def _feedforward(unet: UNet2DConditionModel, site: Site) -> Layer:
    groups = kept_groups(unet, f"feedforward:{site.path}")
    return feedforward_layer(site.path, site.module, str(site.level), groups, _feeds(site))


def _feeds(site: Site) -> tuple[str, ...]:
    block, _, name = site.path.rpartition(".")
    return (f"{block}.{_NORM_OF[name]}",)


def _depth_group(unet: UNet2DConditionModel, site: Site, policy: str) -> UnitGroup | None:
    if site.kind == "block":
        layer = unet.get_submodule(site.path.rpartition(".")[0])
        if policy == "aptp" or len(layer) == 1:
            return None
        return UnitGroup("block", site.path, 1, site.hidden, (site.path,))
    if site.kind not in ("resnet", "transformer") or (policy == "aptp" and not site.is_last):
        return None
    if site.kind == "resnet" and site.module.out_channels != site.hidden:
        return None
    return UnitGroup("layer", site.path, 1, site.hidden, (site.path,))


def _stages(unet: UNet2DConditionModel, sites: list[Site]) -> list[UnitGroup]:
    num_levels = len(unet.down_blocks)
    mid = () if unet.mid_block is None else ("mid_block",)
    by_path = {site.path: site for site in sites}
    stages = []
    for level in range(1, num_levels):
        down = by_path.get(f"down_blocks.{level - 1}.downsamplers.0")
        up = by_path.get(f"up_blocks.{num_levels - 1 - level}.upsamplers.0")
        if down is None or up is None or down.hidden != up.hidden:
            continue
        inner = range(level, num_levels)
        covers = (
            down.path,
            *(f"down_blocks.{index}" for index in inner),
            *mid,
            *(f"up_blocks.{num_levels - 1 - index}" for index in reversed(inner)),
        )
        stages.append(UnitGroup("stage", f"down_blocks.{level}", 1, down.hidden, covers))
    return stages
