"""A pipeline that draws prompts as they arrive, for the demo and the server; it is checked, warmed up and timed."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from prunekit.core.registry import latent_size
from prunekit.runtime.errors import UserError
from prunekit.runtime.run_directory import RECIPE, method_directory
from prunekit.serving.pipeline import PromptRoutedPipeline
from prunekit.serving.routed_call import RoutedOutput

WARM_UP_STEPS = 2  # PixArt treats a single step in a different way, which most schedulers do not support
PIXELS = 8  # stock pipelines require sides that are multiples of this, for any scale of the autoencoder


@dataclass(frozen=True)
class Picture:
    """An image, the seed of its noise, the exact MACs of its denoiser calls, and the batch that it was drawn in.

    batch: number of images in the batch. seconds: time of the batch, including text encoder and autoencoder.
    """

    image: Image.Image
    seed: int
    macs: int
    batch: int
    seconds: float


class Drawer:
    """Draws batches with a pipeline's experts and times them; an untimed batch warms up each expert first."""

    def __init__(self, pipeline: PromptRoutedPipeline):
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline = pipeline
        self._warm: set[int] = set()
        with pipeline.mixture.experts.use(0) as model:
            base = pipeline.parts.pipeline(model)
            sides, patch = latent_size(model), getattr(model.config, "patch_size", None)
        scale = base.vae_scale_factor
        self.size = (sides[0] * scale, sides[1] * scale)  # pixels (height, width) that the model was made for
        packed = 1 if pipeline.parts.denoiser == "unet" else max(2, patch or 1)  # latent positions per side of a token
        self.multiple = math.lcm(PIXELS, scale * packed)  # an image's sides must be multiples of this

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        expert: int,
        steps: int,
        guidance: float,
        negative_prompts: Sequence[str] | None = None,
        size: tuple[int, int] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> list[Picture]:
        """Draw prompts by one expert, as one batch.

        Args:
            prompts: one per image.
            seeds: one per image.
            expert: index of the expert that draws.
            steps: scheduler steps of all images.
            guidance: guidance scale of all images.
            negative_prompts: one per image; None: no negative prompts.
            size: pixels (height, width); None: the size that the model was made for.
            on_step: called after each step with the number of steps done and the scheduler's number of steps, which may
                exceed `steps`; an exception that it raises ends the batch.

        """
        height, width = size or self.size
        options: dict[str, Any] = {"guidance_scale": guidance, "height": height, "width": width}
        options |= {"negative_prompt": negative_prompts, "seeds": seeds, "batch_size": len(prompts)}
        options["experts"] = [expert] * len(prompts)
        with self.pipeline.mixture.experts.use(expert):  # so the time excludes loading
            if expert not in self._warm:
                self.pipeline(prompts, num_inference_steps=WARM_UP_STEPS, **options)
                self._warm.add(expert)
            started = time.perf_counter()
            told: dict[str, Any] = {} if on_step is None else self._told(on_step)
            output = self.pipeline(prompts, num_inference_steps=steps, **told, **options)
            seconds = time.perf_counter() - started
        assert isinstance(output, RoutedOutput)
        drawn = zip(output.images, output.seeds, output.macs, strict=True)
        return [Picture(*one, len(prompts), seconds) for one in drawn]

    def _told(self, on_step: Callable[[int, int], None]) -> dict[str, Any]:
        """Return the stock pipeline's callback argument that calls `on_step` after each step."""

        def at_step_end(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(step + 1, pipeline.num_timesteps)
            return {}

        if "callback_on_step_end" in inspect.signature(self.pipeline.parts.kind.__call__).parameters:
            return {"callback_on_step_end": at_step_end}
        return {"callback": lambda step, timestep, latents: on_step(step + 1, step + 1)}  # PixArt's, without total


def open_pipeline(
    directory: Path, method: str | None, device: str | None, max_resident: int | None = None
) -> PromptRoutedPipeline:
    """Open a pipeline to draw with; check that every expert has weights, but load none yet.

    Args:
        directory: directory of a run, an export, or any diffusers pipeline.
        method: method of the run; by default the method that routes, else the first by name.
        device: device that draws; by default a GPU if there is one.
        max_resident: largest number of experts in memory; None: all.

    Raises:
        FileNotFoundError: the directory holds no model, or lacks an expert.
        UserError: the model is faulty, an expert has no weights, or the device is not usable.

    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory; give the directory of a run or an export")
    if device is not None:
        _check_device(device)
    if (directory / RECIPE).is_file():
        method_directory(directory, method)  # before the model is loaded
    pipeline = PromptRoutedPipeline.from_pretrained(directory, method, device=device, max_resident=max_resident)
    for index in range(pipeline.num_experts):
        if not pipeline.mixture.experts.num_weights(index):
            raise UserError(f"expert {index} of {directory} has no weights; resume the run, or export it again")
    return pipeline


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {device}: not usable on this machine ({reason}); omit it, or give cpu") from error
