"""The input of BK-SDM's rule: a UNet's levels, and the depth units of their second layers (Kim et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .removed import BYPASSED

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from torch import nn


@dataclass(frozen=True)
class Levels:
    """A UNet's levels, outermost first. Depth units are named as in a unit space with depth policy "blocks"."""

    layers: tuple[int, ...]  # number of remaining layers in each down block
    second: tuple[tuple[str, ...], ...]  # per level: depth units of its down and up block's second layers
    mid: tuple[str, ...] | None  # depth units of the mid block; None: there is no mid block
    innermost: str  # stage unit of the innermost level

    @classmethod
    def of(cls, model: UNet2DConditionModel) -> Levels:
        """Return a UNet's levels; it may be on the meta device."""
        down, up = model.down_blocks, model.up_blocks
        second = [
            (*_units(f"down_blocks.{i}", block, 1), *_units(f"up_blocks.{len(up) - 1 - i}", up[len(up) - 1 - i], 1))
            for i, block in enumerate(down)
        ]
        return cls(
            layers=tuple(sum(not isinstance(resnet, BYPASSED) for resnet in block.resnets) for block in down),
            second=tuple(second),
            mid=None if model.mid_block is None else _units("mid_block", model.mid_block),
            innermost=f"stage:down_blocks.{len(down) - 1}",
        )


def _units(path: str, block: nn.Module, index: int | None = None) -> tuple[str, ...]:
    """Return the names of the depth units of all layers of a block, or of its layer at `index`."""
    return tuple(
        f"layer:{path}.{kind}.{position}"
        for kind in ("resnets", "attentions")
        for position in range(len(getattr(block, kind, None) or ()))
        if index is None or position == index
    )
