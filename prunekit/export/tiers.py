"""In which form a UNet is saved: a stock diffusers UNet where one expresses the cut, else its class in one file.

stock: `UNet2DConditionModel.from_pretrained` loads it. class: the folder holds the class file, and loads with
`trust_remote_code=True` without prunekit, or by `prunekit.load` with it. onnx, torch: graphs of one UNet call.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffusers import ModelMixin, UNet2DConditionModel, pipelines

from prunekit import slicing
from prunekit.core.discovery import discover
from prunekit.core.slicing import slice_model
from prunekit.core.timesteps import saved_parts
from prunekit.denoisers.unet import pruned
from prunekit.denoisers.unet.pruned import PrunedUNet2DConditionModel
from prunekit.denoisers.unet.stock import as_stock
from prunekit.export.bundle import bundle
from prunekit.export.specification import CONFIG, stamp
from prunekit.runtime.errors import UserError
from prunekit.runtime.files import read_json, write_json

MODULE = "modeling_pruned"  # an export's file with the class, and its entry in model_index.json
CLASS = pruned.PrunedUNet2DConditionModel.__name__
_CUTTING, _PLAIN = "prunekit.core.cutting", "prunekit.export.plain_cutting"
_INSTEAD = {(_CUTTING, name): (_PLAIN, name) for name in ("keep_out", "keep_in", "keep_groups")}
_TITLE = """A Stable Diffusion UNet with parts cut out: {name}, for diffusers.

Written by prunekit {version} from its own sources; do not edit. It needs torch and diffusers, and nothing else. The
config's `pruning` says which units each layer keeps and which layers are gone; the constructor cuts a UNet to it.
Licence: Apache-2.0.
"""
FOLDERS = ("stock", "class")  # tiers that diffusers loads
GRAPHS = ("onnx", "torch")
TIERS = ("auto", *FOLDERS, *GRAPHS)


@cache
def class_file_source() -> str:
    """Return the text of the class file."""
    title = _TITLE.format(name=CLASS, version=version("prunekit"))
    return bundle(pruned.__name__, CLASS, _INSTEAD, title)


def write_class_file(folder: Path) -> Path:
    """Write the class file into a UNet's folder; return its path."""
    path = folder / f"{MODULE}.py"
    path.write_text(class_file_source(), encoding="utf-8")
    return path


def register_with_diffusers() -> None:
    """Let `DiffusionPipeline.from_pretrained` open exports of the tier `class` by prunekit's class in this process.

    Call it once where other code loads the pipelines; no code of their folders runs then, and none has to be trusted.
    It adds an entry to `diffusers.pipelines`, in which diffusers looks up the names of a `model_index.json`.
    """
    setattr(pipelines, MODULE, slicing)


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


def save_expert(model: ModelMixin, folder: Path, tier: str = "auto") -> list[dict[str, Any]]:
    """Save a UNet, or its slices for bins of timesteps; return the specification of each; errors as `save_unet`."""
    return [save_unet(part, place, tier) for part, place in saved_parts(model, folder)]


def _stock_form(unet: UNet2DConditionModel) -> UNet2DConditionModel | None:
    return as_stock(unet) if isinstance(unet, PrunedUNet2DConditionModel) else unet
