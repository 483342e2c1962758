"""The record of a cut in a pruned model's config: `pruning: {format, kept, removed}`, in the dense model's units.

Format 1 has the kept unit indices by module path, and the paths of the whole layers that are removed. Format 2 has the
indices by the group's name, "kind:path", and is written for models where one path holds two groups. A group that is not
named keeps all its units. A removed stage is named by its first block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from prunekit.runtime.errors import UserError

from .space import Architecture, UnitGroup, UnitSpace, near

FORMATS = (1, 2)


def kept_units(model: Any, group: str) -> list[int] | None:
    """Return the dense model's units that earlier cuts kept of the group with this name; None if it was not cut."""
    kept = (model.config.get("pruning") or {}).get("kept") or {}
    return kept.get(group, kept.get(group.partition(":")[2]))


def kept_groups(model: Any, group: str) -> int | None:
    """Return the number of units that earlier cuts kept of the group with this name; None if it was not cut."""
    units = kept_units(model, group)
    return None if units is None else len(units)


def record_cut(architecture: Architecture, model: nn.Module, space: UnitSpace) -> dict[str, Any]:
    """Return the record of a cut, combined with the record of the model's earlier cuts.

    Args:
        architecture: the cut, in the units of the model before it.
        model: the model before the cut; its config has the earlier record, if there is one.
        space: space with every group of the model.

    """
    config: Any = model.config
    gone, before = architecture.removed(), config.get("pruning") or {"format": 1, "kept": {}, "removed": []}
    paths = [group.path for group in space.width_groups]
    version = max(before["format"], 1 if len(set(paths)) == len(paths) else 2)
    kept = {key: list(indices) for key, indices in before["kept"].items()}
    path_of = {_key(group, version): group.path for group in space.width_groups} | {
        key: key.partition(":")[2] if version > 1 else key for key in kept
    }
    for group in architecture.space.width_groups:
        indices, key = architecture.kept(group.name), _key(group, version)
        if len(indices) < group.size:
            earlier = kept.get(key, range(group.size))
            kept[key] = [earlier[index] for index in indices]
    removed = [*before["removed"], *(group.path for group in gone)]

    def is_gone(path: str) -> bool:
        return any(group.removes(path) and group.path != path for group in gone)

    return {
        "format": version,
        "kept": {key: kept[key] for key in sorted(kept) if not is_gone(path_of[key]) and path_of[key] not in removed},
        "removed": sorted(path for path in removed if not is_gone(path)),
    }


def read_pruning(pruning: Mapping[str, Any], space: UnitSpace) -> Architecture:
    """Return the Architecture that a config's record describes.

    Raises:
        UserError: a format that this version does not read, or a record that does not fit the model.

    """
    version = pruning.get("format") if isinstance(pruning, Mapping) else pruning
    if not isinstance(pruning, Mapping) or version not in FORMATS:
        raise UserError(
            f"the config's pruning has format {version!r}; this version of prunekit reads formats "
            f"{' and '.join(map(str, FORMATS))}. Use the version that wrote it, or a newer one"
        )
    unknown = set(pruning) - {"format", "kept", "removed"}
    if unknown:
        raise UserError(f"the config's pruning has unknown keys {sorted(unknown)}; allowed: format, kept, removed")
    values = torch.ones(space.size, dtype=torch.bool, device="cpu")
    widths = {_key(group, version): group for group in space.width_groups}
    depths = {group.path: group for group in space.depth_groups}
    for key, indices in pruning.get("kept", {}).items():
        group = _named(key, widths, "pruning.kept", "a layer with units")
        indices = list(indices)
        if not all(isinstance(index, int) and 0 <= index < group.size for index in indices):
            raise UserError(f"pruning.kept[{key!r}] holds indices outside 0 to {group.size - 1}: {indices}")
        if sorted(set(indices)) != indices:
            raise UserError(f"pruning.kept[{key!r}] must be sorted and name each unit once: {indices}")
        part = space.slice(group)
        values[part] = False
        values[[part.start + index for index in indices]] = True
    for path in pruning.get("removed", ()):
        group = _named(path, depths, "pruning.removed", "a layer that can be removed")
        values[space.slice(group)] = False
    return Architecture(space, values)


def _key(group: UnitGroup, version: int) -> str:
    """Return the key of a group in a record of the given format."""
    return group.path if version == 1 else group.name


def _named(key: str, groups: Mapping[str, UnitGroup], where: str, what: str) -> UnitGroup:
    if key not in groups:
        raise UserError(f"{where} names {key!r}, which is not {what} of this model.{near(key, groups)}")
    return groups[key]
