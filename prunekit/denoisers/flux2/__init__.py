"""Flux2Transformer2DModel, the denoiser of FLUX.2 dev and klein."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prunekit.core.denoiser import Denoiser

MODELS = ("Flux2Transformer2DModel",)
ATTRIBUTE = "transformer"
PIPELINES = ("Flux2Pipeline", "Flux2KleinPipeline")


def denoiser() -> Denoiser:
    """Return the description of this family's models."""
    from .denoiser import Flux2

    return Flux2()
