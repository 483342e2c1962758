"""The description of UNet2DConditionModel."""

from __future__ import annotations

from .calls import UNetCalls
from .family import StableDiffusion


class UNet(UNetCalls):
    """UNet2DConditionModel as the library sees it."""

    family = StableDiffusion()
