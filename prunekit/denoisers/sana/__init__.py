"""SanaTransformer2DModel, the denoiser of Sana 1.0 and 1.5."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prunekit.core.denoiser import Denoiser

MODELS = ("SanaTransformer2DModel",)
ATTRIBUTE = "transformer"
PIPELINES = ("SanaPipeline",)


def denoiser() -> Denoiser:
    """Return the description of this family's models."""
    from .denoiser import SanaTransformer

    return SanaTransformer()
