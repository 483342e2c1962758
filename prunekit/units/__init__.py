"""WHAT can be removed from a UNet: the nouns, the walk that finds them, and one file per kind of unit."""

from .discovery import discover
from .space import Architecture, UnitGroup, UnitSpace

__all__ = ["Architecture", "UnitGroup", "UnitSpace", "discover"]
