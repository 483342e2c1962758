"""prunekit: prune a text-to-image diffusion model, slice it, recover it, and route prompts to pruned experts.

Names are imported at their first use.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from prunekit import denoisers
from prunekit.runtime import threads

threads.configure()
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # for onnxruntime, which diffusers imports with any pipeline
denoisers.register()

if TYPE_CHECKING:
    from prunekit import methods
    from prunekit.data.config import DataConfig, load_data
    from prunekit.data.encoded import encode
    from prunekit.data.prompt_encoder import load_prompt_encoder
    from prunekit.evaluation.evaluate import evaluate
    from prunekit.measuring.interleaved import measure
    from prunekit.models import load_pipeline, load_shape
    from prunekit.recovery.closed_form import ClosedFormConfig, refit
    from prunekit.recovery.deltas import DeltaConfig
    from prunekit.recovery.fine_tuning import FineTuneConfig, fine_tune
    from prunekit.recovery.in_memory import recover_experts
    from prunekit.recovery.low_rank import LoraConfig

    from .core.cost import CostModel
    from .core.discovery import discover
    from .core.gates import gated, pipeline_rows
    from .core.registry import register_denoiser
    from .core.slicing import export_model, slice_model
    from .core.space import Architecture, UnitGroup, UnitSpace
    from .core.timesteps import TimestepBins, TimestepModel
    from .denoisers.unet.stock import as_stock
    from .serving import PromptRoutedPipeline
    from .slicing import PrunedUNet2DConditionModel, export_unet, slice_unet

__all__ = [
    "Architecture",
    "ClosedFormConfig",
    "CostModel",
    "DataConfig",
    "DeltaConfig",
    "FineTuneConfig",
    "LoraConfig",
    "PromptRoutedPipeline",
    "PrunedUNet2DConditionModel",
    "TimestepBins",
    "TimestepModel",
    "UnitGroup",
    "UnitSpace",
    "as_stock",
    "discover",
    "encode",
    "evaluate",
    "export_model",
    "export_unet",
    "fine_tune",
    "gated",
    "load_data",
    "load_pipeline",
    "load_prompt_encoder",
    "load_shape",
    "measure",
    "methods",
    "pipeline_rows",
    "recover_experts",
    "refit",
    "register_denoiser",
    "slice_model",
    "slice_unet",
]

_MODULES = {
    "core.cost": ["CostModel"],
    "core.discovery": ["discover"],
    "core.gates": ["gated", "pipeline_rows"],
    "core.registry": ["register_denoiser"],
    "core.slicing": ["export_model", "slice_model"],
    "core.space": ["Architecture", "UnitGroup", "UnitSpace"],
    "core.timesteps": ["TimestepBins", "TimestepModel"],
    "denoisers.unet.stock": ["as_stock"],
    "data.config": ["DataConfig", "load_data"],
    "data.encoded": ["encode"],
    "data.prompt_encoder": ["load_prompt_encoder"],
    "evaluation.evaluate": ["evaluate"],
    "measuring.interleaved": ["measure"],
    "methods": ["methods"],
    "models": ["load_pipeline", "load_shape"],
    "recovery.closed_form": ["ClosedFormConfig", "refit"],
    "recovery.deltas": ["DeltaConfig"],
    "recovery.fine_tuning": ["FineTuneConfig", "fine_tune"],
    "recovery.in_memory": ["recover_experts"],
    "recovery.low_rank": ["LoraConfig"],
    "serving": ["PromptRoutedPipeline"],
    "slicing": ["PrunedUNet2DConditionModel", "export_unet", "slice_unet"],
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
