"""Pictures from a diffusers text-to-image pipeline, keyed by (prompt, seed): one batch at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def draw(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    size: int | tuple[int, int] | None = None,
) -> Tensor:
    """Return uint8 pictures (n, 3, H, W) of one pipeline call.

    Each picture's noise comes from its own seed's CPU generator, so `torch.Generator().manual_seed(seed)` in plain
    diffusers gives the same picture. `size` is pixels, one side or (height, width), by default the pipeline's.
    """
    height, width = (size, size) if isinstance(size, int) or size is None else size
    output = pipeline(
        list(prompts),
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
    ).images  # (n, H, W, 3) in [0, 1]
    return torch.from_numpy((output * 255).round().astype(np.uint8)).permute(0, 3, 1, 2).contiguous()


@contextmanager
def quiet(pipeline: Any) -> Iterator[None]:
    """Leave out the pipeline's own progress bar and its safety checker, which would blacken pictures of a test."""
    checker = getattr(pipeline, "safety_checker", None)
    settings = getattr(pipeline, "_progress_bar_config", None)
    if checker is not None:
        pipeline.safety_checker = None
    if hasattr(pipeline, "set_progress_bar_config"):
        pipeline.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        if checker is not None:
            pipeline.safety_checker = checker
        if hasattr(pipeline, "set_progress_bar_config"):
            pipeline.set_progress_bar_config(**(settings or {}))
