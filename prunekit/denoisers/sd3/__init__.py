"""SD3Transformer2DModel, the denoiser of Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prunekit.core.denoiser import Denoiser

MODELS = ("SD3Transformer2DModel",)
ATTRIBUTE = "transformer"
PIPELINES = ("StableDiffusion3Pipeline",)


def denoiser() -> Denoiser:
    """Return the description of this family's models."""
    from .denoiser import SD3

    return SD3()
