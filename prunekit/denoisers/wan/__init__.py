"""WanTransformer3DModel, the denoiser of Wan 2.1, here for pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prunekit.core.denoiser import Denoiser

MODELS = ("WanTransformer3DModel",)
ATTRIBUTE = "transformer"
PIPELINES = ("WanPipeline",)


def denoiser() -> Denoiser:
    """Return the description of this family's models."""
    from .denoiser import Wan

    return Wan()
