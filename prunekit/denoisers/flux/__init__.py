"""FluxTransformer2DModel, the denoiser of FLUX.1."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prunekit.core.denoiser import Denoiser

MODELS = ("FluxTransformer2DModel",)
ATTRIBUTE = "transformer"
PIPELINES = ("FluxPipeline",)


def denoiser() -> Denoiser:
    """Return the description of this family's models."""
    from .denoiser import Flux

    return Flux()
