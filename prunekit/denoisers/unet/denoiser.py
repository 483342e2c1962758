"""The description of UNet2DConditionModel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from diffusers import UNet2DConditionModel

from prunekit.core.axes import Place
from prunekit.core.counting import Counter
from prunekit.core.family import Family

from . import pruned
from .attaching import blank_copy
from .bksdm import Levels
from .calls import UNetCalls
from .configs import build, check_sizes
from .conventions import Aptp
from .family import StableDiffusion
from .pruned import PrunedUNet2DConditionModel
from .stock import as_stock
from .structure import UNetStructure
from .walk import walk


class UNet(UNetStructure, UNetCalls):
    """The description of UNet2DConditionModel for the library."""

    family: ClassVar[Family] = StableDiffusion()
    conventions: ClassVar[Mapping[str, type[Counter]]] = {"aptp": Aptp}
    legend: ClassVar[str] = "R: ResBlock, A: attention layer"

    def pruned_class(self) -> type[PrunedUNet2DConditionModel]:
        """Return the class of the pruned UNets."""
        return PrunedUNet2DConditionModel

    def class_source(self) -> tuple[list[tuple[str, str]], str]:
        """Return the pruned class as the one definition; a last statement is not needed."""
        return [(pruned.__name__, PrunedUNet2DConditionModel.__name__)], ""

    def stock(self, model: UNet2DConditionModel) -> UNet2DConditionModel | None:
        """Return a pruned UNet in its stock class, or None (see `as_stock`); return a dense UNet as it is."""
        return as_stock(model) if isinstance(model, PrunedUNet2DConditionModel) else model

    def outline(self, model: UNet2DConditionModel) -> dict[str, Place]:
        """Return each layer's place: down blocks on the left, the mid block at the bottom, up blocks on the right."""
        letters = {"resnet": "R", "transformer": "A"}
        levels, last = len(model.down_blocks), len(model.up_blocks) - 1
        places = {}
        for site in walk(model):
            block, _, rest = site.path.partition(".")
            if site.kind not in letters:
                continue
            letter = letters[site.kind]
            place = Place("middle", levels, letter)
            if block == "down_blocks":
                place = Place("left", int(rest.partition(".")[0]), letter)
            elif block == "up_blocks":
                place = Place("right", last - int(rest.partition(".")[0]), letter)
            places[site.path] = place
        return places

    def blank(self, model: UNet2DConditionModel) -> UNet2DConditionModel:
        """Return a UNet of the dense config, without weights, on the meta device."""
        return blank_copy(model)

    def from_config(self, config: Mapping[str, Any], name: str | Path) -> UNet2DConditionModel:
        """Build a stock or pruned UNet on the meta device."""
        return build(config, name)

    def fill_tables(self, model: UNet2DConditionModel) -> None:
        """Do nothing: a UNet has no tables."""

    def check_config(self, config: Mapping[str, Any], name: str | Path) -> None:
        """Raise UserError for a config with sizes that are invalid or too large to build; see `check_sizes`."""
        check_sizes(config, name)

    def levels(self, model: UNet2DConditionModel) -> Levels:
        """Return the levels of a UNet for BK-SDM's rule."""
        return Levels.of(model)
