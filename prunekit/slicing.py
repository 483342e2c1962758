"""The module that saved pipelines name for the classes of pruned models; the classes are defined in `denoisers`."""

from typing import Any

from diffusers import ModelMixin  # a pipeline's loader looks for it here

from prunekit.core.registry import denoiser_named
from prunekit.core.slicing import export_model as export_unet
from prunekit.core.slicing import slice_model as slice_unet
from prunekit.denoisers.unet.pruned import PrunedUNet2DConditionModel
from prunekit.runtime.errors import UserError

__all__ = ["ModelMixin", "PrunedUNet2DConditionModel", "export_unet", "slice_unet"]


def __getattr__(name: str) -> Any:
    try:
        if name.startswith("Pruned"):
            return denoiser_named(name).pruned_class()
    except UserError:
        pass
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
