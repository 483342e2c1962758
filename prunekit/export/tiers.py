"""In which form a denoiser is saved: a stock diffusers model where one expresses the cut, else its class in one file.

stock: the stock class's `from_pretrained` loads it. class: the folder holds the class file, and loads with
`trust_remote_code=True` without prunekit, or by prunekit's own class with it. single-file: the stock form in the layout
in which models of its class were published (`original_layout`). onnx, torch: graphs of one call.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffusers import ModelMixin, pipelines

from prunekit import slicing
from prunekit.core.discovery import discover
from prunekit.core.registry import denoiser_of
from prunekit.core.slicing import PrunedModel, slice_model
from prunekit.core.timesteps import saved_parts
from prunekit.export.bundle import bundle
from prunekit.export.specification import CONFIG, stamp
from prunekit.runtime.errors import UserError
from prunekit.runtime.files import read_json, write_json

MODULE = "modeling_pruned"  # an export's file with the class, and its entry in model_index.json
_CUTTING, _PLAIN = "prunekit.core.cutting", "prunekit.export.plain_cutting"
_INSTEAD = {(_CUTTING, name): (_PLAIN, name) for name in ("keep_out", "keep_in", "keep_each", "keep_groups")}
_TITLE = """A diffusion model's denoiser with parts cut out: {name}, for diffusers.

Written by prunekit {version} from its own sources; do not edit. It needs torch and diffusers, and nothing else. The
config's `pruning` says which units each layer keeps and which layers are gone; the constructor cuts a model to it.
Licence: Apache-2.0.
"""
FOLDERS = ("stock", "class")  # tiers that diffusers loads
GRAPHS = ("onnx", "torch")
SINGLE_FILE = "single-file"
ALONE = (SINGLE_FILE, *GRAPHS)  # of which a pipeline's other parts are left out
TIERS = ("auto", *FOLDERS, *ALONE)


@cache
def class_file_source(pruned: type) -> str:
    """Return the text of the file of a class of pruned models."""
    roots, last = denoiser_of(pruned).class_source()
    return bundle(roots, _INSTEAD, _TITLE.format(name=pruned.__name__, version=version("prunekit")), last)


def write_class_file(pruned: type, folder: Path) -> Path:
    """Write the file of a class into a model's folder; return its path."""
    path = folder / f"{MODULE}.py"
    path.write_text(class_file_source(pruned), encoding="utf-8")
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


def architecture_of(model: ModelMixin) -> Mapping[str, Any] | None:
    """Return what a denoiser keeps of its dense form, {kept, removed}; None for a dense one."""
    return model.config.get("pruning")


def save_denoiser(model: ModelMixin, folder: Path, tier: str = "auto") -> dict[str, Any]:
    """Save a denoiser, stock or pruned, in a tier that diffusers loads; return its specification, which says the tier.

    tier: "stock", "class", or "auto": stock where a stock config expresses the cut, else class.
    Raises ValueError, one line: "stock" for a cut that no stock config expresses.
    """
    check_tier(tier, ("auto", *FOLDERS))
    form: Any = None if tier == "class" else denoiser_of(model).stock(model)
    if form is None and tier == "stock":
        raise UserError(
            "no stock diffusers config expresses this cut: widths were cut, or layers that every stock model "
            "of this class has were removed; use tier class"
        )
    if form is not None:
        form.save_pretrained(folder)
        return stamp(folder, "stock", architecture_of(model))
    if not isinstance(model, PrunedModel):
        model = slice_model(model, discover(model, "none").full())
    model.save_pretrained(folder)
    write_class_file(type(model), folder)
    config = read_json(folder / CONFIG)
    write_json(folder / CONFIG, {**config, "auto_map": {"AutoModel": f"{MODULE}.{type(model).__name__}"}})
    return stamp(folder, "class", architecture_of(model))


def index_entry(model: ModelMixin, tier: str) -> list[str]:
    """Return how a `model_index.json` names the class of a model that is saved in a tier."""
    name = denoiser_of(model).pruned_class().__name__
    return [MODULE, name] if tier == "class" else ["diffusers", name.removeprefix("Pruned")]


def save_expert(model: ModelMixin, folder: Path, tier: str = "auto") -> list[dict[str, Any]]:
    """Save a denoiser, or its slices for bins of timesteps; return each specification; errors as `save_denoiser`."""
    return [save_denoiser(part, place, tier) for part, place in saved_parts(model, folder)]
