"""PixArtTransformer2DModel, the denoiser of PixArt-α and PixArt-Σ."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prunekit.core.denoiser import Denoiser

MODELS = ("PixArtTransformer2DModel",)
ATTRIBUTE = "transformer"
PIPELINES = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")


def denoiser() -> Denoiser:
    """Return the description of this family's models."""
    from .denoiser import PixArtTransformer

    return PixArtTransformer()
