"""CUT: PrunedUNet2DConditionModel, a UNet whose removed units are physically gone, and `slice_unet`, which makes one.

A pruned UNet's `config.json` holds the dense config and
`pruning: {format: 1, kept: {module path: unit indices}, removed: [paths]}`, by name, in the dense UNet's units. A
module path that is not named keeps all. A removed stage is named by its down block.

Several pruned UNets may share one set of weights, a *backbone*: a *member's* folder has a config and `backbone.json`,
which names the backbone's folder, and loading slices it.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.model_loading_utils import load_state_dict

from prunekit.errors import UserError

from .attaching import AttachableUNet, blank_copy
from .units import Architecture, UnitGroup, UnitSpace, attention, depth, discover, feedforward, resnet
from .units.discovery import match
from .units.emptied import names_in_files, renamed
from .units.space import near

__all__ = ["ModelMixin", "PrunedUNet2DConditionModel", "slice_unet"]  # a pipeline's loader looks for ModelMixin here

FORMAT = 1
CLASS_FILE = "modeling_pruned"  # an export's file with the class, and its entry in model_index.json
POINTER = "backbone.json"  # of a member: where its weights are
_WIDTH_KINDS = {"resnet": resnet, "attention": attention, "feedforward": feedforward}


class PrunedUNet2DConditionModel(AttachableUNet):
    """A UNet2DConditionModel without the units that an Architecture removed; built from its config alone.

    pruning: None, or {format: 1, kept, removed} as described in this module; ValueError where it does not fit.
    **config: as UNet2DConditionModel's, of the dense UNet.
    """

    def __init__(self, pruning: Mapping[str, Any] | None = None, **config):
        super().__init__(**config)
        if pruning is not None:
            _cut(self, read_pruning(pruning, discover(self, depth="blocks")))
        self.register_to_config(pruning=pruning)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **options) -> Any:
        """As the stock method; `auto_map`, by which diffusers finds a class file, is no part of the UNet."""
        return super().from_config({key: value for key, value in config.items() if key != "auto_map"}, **options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options) -> PrunedUNet2DConditionModel:
        """As the stock method; also from a member's folder, whose weights are those of a shared backbone."""
        backbone = backbone_of(pretrained_model_name_or_path)
        if backbone is None:
            return super().from_pretrained(pretrained_model_name_or_path, **options)
        return slice_member(super().from_pretrained(backbone, **options), pretrained_model_name_or_path)

    @classmethod
    def _load_pretrained_model(
        cls,
        model: Any,
        state_dict: Mapping[str, torch.Tensor] | None,
        resolved_model_file: list,
        pretrained_model_name_or_path: str | Path,
        loaded_keys: list[str],
        **options,
    ) -> Any:
        """As the stock method; tensors of the files get the names that they have in memory."""
        names = {in_file: own for own, in_file in names_in_files(model).items()}
        if names and state_dict is not None:
            state_dict = renamed(state_dict, names)
        elif names:  # several files
            no_map = options.get("disable_mmap", False)
            resolved_model_file = [
                renamed(load_state_dict(path, disable_mmap=no_map), names) for path in resolved_model_file
            ]
        keys = [names.get(key, key) for key in loaded_keys]
        return super()._load_pretrained_model(
            model, state_dict, resolved_model_file, pretrained_model_name_or_path, keys, **options
        )

    @functools.wraps(UNet2DConditionModel.save_pretrained)  # pipelines read the options from the signature
    def save_pretrained(self, *arguments, **options):  # noqa: D102
        handle = self.register_state_dict_post_hook(_name_as_in_files)
        try:
            super().save_pretrained(*arguments, **options)
        finally:
            handle.remove()

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
        raise UserError("a soft Architecture cannot be cut; decide it first: architecture.threshold(0.5)")
    match(unet, architecture.space)
    if any(getattr(module, "fused_projections", False) for module in unet.modules()):
        raise UserError("fused attention projections cannot be cut; call unet.unfuse_qkv_projections() first")
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


def save_member(unet: UNet2DConditionModel, architecture: Architecture, folder: Path, backbone: Path) -> None:
    """Write a folder that loads as the UNet sliced to the Architecture, and takes its weights from another's.

    unet: a dense one. backbone: where it is saved; it is named by its path from the folder, so both move together.
    """
    slice_unet(blank_copy(unet), architecture).save_config(folder)
    pointer = {"format": FORMAT, "backbone": Path(os.path.relpath(backbone, folder)).as_posix()}
    (folder / POINTER).write_text(json.dumps(pointer, indent=2) + "\n", encoding="utf-8")


def backbone_of(folder: str | Path) -> Path | None:
    """Where the weights of a member's folder are; None for any other folder. A ValueError of one line for a bad one."""
    path = Path(folder) / POINTER
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise UserError(f"{path} has format {content['format']!r}; this version of prunekit reads format {FORMAT}")
        backbone = (Path(folder) / content["backbone"]).resolve()
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} does not name a backbone: {error!r}") from error
    if not backbone.is_dir():
        raise UserError(f"{path} names {backbone}, which is not there: copy the backbone's folder too")
    return backbone


def slice_member(unet: UNet2DConditionModel, folder: str | Path) -> PrunedUNet2DConditionModel:
    """A backbone sliced to the Architecture of a member's folder."""
    pruning = PrunedUNet2DConditionModel.load_config(folder)["pruning"]
    return slice_unet(unet, read_pruning(pruning, discover(unet, depth="blocks")))


def _name_as_in_files(unet: torch.nn.Module, state: dict[str, torch.Tensor], *_: Any) -> None:
    """Give a state dict's tensors, in place and in their order, the names that they have in files."""
    items = renamed(state, names_in_files(unet))
    state.clear()
    state.update(items)


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


def read_pruning(pruning: Mapping[str, Any], space: UnitSpace) -> Architecture:
    """The Architecture that a config's record describes; ValueError that says what is wrong with it."""
    if not isinstance(pruning, Mapping) or pruning.get("format") != FORMAT:
        known = pruning.get("format") if isinstance(pruning, Mapping) else pruning
        raise UserError(
            f"the config's pruning has format {known!r}; this version of prunekit reads format {FORMAT}. Use the "
            "version that wrote it, or a newer one"
        )
    unknown = set(pruning) - {"format", "kept", "removed"}
    if unknown:
        raise UserError(f"the config's pruning has unknown keys {sorted(unknown)}; allowed: format, kept, removed")
    values = torch.ones(space.size, dtype=torch.bool, device="cpu")
    widths = {group.path: group for group in space.width_groups}
    depths = {group.path: group for group in space.depth_groups}
    for path, indices in pruning.get("kept", {}).items():
        group = _named(path, widths, "pruning.kept", "a ResBlock, attention or feed-forward")
        indices = list(indices)
        if not all(isinstance(index, int) and 0 <= index < group.size for index in indices):
            raise UserError(f"pruning.kept[{path!r}] holds indices outside 0 to {group.size - 1}: {indices}")
        if sorted(set(indices)) != indices:
            raise UserError(f"pruning.kept[{path!r}] is not sorted, or names a unit twice: {indices}")
        part = space.slice(group)
        values[part] = False
        values[[part.start + index for index in indices]] = True
    for path in pruning.get("removed", ()):
        group = _named(path, depths, "pruning.removed", "a layer that can be removed")
        values[space.slice(group)] = False
    return Architecture(space, values)


def _named(path: str, groups: Mapping[str, UnitGroup], where: str, what: str) -> UnitGroup:
    if path not in groups:
        raise UserError(f"{where} names {path!r}, which is not {what} of this UNet.{near(path, groups)}")
    return groups[path]
