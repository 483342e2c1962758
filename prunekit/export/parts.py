"""A pipeline without its UNet: what all experts share, and what they are put back into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from prunekit.export.class_file import CLASS, MODULE
from prunekit.export.loading import load_unet
from prunekit.export.tiers import save_unet
from prunekit.models import quiet_libraries
from prunekit.models.names import PIPELINES, check_index, first_line, read_object
from prunekit.models.weights import WITHOUT, variant_of, weight_names
from prunekit.training.checkpoint import read_json, write_json

INDEX = "model_index.json"
_SETTINGS = ("force_zeros_for_empty_prompt",)  # plain values of a pipeline that its pictures depend on


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
        settings = {name: pipeline.config[name] for name in _SETTINGS if name in pipeline.config}
        is_xl = type(pipeline).__name__ == PIPELINES[1]
        settings |= {"add_watermarker": False} if is_xl else {"requires_safety_checker": False}
        return cls(type(pipeline), parts, settings)

    @classmethod
    def load(cls, directory: Path, dtype: torch.dtype = torch.float32) -> Parts:
        """Load all but the UNet of a pipeline's directory, in evaluation mode; ValueError, one line, where it fails."""
        quiet_libraries()
        index = read_object(directory / INDEX)
        check_index({**index, "unet": ["a UNet"]}, directory)
        kind = getattr(diffusers, index["_class_name"])
        options: dict[str, Any] = {part: None for part in (*WITHOUT, "unet") if part in index}
        options |= {"add_watermarker": False} if kind.__name__ == PIPELINES[1] else {"requires_safety_checker": False}
        try:
            variant = variant_of([name for name in weight_names(directory) if not name.startswith("unet/")])
            own = {} if variant is None else {"variant": variant}
            pipeline = kind.from_pretrained(directory, dtype=dtype, use_safetensors=True, **own, **options)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"cannot load {directory}: {first_line(error)}") from error
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval().requires_grad_(False)
        return cls.of(pipeline)

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
        raise ValueError(f"{directory} is no diffusers pipeline: it holds no {INDEX}")
    unet = load_unet(directory / "unet", dtype, verify=verify)
    return Parts.load(directory, dtype).pipeline(unet)
