"""The description of UNet2DConditionModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from diffusers import UNet2DConditionModel

from prunekit.core.axes import Place
from prunekit.core.counting import Counter

from .attaching import blank_copy
from .calls import UNetCalls
from .conventions import Aptp
from .pruned import PrunedUNet2DConditionModel
from .structure import UNetStructure
from .walk import walk


class UNet(UNetStructure, UNetCalls):
    """UNet2DConditionModel as the library sees it."""

    conventions: ClassVar[Mapping[str, type[Counter]]] = {"aptp": Aptp}
    latent: ClassVar[str] = "sample"
    legend: ClassVar[str] = "R: ResBlock, A: attention layer"

    def pruned_class(self) -> type[PrunedUNet2DConditionModel]:
        """The class of the pruned UNets."""
        return PrunedUNet2DConditionModel

    def outline(self, model: UNet2DConditionModel) -> dict[str, Place]:
        """Down blocks on the left, each below the one before, the mid block below them, up blocks on the right."""
        letters = {"resnet": "R", "transformer": "A"}
        levels, last = len(model.down_blocks), len(model.up_blocks) - 1
        places = {}
        for site in walk(model):
            block, _, rest = site.path.partition(".")
            if site.kind not in letters:
                continue
            index = int(rest.partition(".")[0])
            letter = letters[site.kind]
            places[site.path] = {
                "down_blocks": Place("left", index, letter),
                "up_blocks": Place("right", last - index, letter),
            }.get(block, Place("middle", levels, letter))
        return places

    def blank(self, model: UNet2DConditionModel) -> UNet2DConditionModel:
        """A UNet of the dense config, without weights: on the meta device."""
        return blank_copy(model)
