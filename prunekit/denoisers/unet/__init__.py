"""UNet2DConditionModel, the denoiser of Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prunekit.core.denoiser import Denoiser

MODELS = ("UNet2DConditionModel",)
ATTRIBUTE = "unet"
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
UNNAMED = "UNet2DConditionModel"  # the class of old configs, which name none


def denoiser() -> Denoiser:
    """Return the description of this family's models."""
    from .denoiser import UNet

    return UNet()
