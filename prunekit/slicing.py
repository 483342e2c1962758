"""CUT: PrunedUNet2DConditionModel, a UNet whose removed units are physically gone, and `slice_unet`, which makes one.

A pruned UNet's `config.json` holds the dense config and
`pruning: {format: 1, kept: {module path: unit indices}, removed: [paths]}`, by name, in the dense UNet's units. A
module path that is not named keeps all. A removed stage is named by its down block.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from .units import Architecture, UnitGroup, UnitSpace, attention, depth, discover, feedforward, resnet
from .units.discovery import match
from .units.space import near

__all__ = ["ModelMixin", "PrunedUNet2DConditionModel", "slice_unet"]  # a pipeline's loader looks for ModelMixin here

FORMAT = 1
_WIDTH_KINDS = {"resnet": resnet, "attention": attention, "feedforward": feedforward}


class PrunedUNet2DConditionModel(UNet2DConditionModel):
    """A UNet2DConditionModel without the units that an Architecture removed; built from its config alone.

    pruning: None, or {format: 1, kept, removed} as described in this module; ValueError where it does not fit.
    **config: as UNet2DConditionModel's, of the dense UNet.
    """

    def __init__(self, pruning: Mapping[str, Any] | None = None, **config):
        super().__init__(**config)
        if pruning is not None:
            _cut(self, _read(pruning, discover(self, depth="blocks")))
        self.register_to_config(pruning=pruning)

    def set_attention_slice(self, slice_size: str | int | list[int] = "auto") -> None:
        """As the stock method; "auto" halves every attention's own heads, and leaves one where there is one."""
        if slice_size != "auto":
            super().set_attention_slice(slice_size)
            return
        for module in self.modules():
            if isinstance(module, Attention):
                module.set_attention_slice(max(1, module.heads // 2))


_parameters = inspect.signature(UNet2DConditionModel.__init__).parameters.values()
PrunedUNet2DConditionModel.__init__.__signature__ = inspect.Signature(  # diffusers reads the config's keys from it
    [*_parameters, inspect.Parameter("pruning", inspect.Parameter.KEYWORD_ONLY, default=None)]
)


def slice_unet(unet: UNet2DConditionModel, architecture: Architecture) -> PrunedUNet2DConditionModel:
    """A pruned copy of a UNet that keeps what a boolean Architecture keeps; the UNet is left as it is.

    Works on the meta device, on a UNet that is pruned already, and with an Architecture from another instance of the
    same space; ValueError where the Architecture does not fit the UNet.
    The copy has the UNet's dtype, device, training mode, frozen parameters and attention processors.
    """
    if not architecture.is_boolean:
        raise ValueError("a soft Architecture cannot be cut; decide it first: architecture.threshold(0.5)")
    match(unet, architecture.space)
    if any(getattr(module, "fused_projections", False) for module in unet.modules()):
        raise ValueError("fused attention projections cannot be cut; call unet.unfuse_qkv_projections() first")
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    with torch.device("meta"):
        pruned = PrunedUNet2DConditionModel(**config)
    pruned.load_state_dict(unet.state_dict(), assign=True)
    frozen = {name for name, parameter in unet.named_parameters() if not parameter.requires_grad}
    for name, parameter in pruned.named_parameters():
        parameter.requires_grad_(name not in frozen)
    for module, original in _pairs(pruned, unet):
        module.set_processor(original.processor)
    _cut(pruned, architecture)
    own = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    for parameter in pruned.parameters():
        if parameter.untyped_storage().data_ptr() in own:  # was not cut: still the UNet's own memory
            parameter.data = parameter.data.clone()
    pruned.train(unet.training)
    pruned.register_to_config(pruning=_record(architecture, unet.config.get("pruning")))
    return pruned


def _pairs(pruned: UNet2DConditionModel, unet: UNet2DConditionModel):
    originals = dict(unet.named_modules())
    return [(module, originals[name]) for name, module in pruned.named_modules() if isinstance(module, Attention)]


def _cut(unet: UNet2DConditionModel, architecture: Architecture) -> None:
    """Cut a UNet in place."""
    gone = architecture.removed()
    for group in architecture.space.width_groups:
        if any(removed.removes(group.path) for removed in gone):
            continue
        kept = architecture.kept(group.name)
        if len(kept) < group.size:
            _WIDTH_KINDS[group.kind].cut(unet, group, kept)
    for group in gone:
        depth.cut(unet, group)


def _record(architecture: Architecture, before: Mapping[str, Any] | None) -> dict[str, Any]:
    """The config's record of this cut after an earlier one, in the dense UNet's unit indices."""
    gone = architecture.removed()
    before = before or {"kept": {}, "removed": []}
    kept = {path: list(indices) for path, indices in before["kept"].items()}
    for group in architecture.space.width_groups:
        indices = architecture.kept(group.name)
        if len(indices) < group.size:
            earlier = kept.get(group.path, range(group.size))
            kept[group.path] = [earlier[index] for index in indices]
    removed = [*before["removed"], *(group.path for group in gone)]

    def is_gone(path: str) -> bool:
        return any(group.removes(path) and group.path != path for group in gone)

    return {
        "format": FORMAT,
        "kept": {path: kept[path] for path in sorted(kept) if not is_gone(path) and path not in removed},
        "removed": sorted(path for path in removed if not is_gone(path)),
    }


def _read(pruning: Mapping[str, Any], space: UnitSpace) -> Architecture:
    """The Architecture that a config's record describes; ValueError that says what is wrong with it."""
    if not isinstance(pruning, Mapping) or pruning.get("format") != FORMAT:
        known = pruning.get("format") if isinstance(pruning, Mapping) else pruning
        raise ValueError(
            f"the config's pruning has format {known!r}; this version of prunekit reads format {FORMAT}. Use the "
            "version that wrote it, or a newer one"
        )
    unknown = set(pruning) - {"format", "kept", "removed"}
    if unknown:
        raise ValueError(f"the config's pruning has unknown keys {sorted(unknown)}; allowed: format, kept, removed")
    values = torch.ones(space.size, dtype=torch.bool, device="cpu")
    widths = {group.path: group for group in space.width_groups}
    depths = {group.path: group for group in space.depth_groups}
    for path, indices in pruning.get("kept", {}).items():
        group = _named(path, widths, "pruning.kept", "a ResBlock, attention or feed-forward")
        indices = list(indices)
        if not all(isinstance(index, int) and 0 <= index < group.size for index in indices):
            raise ValueError(f"pruning.kept[{path!r}] holds indices outside 0 to {group.size - 1}: {indices}")
        if sorted(set(indices)) != indices:
            raise ValueError(f"pruning.kept[{path!r}] is not sorted, or names a unit twice: {indices}")
        part = space.slice(group)
        values[part] = False
        values[[part.start + index for index in indices]] = True
    for path in pruning.get("removed", ()):
        group = _named(path, depths, "pruning.removed", "a layer that can be removed")
        values[space.slice(group)] = False
    return Architecture(space, values)


def _named(path: str, groups: Mapping[str, UnitGroup], where: str, what: str) -> UnitGroup:
    if path not in groups:
        raise ValueError(f"{where} names {path!r}, which is not {what} of this UNet.{near(path, groups)}")
    return groups[path]
