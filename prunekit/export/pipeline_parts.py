"""A pipeline without its UNet: what all experts share, and what they are put back into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from prunekit.export.model_folder import load_unet
from prunekit.export.tiers import CLASS, MODULE, save_unet
from prunekit.models import quiet_libraries
from prunekit.models.hub import INDEX
from prunekit.models.loading import SETTINGS, freeze, load_directory
from prunekit.models.weights import WITHOUT
from prunekit.runtime.errors import UserError
from prunekit.runtime.files import read_json, write_json


@dataclass(frozen=True)
class Parts:
    """kind: the pipeline's class. components: by name, without the UNet. settings: its constructor's plain values."""

    kind: type[DiffusionPipeline]
    components: Mapping[str, Any]
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, pipeline: DiffusionPipeline) -> Parts:
        """Take a pipeline's parts; they are shared, not copied. A safety checker is left out."""
        parts = {name: part for name, part in pipeline.components.items() if name != "unet"}
        parts = {name: None if name in WITHOUT else part for name, part in parts.items()}
        settings = {name: pipeline.config[name] for name in SETTINGS if name in pipeline.config}
        is_xl = type(pipeline).__name__ == "StableDiffusionXLPipeline"
        settings |= {"add_watermarker": False} if is_xl else {"requires_safety_checker": False}
        return cls(type(pipeline), parts, settings)

    @classmethod
    def load(cls, directory: Path, dtype: torch.dtype = torch.float32) -> Parts:
        """Load all but the UNet of a pipeline's directory, in evaluation mode; ValueError, one line, where it fails."""
        quiet_libraries()
        return cls.of(freeze(load_directory(directory, directory, dtype, with_denoiser=False)))

    def pipeline(self, unet: UNet2DConditionModel | None, **replaced: Any) -> DiffusionPipeline:
        """Return a stock pipeline around a UNet, whose other parts are these, or `replaced` by name."""
        return self.kind(**{**self.components, "unet": unet, **replaced}, **self.settings)

    def save(self, directory: Path) -> None:
        """Save all parts, and a `model_index.json` that names no UNet yet; paths of this machine are left out."""
        self.pipeline(None).save_pretrained(directory, safe_serialization=True)
        for path in directory.glob("*/*config.json"):
            config = read_json(path)
            if config.pop("_name_or_path", None) is not None:
                write_json(path, config)


def save_pipeline(parts: Parts, unet: UNet2DConditionModel, directory: Path, tier: str = "auto") -> dict[str, Any]:
    """Save a pipeline with a UNet in a tier that diffusers loads; return the UNet's specification."""
    parts.save(directory)
    specification = save_unet(unet, directory / "unet", tier)
    is_class = specification["tier"] == "class"
    entry = [MODULE, CLASS] if is_class else ["diffusers", UNet2DConditionModel.__name__]
    write_json(directory / INDEX, {**read_json(directory / INDEX), "unet": entry})
    return specification


def load_pipeline_directory(
    directory: str | Path, dtype: torch.dtype = torch.float32, verify: bool = False
) -> DiffusionPipeline:
    """Load a diffusers pipeline's directory whose UNet is stock or pruned, by prunekit's own class; runs no code of it.

    verify: also hash the UNet's weights. Raises ValueError, one line, as `load_unet` and for other parts' faults.
    """
    directory = Path(directory)
    if not (directory / INDEX).is_file():
        raise UserError(f"{directory} is no diffusers pipeline: it holds no {INDEX}")
    unet = load_unet(directory / "unet", dtype, verify=verify)
    return Parts.load(directory, dtype).pipeline(unet)
