"""prunekit: prune a text-to-image diffusion UNet, slice it, recover it, and route prompts to pruned experts."""

from .cost import CostModel
from .units import Architecture, UnitGroup, UnitSpace, discover

__all__ = ["Architecture", "CostModel", "UnitGroup", "UnitSpace", "discover"]
