"""The module that saved pipelines name for the classes of pruned models, which lie in `denoisers`."""

from diffusers import ModelMixin  # a pipeline's loader looks for it here

from prunekit.core.slicing import slice_model as slice_unet
from prunekit.denoisers.unet.pruned import PrunedUNet2DConditionModel

__all__ = ["ModelMixin", "PrunedUNet2DConditionModel", "slice_unet"]
