"""The call of a prompt-routed pipeline: each prompt goes to an expert, and a stock pipeline with this expert draws it.

Exports of a mixture hold a copy of this module's definitions and of everything that they use (`standalone`). So this
module uses only small parts of prunekit, and neither the descriptions of denoisers nor the cost models.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from prunekit.core.registry import scale_of
from prunekit.runtime.errors import UserError
from prunekit.serving.requests import Image, check_options, images_of

if TYPE_CHECKING:  # an export's file also copies what this module imports outside of this block
    from prunekit.core.family import Family
    from prunekit.serving.experts import Mixture

DEFAULT_STEPS = 25


@dataclass
class RoutedOutput(BaseOutput):
    """The images of a call; the other fields have one entry per image.

    images: images in the form of the stock pipeline's output, in the order of the prompts.
    experts: index of the expert that drew the image.
    macs: exact MACs of the image's denoiser calls, with both halves of guidance; empty if they are not known, as in an
        export that runs without prunekit.
    seeds: seed of the image's noise.
    """

    images: Any
    experts: list[int]
    macs: list[int]
    seeds: list[int]


class RoutedCall:
    """Base class of prompt-routed pipelines, beside `DiffusionPipeline`: routing, grouping by expert, drawing.

    kind: the stock pipeline's class. family: the stock pipeline's `Family`. mixture: experts and router.
    """

    kind: type[DiffusionPipeline]
    family: Family
    mixture: Mixture
    vae: Any
    scheduler: Any
    progress_bar: Callable[..., Any]  # of `DiffusionPipeline`

    def _prepare(self) -> None:
        """Create the locks; a subclass's constructor must call this method."""
        self._texts = threading.Lock()  # tokenizers are not safe for threads
        self._upcasting = threading.Lock()

    def _around(self, model: ModelMixin | None) -> DiffusionPipeline:
        """Return a stock pipeline with `model` as its denoiser, or none, and with this pipeline's other parts."""
        raise NotImplementedError

    def _latent_size(self, model: ModelMixin) -> tuple[int, int]:
        """Return the latent's (h, w) that an expert was made for."""
        raise NotImplementedError

    def _macs_of(self, expert: int, model: ModelMixin, base: DiffusionPipeline, size: tuple[int, int]) -> int | None:
        """Return the exact MACs of all denoiser calls for one text; None if they are not known.

        A guided image takes two texts. size: height and width of the latent.
        """
        return None

    @property
    def num_experts(self) -> int:
        """The number of experts."""
        return self.mixture.experts.num_experts

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move the pipeline, as `DiffusionPipeline.to` does, and its experts; return the pipeline."""
        super().to(*args, **kwargs)  # type: ignore[misc]
        self.mixture.experts.to(self.vae.device, self.vae.dtype)
        return self

    def route(self, prompts: Sequence[str]) -> Tensor:
        """Return the expert index of each prompt, LongTensor (n,); it does not depend on the other prompts."""
        with self._texts:
            return self.mixture.route(prompts)

    @torch.no_grad()
    def __call__(  # noqa: D417
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = DEFAULT_STEPS,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        seeds: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        batch_size: int = 1,
        output_type: str = "pil",
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        experts: Sequence[int] | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> RoutedOutput | tuple:
        """Draw each prompt with its expert.

        Args:
            prompt, negative_prompt: one text or several; a list of negative prompts has one per prompt.
            num_inference_steps: scheduler steps.
            guidance_scale: scale of classifier-free guidance; by default the mixture's, which is that of its recipe.
            height, width: pixels; by default the size that the model was made for.
            num_images_per_prompt: images per prompt, which follow each other in the output.
            seeds, generator: seeds or generators of the noise, see `images_of`. Each image has its own noise, which
                does not depend on the other images.
            batch_size: images per call of the stock pipeline. At 1, an image's bytes do not depend on the other images.
                In larger batches, they depend on them up to the rounding of the device's kernels.
            output_type: "pil", "np", "pt" or "latent".
            callback_on_step_end: called as callback(pipeline, step, timestep, tensors) after each step of every batch.
                `pipeline` is the stock pipeline; its `image_indices` are the positions of the batch's images in the
                output.
            experts: index of the expert that draws, one per prompt; by default the router chooses.
            return_dict: whether to return a RoutedOutput; if false, return a tuple of its fields.
            options: further arguments of the stock pipeline, the same for all images.

        Raises:
            UserError: an argument is unknown or faulty, or the arguments do not fit together.

        """
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise UserError(f"output_type={output_type!r}: choose one of pil, np, pt, latent")
        check_options(self.kind, options)
        images = images_of(prompt, negative_prompt, num_images_per_prompt, seeds, generator)
        guidance = self.mixture.guidance if guidance_scale is None else guidance_scale
        if experts is None:
            chosen = self.route([image.prompt for image in images]).tolist()
        elif len(experts) * num_images_per_prompt == len(images):
            chosen = [int(expert) for expert in experts for _ in range(num_images_per_prompt)]
        else:
            raise UserError(f"experts has {len(experts)} entries for {len(images) // num_images_per_prompt} prompts")
        options |= {"num_inference_steps": num_inference_steps, "guidance_scale": guidance}
        options |= {"height": height, "width": width, "output_type": output_type}
        if callback_on_step_end is not None:
            options["callback_on_step_end"] = callback_on_step_end
        drawn: dict[int, tuple[Any, int | None]] = {}
        with self.progress_bar(total=len(images)) as bar:
            for expert in sorted(set(chosen)):
                rows = [row for row, assigned in enumerate(chosen) if assigned == expert]
                rows.sort(key=lambda row: (images[row].prompt, images[row].negative_prompt or "", images[row].seed))
                with self.mixture.experts.use(expert) as model:
                    for start in range(0, len(rows), batch_size):
                        batch = rows[start : start + batch_size]
                        drawn |= self._draw(expert, model, batch, [images[row] for row in batch], options)
                        bar.update(len(batch))
                del model  # or it would stay in memory while the next one is loaded
        output = RoutedOutput(
            images=_joined([drawn[row][0] for row in range(len(images))]),
            experts=chosen,
            macs=[macs for row in range(len(images)) if (macs := drawn[row][1]) is not None],
            seeds=[image.seed for image in images],
        )
        return output if return_dict else output.to_tuple()

    def _draw(
        self, expert: int, model: ModelMixin, rows: list[int], images: list[Image], options: dict[str, Any]
    ) -> dict[int, tuple[Any, int | None]]:
        """Draw one batch by one expert; return each row's image and the MACs of its denoiser calls."""
        base = self._base(model)
        base.image_indices = list(rows)
        if options["num_inference_steps"] == 1 and not self.family.draws_one_step(base):
            scheduler = type(base.scheduler).__name__
            raise UserError(f"num_inference_steps=1: {type(base).__name__} with {scheduler} needs at least 2")
        guidance, scale = options["guidance_scale"], scale_of(base)
        texts = self.family.texts(guidance, {**base.config, **options})
        assert scale is not None, "every pipeline has an autoencoder"
        sides = self._latent_size(model)
        height, width = options["height"] or sides[0] * scale, options["width"] or sides[1] * scale
        with self._texts:
            given = self._encoded(base, images, texts > 1, options.get("clip_skip"))
        options = {key: value for key, value in options.items() if key != "guidance_scale"}
        options |= {**self.family.call_options(base, guidance), "height": height, "width": width}
        with self._decoding():
            output = base(**given, **options, generator=[image.noise() for image in images])
            drawn = self.family.pictures(output)
        macs = self._macs_of(expert, model, base, (height // scale, width // scale))
        return {row: (image, macs and macs * texts) for row, image in zip(rows, drawn, strict=True)}

    def _base(self, model: ModelMixin | None) -> DiffusionPipeline:
        """Return a stock pipeline around an expert, with a copy of the scheduler, which its call may change."""
        base = self._around(model)
        base.scheduler = copy.deepcopy(self.scheduler)  # set as a user does: a constructor may change its config
        base.set_progress_bar_config(disable=True)
        return base

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        """Let one thread at a time in, if the stock pipeline changes the shared autoencoder's dtype to decode."""
        upcasts = self.vae.dtype == torch.float16 and self.vae.config.get("force_upcast")
        with self._upcasting if upcasts else nullcontext():
            yield

    def _encoded(
        self, base: DiffusionPipeline, images: list[Image], guided: bool, clip_skip: int | None
    ) -> dict[str, Any]:
        """Return the texts of a batch as the stock pipeline's embeddings.

        If no image has a negative prompt, none is passed: stock pipelines distinguish this from an empty text.
        """
        negatives = [image.negative_prompt for image in images]
        negative = None if all(text is None for text in negatives) else [text or "" for text in negatives]
        texts = [image.prompt for image in images]
        skipped = {} if clip_skip is None else {"clip_skip": clip_skip}
        return self.family.embeddings(base, texts, negative, guided, **skipped)


def _joined(images: list[Any]) -> Any:
    """Return single images in the form of a stock pipeline's output."""
    if isinstance(images[0], np.ndarray):
        return np.stack(images)
    return torch.stack(images) if isinstance(images[0], Tensor) else images
