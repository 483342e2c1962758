"""The order of units in the vectors of APTP's published implementation, and in prunekit's.

Both have widths first and depths last. Within a block, the published widths list all ResBlocks and then all attention
layers (each: heads of attn1, heads of attn2, feed-forward groups); prunekit's widths follow the forward pass. The
published depths are listed block by block, ResBlocks before attention layers. A unit is kept if its value is at least
0.5.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prunekit.core.space import Architecture, UnitGroup, UnitSpace
from prunekit.runtime.errors import UserError

KEPT_FROM = 0.5  # the published code keeps a unit at exactly 0.5


def published_groups(space: UnitSpace) -> list[UnitGroup]:
    """Return the groups of a space (depth policy "aptp") in the order of the published vectors."""
    blocks = {name: rank for rank, name in enumerate(("down_blocks", "mid_block", "up_blocks"))}

    def place(group: UnitGroup) -> tuple[bool, int, int, bool]:
        kind, *rest = group.path.split(".")
        index = int(rest[0]) if kind != "mid_block" else 0
        return group.is_depth, blocks[kind], index, ".attentions." in group.path

    return sorted(space.groups, key=place)  # a stable sort: within a list of layers both orders agree


def published_structure(space: UnitSpace) -> tuple[list[int], int]:
    """Return the units of each width group in the published order, and the number of depth units."""
    return [group.size for group in published_groups(space) if not group.is_depth], space.num_depth


def stated_structure(structure: dict[str, Any]) -> tuple[list[int], int]:
    """Return the values of `published_structure` from a published config; UserError for a malformed `structure`."""
    try:
        widths = [int(size) for layer in structure["width"] for size in layer]
        return widths, sum(int(size) for layer in structure["depth"] for size in layer)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"a structure must be {{width: [[…], …], depth: [[…], …]}}, got {structure!r:.80}") from error


def order(space: UnitSpace) -> Tensor:
    """Return the position in a published vector of each unit of a space, (D,)."""
    positions, start = torch.empty(space.size, dtype=torch.long), 0
    for group in published_groups(space):
        positions[space.slice(group)] = torch.arange(start, start + group.size)
        start += group.size
    return positions


def architectures_of(vectors: Tensor | Sequence[Tensor], space: UnitSpace) -> list[Architecture]:
    """Return the Architecture of each published vector (N, D)."""
    positions = order(space)
    return [Architecture(space, vector[positions] >= KEPT_FROM) for vector in vectors]
