"""QwenImageTransformer2DModel, the denoiser of Qwen-Image."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prunekit.core.denoiser import Denoiser

MODELS = ("QwenImageTransformer2DModel",)
ATTRIBUTE = "transformer"
PIPELINES = ("QwenImagePipeline",)


def denoiser() -> Denoiser:
    """Return the description of this family's models."""
    from .denoiser import QwenImage

    return QwenImage()
