"""A pipeline without its denoiser: the parts that all experts share, and pipelines made of them and a denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin

from prunekit.core.registry import pipeline_parts
from prunekit.export.model_folder import load_denoiser
from prunekit.export.tiers import index_entry, save_denoiser
from prunekit.models import quiet_libraries
from prunekit.models.hub import INDEX
from prunekit.models.loading import OPTIONS, SETTINGS, freeze, load_directory
from prunekit.models.weights import WITHOUT
from prunekit.runtime.errors import UserError
from prunekit.runtime.files import read_json, write_json


@dataclass(frozen=True)
class Parts:
    """A pipeline's class, its parts by name without the denoiser, and its constructor's plain values."""

    kind: type[DiffusionPipeline]
    components: Mapping[str, Any]
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, pipeline: DiffusionPipeline) -> Parts:
        """Take a pipeline's parts; they are shared, not copied. A safety checker is left out."""
        kind = type(pipeline)
        parts = {name: None if name in WITHOUT else part for name, part in pipeline.components.items()}
        del parts[pipeline_parts()[kind.__name__]]
        settings = {name: pipeline.config[name] for name in SETTINGS if name in pipeline.config}
        return cls(kind, parts, settings | OPTIONS.get(kind.__name__, {}))

    @property
    def denoiser(self) -> str:
        """The name of the pipeline's attribute that holds its denoiser."""
        return pipeline_parts()[self.kind.__name__]

    @classmethod
    def load(cls, directory: Path, dtype: torch.dtype = torch.float32, kind: str | None = None) -> Parts:
        """Load a pipeline's parts from its directory, without the denoiser, in evaluation mode; UserError if it fails.

        kind: name of the pipeline's class; by default, the class in its `model_index.json`.
        """
        quiet_libraries()
        return cls.of(freeze(load_directory(directory, directory, dtype, with_denoiser=False, kind=kind)))

    def pipeline(self, model: ModelMixin | None, **replaced: Any) -> DiffusionPipeline:
        """Return a stock pipeline with a denoiser and these parts; `replaced` gives replacements of parts, by name."""
        return self.kind(**{**self.components, self.denoiser: model, **replaced}, **self.settings)

    def save(self, directory: Path) -> None:
        """Save all parts, and a `model_index.json` without the denoiser; delete local paths from the configs."""
        self.pipeline(None).save_pretrained(directory, safe_serialization=True)
        for path in directory.glob("*/*config.json"):
            config = read_json(path)
            if config.pop("_name_or_path", None) is not None:
                write_json(path, config)


def save_pipeline(parts: Parts, model: ModelMixin, directory: Path, tier: str = "auto") -> dict[str, Any]:
    """Save a pipeline with a denoiser in a tier that diffusers loads; return the denoiser's specification."""
    parts.save(directory)
    specification = save_denoiser(model, directory / parts.denoiser, tier)
    entry = index_entry(model, specification["tier"])
    write_json(directory / INDEX, {**read_json(directory / INDEX), parts.denoiser: entry})
    return specification


def load_pipeline_directory(
    directory: str | Path, dtype: torch.dtype = torch.float32, verify: bool = False
) -> DiffusionPipeline:
    """Load a diffusers pipeline with a stock or pruned denoiser from a directory, without running code from there.

    verify: also hash the denoiser's weights.

    Raises:
        UserError: the directory is not a pipeline, or a part of it is faulty; see `load_denoiser`.

    """
    directory = Path(directory)
    if not (directory / INDEX).is_file():
        raise UserError(f"{directory} is not a diffusers pipeline: it has no {INDEX}")
    parts = Parts.load(directory, dtype)
    return parts.pipeline(load_denoiser(directory / parts.denoiser, dtype, verify=verify))
