"""Choose the weight files of a pipeline: only safetensors, and a variant such as fp16 only if there is no other."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prunekit.runtime.errors import UserError

PARTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
WITHOUT = ("safety_checker", "feature_extractor", "image_encoder")  # parts that training and sampling do not use
_WEIGHTS = re.compile(
    r"(?P<part>\w+)/(diffusion_pytorch_model|model)(\.(?P<variant>[a-z]\w*))?(-\d+-of-\d+)?(\.(?P<late>[a-z]\w*))?"
    r"\.(safetensors|bin)"
)


def variant_of(names: Iterable[str]) -> str | None:
    """Return the variant ("fp16") that must be read, from file names such as unet/diffusion_pytorch_model.safetensors.

    None if every part has weights without a variant, or no weights. Raises ValueError, one line, if a part has only
    pickled weights.
    """
    variants_by_part: dict[str, set[str | None]] = {}
    pickled = set()
    for name in names:
        match = _WEIGHTS.fullmatch(name)
        if match is None or match["part"] not in PARTS:
            continue
        if name.endswith(".bin"):
            pickled.add(match["part"])
        else:
            variants_by_part.setdefault(match["part"], set()).add(match["variant"] or match["late"])
    if missing := sorted(pickled - set(variants_by_part)):
        raise UserError(
            f"{', '.join(missing)}: only pickled weights (.bin), which can run code and are not loaded; if you "
            "trust them, convert them with DiffusionPipeline.from_pretrained(IT).save_pretrained(DIRECTORY)"
        )
    needed = [variants for variants in variants_by_part.values() if None not in variants]
    common = set.intersection(*needed) if needed else set()
    return min(filter(None, common), default=None)


def weight_names(directory: Path) -> list[str]:
    """Return the names, relative to a pipeline's directory, of the files in its parts' directories."""
    return [f"{part}/{path.name}" for part in PARTS for path in sorted((directory / part).glob("*"))]


def missing_parts(directory: Path, index: dict[str, Any]) -> list[str]:
    """Return the parts named in a model_index.json that have no directory, or lack the weights that they need."""
    with_weights = {match["part"] for match in map(_WEIGHTS.fullmatch, weight_names(directory)) if match}
    needed = [part for part, kind in index.items() if isinstance(kind, list) and any(kind) and part not in WITHOUT]
    return [part for part in needed if not (directory / part).is_dir() or (part in PARTS and part not in with_weights)]
