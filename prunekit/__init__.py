"""prunekit: prune a text-to-image diffusion UNet, slice it, recover it, and route prompts to pruned experts."""

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
    "gated",
    "pipeline_rows",
    "slice_unet",
]
