"""The tiers (forms) in which a denoiser is saved.

stock: a stock diffusers model, for cuts that a stock config expresses; the stock class's `from_pretrained` loads it.
class: the folder holds the class file; it loads with `trust_remote_code=True` without prunekit, or by prunekit's class.
auto: stock if a stock config expresses the cut, else class. single-file: the stock form in the layout in which models
of its class were published (`original_layout`). onnx, torch: graphs of one call.
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

MODULE = "modeling_pruned"  # name of the class file, and its entry in model_index.json
_CUTTING, _PLAIN = "prunekit.core.cutting", "prunekit.export.plain_cutting"
_INSTEAD = {(_CUTTING, name): (_PLAIN, name) for name in ("keep_out", "keep_in", "keep_each", "keep_groups")}
_TITLE = """A diffusion model's denoiser with parts cut out: {name}, for diffusers.

Written by prunekit {version} from its own sources; do not edit. It needs torch and diffusers, and nothing else. The
config's `pruning` says which units each layer keeps and which layers are gone; the constructor cuts a model to it.
License: Apache-2.0.
"""
FOLDERS = ("stock", "class")  # tiers that diffusers loads
GRAPHS = ("onnx", "torch")
SINGLE_FILE = "single-file"
ALONE = (SINGLE_FILE, *GRAPHS)  # saved without the pipeline's other parts
TIERS = ("auto", *FOLDERS, *ALONE)


@cache
def class_file_source(pruned: type) -> str:
    """Return the source of the class file of a class of pruned models."""
    roots, last = denoiser_of(pruned).class_source()
    return bundle(roots, _INSTEAD, _TITLE.format(name=pruned.__name__, version=version("prunekit")), last)


def write_class_file(pruned: type, folder: Path) -> Path:
    """Write the class file of a class of pruned models into a model's folder; return the file's path."""
    path = folder / f"{MODULE}.py"
    path.write_text(class_file_source(pruned), encoding="utf-8")
    return path


def register_with_diffusers() -> None:
    """Let `DiffusionPipeline.from_pretrained` open exports of the tier `class` by prunekit's class in this process.

    Call it once before other code loads the pipelines. Then no code from their folders runs, and none has to be
    trusted. It adds an entry to `diffusers.pipelines`, in which diffusers looks up the names of a `model_index.json`.
    """
    setattr(pipelines, MODULE, slicing)


def check_tier(tier: str, allowed: tuple[str, ...] = TIERS) -> None:
    """Raise UserError for a tier that is not allowed."""
    if tier not in allowed:
        raise UserError(f"tier={tier!r}: choose one of {', '.join(allowed)}")


def architecture_of(model: ModelMixin) -> Mapping[str, Any] | None:
    """Return a pruned denoiser's kept units and removed layers, its config's `pruning`; None for a dense denoiser."""
    return model.config.get("pruning")


def save_denoiser(model: ModelMixin, folder: Path, tier: str = "auto") -> dict[str, Any]:
    """Save a stock or pruned denoiser in a tier that diffusers loads; return its specification, which has the tier.

    tier: "stock", "class", or "auto": stock if a stock config expresses the cut, else class.

    Raises:
        UserError: the tier is "stock", and no stock config expresses the cut.

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
    """Return the [library, class] entry in `model_index.json` of a model that is saved in a tier."""
    name = denoiser_of(model).pruned_class().__name__
    return [MODULE, name] if tier == "class" else ["diffusers", name.removeprefix("Pruned")]


def save_expert(model: ModelMixin, folder: Path, tier: str = "auto") -> list[dict[str, Any]]:
    """Save a denoiser, or its slices for bins of timesteps, by `save_denoiser`; return each specification."""
    return [save_denoiser(part, place, tier) for part, place in saved_parts(model, folder)]
