"""prunekit: prune a text-to-image diffusion UNet, slice it, recover it, and route prompts to pruned experts."""

from typing import Any

from .cost import CostModel
from .gates import gated, pipeline_rows
from .slicing import PrunedUNet2DConditionModel, slice_unet
from .units import Architecture, UnitGroup, UnitSpace, discover

__all__ = [
    "Architecture",
    "CostModel",
    "PrunedUNet2DConditionModel",
    "UnitGroup",
    "UnitSpace",
    "discover",
    "fine_tune",
    "gated",
    "methods",
    "pipeline_rows",
    "slice_unet",
]


def __getattr__(name: str) -> Any:
    """Import what lies above the lowest layer when it is first used."""
    import importlib

    if name == "methods":
        return importlib.import_module("prunekit.methods")
    if name == "fine_tune":
        return importlib.import_module("prunekit.training.fine_tuning").fine_tune
    raise AttributeError(f"module 'prunekit' has no attribute {name!r}")
