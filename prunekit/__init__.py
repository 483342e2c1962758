"""prunekit: prune a text-to-image diffusion UNet, slice it, recover it, and route prompts to pruned experts.

Names are imported when they are first used.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from prunekit import threads

threads.configure()
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # of onnxruntime, which diffusers imports with any pipeline

if TYPE_CHECKING:
    from . import methods
    from .cost import CostModel
    from .evaluation.command import evaluate
    from .gates import gated, pipeline_rows
    from .recovery import recover_experts
    from .serving import PromptRoutedPipeline
    from .slicing import PrunedUNet2DConditionModel, slice_unet
    from .stock import as_stock, export_unet
    from .training.fine_tuning import fine_tune
    from .units import Architecture, UnitGroup, UnitSpace, discover

__all__ = [
    "Architecture",
    "CostModel",
    "PromptRoutedPipeline",
    "PrunedUNet2DConditionModel",
    "UnitGroup",
    "UnitSpace",
    "as_stock",
    "discover",
    "evaluate",
    "export_unet",
    "fine_tune",
    "gated",
    "methods",
    "pipeline_rows",
    "recover_experts",
    "slice_unet",
]

_MODULES = {
    "cost": ["CostModel"],
    "evaluation.command": ["evaluate"],
    "gates": ["gated", "pipeline_rows"],
    "methods": ["methods"],
    "recovery": ["recover_experts"],
    "serving": ["PromptRoutedPipeline"],
    "slicing": ["PrunedUNet2DConditionModel", "slice_unet"],
    "stock": ["as_stock", "export_unet"],
    "training.fine_tuning": ["fine_tune"],
    "units": ["Architecture", "UnitGroup", "UnitSpace", "discover"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'prunekit' has no attribute {name!r}")
    module = importlib.import_module(f"prunekit.{_MODULE_OF[name]}")
    value = module if name == _MODULE_OF[name] else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
