"""The description of UNet2DConditionModel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bksdm import Levels
from .calls import UNetCalls
from .family import StableDiffusion

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class UNet(UNetCalls):
    """UNet2DConditionModel as the library sees it. Methods are `Denoiser`'s, except `levels`."""

    family = StableDiffusion()

    def from_config(self, config: Mapping[str, Any], name: str | Path) -> UNet2DConditionModel:
        """Build a stock or pruned UNet on the meta device."""
        from .configs import build

        return build(config, name)

    def check_config(self, config: Mapping[str, Any], name: str | Path) -> None:
        """Refuse a config of which building a UNet would not end."""
        from .configs import check_sizes

        check_sizes(config, name)

    def levels(self, model: UNet2DConditionModel) -> Levels:
        """Return what BK-SDM's rule looks at."""
        return Levels.of(model)
