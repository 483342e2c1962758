"""`discover`: the UnitSpace of a denoiser."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn

from prunekit.runtime.errors import UserError

from .axes import Layer
from .denoiser import Structure
from .registry import denoiser_of
from .space import UnitGroup, UnitSpace, near


def discover(
    model: nn.Module,
    depth: str = "aptp",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> UnitSpace:
    """Return the UnitSpace of a denoiser, also of one on the meta device or one that is already pruned.

    Width units are always included. `depth` selects the whole layers that are units too. For a UNet:
        "aptp": the last ResBlock and the last Transformer layer of every down and up block (APTP, section 3.2);
        "all": every Transformer layer, every ResBlock whose incoming hidden width is its output width, and every inner
            transformer block of a Transformer layer that has several (SDXL);
        "blocks": "all" and, for each inner level whose widths agree with the level outside it, one stage: the
            downsampler before it, its down block, the mid block, all levels further in, and its up block (BK-SDM-Tiny
            removes one);
        "none".
    For a transformer: "all" (the default "aptp" means the same): every block; "none".
    include, exclude: globs over module paths, such as ``"*.attn2"``; a group stays if it matches an `include` (where
        there is one) and no `exclude`.

    Raises:
        UserError: a model that is not supported, an unknown policy, or a pattern that matches nothing.

    """
    denoiser = denoiser_of(model)
    if depth not in denoiser.policies:
        raise UserError(f"depth={depth!r}: choose one of {', '.join(map(repr, denoiser.policies))}")
    denoiser.check(model)
    groups = denoiser.groups(model, depth)
    return UnitSpace(_select(groups, _patterns(include), _patterns(exclude)))


def whole_space(structure: Structure, model: nn.Module) -> UnitSpace:
    """Return the space with every group that a model has under any policy; raise UserError for an unsupported model."""
    structure.check(model)
    return UnitSpace(structure.groups(model, structure.richest))


def match(model: nn.Module, space: UnitSpace) -> None:
    """Raise UserError, which names the difference, unless every group of `space` is in the model."""
    match_in(whole_space(denoiser_of(model), model), space)


def match_in(whole: UnitSpace, space: UnitSpace) -> None:
    """Raise UserError, as `match` does, unless every group of `space` is in `whole`, a model's whole space."""
    full = {group.name: group for group in whole.groups}
    for group in space.groups:
        same = full.get(group.name)
        if same is None:
            raise UserError(f"this model has no {group.name!r}, which the space has.{near(group.name, full)}")
        if same != group:
            raise UserError(
                f"{group.name!r} has {same.size} units of {same.channels} channels in this model, "
                f"{group.size} of {group.channels} in the space"
            )


def width_layers(model: nn.Module) -> dict[str, Layer]:
    """Return the layers that have units, by the names of their groups, in the order of the forward pass."""
    return {layer.group.name: layer for layer in denoiser_of(model).layers(model) if layer.group is not None}


def _patterns(patterns: str | Sequence[str] | None) -> list[str] | None:
    return [patterns] if isinstance(patterns, str) else None if patterns is None else list(patterns)


def _select(groups: list[UnitGroup], include: list[str] | None, exclude: list[str] | None) -> list[UnitGroup]:
    for pattern in (include or []) + (exclude or []):
        if not any(fnmatch.fnmatchcase(group.path, pattern) for group in groups):
            paths = dict.fromkeys(group.path for group in groups)
            raise UserError(f"the pattern {pattern!r} matches no module path.{near(pattern, paths)}")

    def chosen(group: UnitGroup) -> bool:
        included = include is None or any(fnmatch.fnmatchcase(group.path, pattern) for pattern in include)
        return included and not any(fnmatch.fnmatchcase(group.path, pattern) for pattern in exclude or ())

    return [group for group in groups if chosen(group)]
