"""The description of UNet2DConditionModel."""

from __future__ import annotations

from typing import ClassVar

from diffusers import UNet2DConditionModel

from .attaching import blank_copy
from .calls import UNetCalls
from .conventions import Aptp
from .pruned import PrunedUNet2DConditionModel
from .structure import UNetStructure


class UNet(UNetStructure, UNetCalls):
    """UNet2DConditionModel as the library sees it."""

    conventions: ClassVar = {"aptp": Aptp}
    latent = "sample"

    def pruned_class(self) -> type[PrunedUNet2DConditionModel]:
        """The class of the pruned UNets."""
        return PrunedUNet2DConditionModel

    def blank(self, model: UNet2DConditionModel) -> UNet2DConditionModel:
        """A UNet of the dense config, without weights: on the meta device."""
        return blank_copy(model)
