"""The description of UNet2DConditionModel."""

from __future__ import annotations

from .calls import UNetCalls


class UNet(UNetCalls):
    """UNet2DConditionModel as the library sees it."""
