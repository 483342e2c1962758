"""ZImageTransformer2DModel, the denoiser of Z-Image and Z-Image-Turbo."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prunekit.core.denoiser import Denoiser

MODELS = ("ZImageTransformer2DModel",)
ATTRIBUTE = "transformer"
PIPELINES = ("ZImagePipeline",)


def denoiser() -> Denoiser:
    """Return the description of this family's models."""
    from .denoiser import ZImage

    return ZImage()
