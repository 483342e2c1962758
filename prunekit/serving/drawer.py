"""A pipeline opened to draw prompts as they come, for the demo and the server: checked, warmed up, timed."""

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

WARM_UP_STEPS = 2  # PixArt draws a single one by another rule, which most schedulers do not know
PIXELS = 8  # of which stock pipelines want sides to be multiples, whatever their autoencoder's scale


@dataclass(frozen=True)
class Picture:
    """An image, the seed of its noise, the exact MACs of its denoiser calls, and the batch that it was drawn in.

    batch: the images of that batch. seconds: that the batch took, with text encoder and autoencoder.
    """

    image: Image.Image
    seed: int
    macs: int
    batch: int
    seconds: float


class Drawer:
    """What draws with a pipeline's experts; each expert's first batch follows an untimed one, which loads it."""

    def __init__(self, pipeline: PromptRoutedPipeline):
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline = pipeline
        self._warm: set[int] = set()
        with pipeline.mixture.experts.use(0) as model:
            base = pipeline.parts.pipeline(model)
            sides, patch = latent_size(model), getattr(model.config, "patch_size", None)
        scale = base.vae_scale_factor
        self.size = (sides[0] * scale, sides[1] * scale)  # pixels (height, width) that the model was made for
        packed = 1 if pipeline.parts.denoiser == "unet" else max(2, patch or 1)  # latent positions of a token's side
        self.multiple = math.lcm(PIXELS, scale * packed)  # of which an image's sides must be multiples

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
            prompts: one an image.
            seeds: one an image.
            expert: who draws.
            steps: of all images.
            guidance: of all images.
            negative_prompts: one an image; None: none.
            size: pixels (height, width); None: the model's own.
            on_step: told after each step how many are done, and how many the scheduler makes, which may be more than
                `steps`; what it raises ends the batch.

        """
        height, width = size or self.size
        options: dict[str, Any] = {"guidance_scale": guidance, "height": height, "width": width}
        options |= {"negative_prompt": negative_prompts, "seeds": seeds, "batch_size": len(prompts)}
        options["experts"] = [expert] * len(prompts)
        with self.pipeline.mixture.experts.use(expert):  # loading is not drawing
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
        """Return the stock pipeline's argument for a callback that changes nothing."""

        def at_step_end(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(step + 1, pipeline.num_timesteps)
            return {}

        if "callback_on_step_end" in inspect.signature(self.pipeline.parts.kind.__call__).parameters:
            return {"callback_on_step_end": at_step_end}
        return {"callback": lambda step, timestep, latents: on_step(step + 1, step + 1)}  # PixArt's, without a total


def open_pipeline(
    directory: Path, method: str | None, device: str | None, max_resident: int | None = None
) -> PromptRoutedPipeline:
    """Load what is pruned to draw with; every expert's files are looked at, none is loaded yet.

    Args:
        directory: a run, what `prunekit export` wrote, or any diffusers pipeline.
        method: of a run; by default the one that routes, else its first.
        device: where it draws; a GPU by default where there is one.
        max_resident: experts in memory at once; None: all.

    Raises FileNotFoundError or ValueError, one line, for a folder without a model, or one that lacks an expert.

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
