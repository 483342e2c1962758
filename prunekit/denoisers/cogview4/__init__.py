"""CogView4Transformer2DModel, the denoiser of CogView4."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prunekit.core.denoiser import Denoiser

MODELS = ("CogView4Transformer2DModel",)
ATTRIBUTE = "transformer"
PIPELINES = ("CogView4Pipeline",)


def denoiser() -> Denoiser:
    """Return the description of this family's models."""
    from .denoiser import CogView4

    return CogView4()
