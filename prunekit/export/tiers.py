"""In which form a UNet is saved: a stock diffusers UNet where one expresses the cut, else its class in one file.

stock: `UNet2DConditionModel.from_pretrained` loads it. class: the folder holds the class file, and loads with
`trust_remote_code=True` without prunekit, or by `prunekit.load` with it. onnx, torch: graphs of one UNet call.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel

from prunekit.core.discovery import discover
from prunekit.core.slicing import slice_model
from prunekit.denoisers.unet.pruned import PrunedUNet2DConditionModel
from prunekit.denoisers.unet.stock import as_stock
from prunekit.errors import UserError
from prunekit.export.class_file import CLASS, MODULE, write_class_file
from prunekit.export.specification import CONFIG, stamp
from prunekit.training.checkpoint import read_json, write_json

FOLDERS = ("stock", "class")  # tiers that diffusers loads
GRAPHS = ("onnx", "torch")
TIERS = ("auto", *FOLDERS, *GRAPHS)


def check_tier(tier: str, allowed: tuple[str, ...] = TIERS) -> None:
    """ValueError, one line, for a tier that is not allowed."""
    if tier not in allowed:
        raise UserError(f"tier={tier!r}: choose one of {', '.join(allowed)}")


def architecture_of(unet: UNet2DConditionModel) -> Mapping[str, Any] | None:
    """Return what a UNet keeps of its dense form, {kept, removed}; None for a dense UNet."""
    return unet.config.get("pruning")


def save_unet(unet: UNet2DConditionModel, folder: Path, tier: str = "auto") -> dict[str, Any]:
    """Save a UNet, stock or pruned, in a tier that diffusers loads; return its specification, which says the tier.

    tier: "stock", "class", or "auto": stock where a stock config expresses the cut, else class.
    Raises ValueError, one line: "stock" for a cut that no stock config expresses.
    """
    check_tier(tier, ("auto", *FOLDERS))
    form = None if tier == "class" else _stock_form(unet)
    if form is None and tier == "stock":
        raise UserError(
            "no stock diffusers config expresses this cut: widths are cut, or layers do not go in the pairs of down "
            "and up block that a stock UNet has; use tier class"
        )
    if form is not None:
        form.save_pretrained(folder)
        return stamp(folder, "stock", architecture_of(unet))
    if not isinstance(unet, PrunedUNet2DConditionModel):
        unet = slice_model(unet, discover(unet, "none").full())
    unet.save_pretrained(folder)
    write_class_file(folder)
    config = read_json(folder / CONFIG)
    write_json(folder / CONFIG, {**config, "auto_map": {"AutoModel": f"{MODULE}.{CLASS}"}})
    return stamp(folder, "class", architecture_of(unet))


def _stock_form(unet: UNet2DConditionModel) -> UNet2DConditionModel | None:
    return as_stock(unet) if isinstance(unet, PrunedUNet2DConditionModel) else unet
