"""`discover`: the UnitSpace of a UNet."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from diffusers import UNet2DConditionModel

from prunekit.errors import UserError

from . import attention, feedforward, resnet
from .space import UnitGroup, UnitSpace, near
from .walk import Site, check_supported, walk

DEPTH_POLICIES = ("aptp", "all", "blocks", "none")


def discover(
    unet: UNet2DConditionModel,
    depth: str = "aptp",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> UnitSpace:
    """The UnitSpace of a UNet: what can be removed from it. Works on the meta device and on a pruned UNet.

    Width units are always found. `depth` says which whole layers are units too:
        "aptp": the last ResBlock and the last Transformer layer of every down and up block (APTP, section 3.2);
        "all": every Transformer layer, every ResBlock whose incoming hidden width is its output width, and every
            inner transformer block of a Transformer layer that has several (SDXL);
        "blocks": "all" and, per inner level whose widths agree with the level outside it, one stage: the
            downsampler before it, its down block, the mid block, all that lies further in, and its up block
            (BK-SDM-Tiny removes one);
        "none".
    include, exclude: globs over module paths, such as "down_blocks.*"; a group stays if it matches an `include`
        (where there is one) and no `exclude`.
    ValueError for a model that is not supported, an unknown policy, or a pattern that matches nothing.
    """
    if depth not in DEPTH_POLICIES:
        raise UserError(f"depth={depth!r}: choose one of {', '.join(map(repr, DEPTH_POLICIES))}")
    check_supported(unet)
    sites = list(walk(unet))
    groups = [group for site in sites if (group := width_group(unet, site)) is not None]
    if depth != "none":
        groups += [group for site in sites if (group := _depth_group(site, depth, unet)) is not None]
    if depth == "blocks":
        groups += _stages(unet, sites)
    return UnitSpace(_select(groups, _patterns(include), _patterns(exclude)))


def match(unet: UNet2DConditionModel, space: UnitSpace) -> None:
    """ValueError that names the difference, unless every group of `space` is in the UNet."""
    full = {group.name: group for group in discover(unet, depth="blocks").groups}
    for group in space.groups:
        found = full.get(group.name)
        if found is None:
            raise UserError(f"this UNet has no {group.name!r}, which the space has.{near(group.name, full)}")
        if found != group:
            raise UserError(
                f"{group.name!r} has {found.size} units of {found.channels} channels in this UNet, "
                f"{group.size} of {group.channels} in the space"
            )


def kept_groups(unet: UNet2DConditionModel, path: str) -> int | None:
    """How many units an earlier cut left at `path`; None where it was not cut."""
    kept = ((unet.config.get("pruning") or {}).get("kept") or {}).get(path)
    return None if kept is None else len(kept)


def width_group(unet: UNet2DConditionModel, site: Site) -> UnitGroup | None:
    """The width group of a site, if it has one."""
    if site.kind == "resnet":
        return resnet.group(site.path, site.module)
    if site.kind == "attention":
        return attention.group(site.path, site.module)
    if site.kind == "feedforward":
        return feedforward.group(site.path, site.module, kept_groups(unet, site.path))
    return None


def _depth_group(site: Site, depth: str, unet: UNet2DConditionModel) -> UnitGroup | None:
    if site.kind == "block":
        layer = unet.get_submodule(site.path.rpartition(".")[0])
        if depth == "aptp" or len(layer) == 1:
            return None
        return UnitGroup("block", site.path, 1, site.hidden, (site.path,))
    if site.kind not in ("resnet", "transformer") or (depth == "aptp" and not site.is_last):
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
