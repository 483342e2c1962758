"""One call of a denoiser as a pipeline makes it: what is timed, and what it is timed on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prunekit.core.call import Call, normal, predict
from prunekit.core.registry import denoiser_of

if TYPE_CHECKING:
    from diffusers import ModelMixin


def timed_inputs(model: ModelMixin, batch: int, latent: int | tuple[int, int], text_length: int, seed: int = 0) -> Call:
    """Return a call of normal noise and text on a model's device, in its dtype, for `batch` samples.

    The timestep is a scalar, as a pipeline's: which one it is does not change the time.
    """
    sides = (latent, latent) if isinstance(latent, int) else latent
    fill = normal(torch.Generator().manual_seed(seed))
    return denoiser_of(model).example(model, batch, sides, text_length, fill).to(model)


def timed_call(model: ModelMixin, call: Call) -> Callable[[], Tensor]:
    """Return what makes a call of the model."""
    return lambda: predict(model, call)


unet_inputs, unet_call = timed_inputs, timed_call  # as latency/measuring.py still calls them
