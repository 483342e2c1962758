"""The call of a prompt-routed pipeline: each prompt goes to an expert, whose images stock pipelines draw.

Exports of a mixture hold a copy of this module's definitions (`standalone`), so they need no more of prunekit than what
fits into a file: no description of denoisers, no costs.
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

if TYPE_CHECKING:  # an export's file takes along what this module imports
    from prunekit.core.family import Family
    from prunekit.serving.experts import Mixture

DEFAULT_STEPS = 25


@dataclass
class RoutedOutput(BaseOutput):
    """images: as the stock pipeline gives them, in the order asked for. The rest has one entry an image.

    experts: who drew it. macs: what its denoiser calls took, both halves of guidance counted; empty where that is
    not known, outside of prunekit. seeds: of its noise.
    """

    images: Any
    experts: list[int]
    macs: list[int]
    seeds: list[int]


class RoutedCall:
    """What prompt-routed pipelines share: routing, grouping by expert, drawing. A base beside `DiffusionPipeline`.

    kind: the stock pipeline's class. family: what it does around its denoiser. mixture: experts and router.
    """

    kind: type[DiffusionPipeline]
    family: Family
    mixture: Mixture
    vae: Any
    scheduler: Any
    progress_bar: Callable[..., Any]  # a diffusers pipeline's

    def _prepare(self) -> None:
        """Make the locks; a constructor calls it."""
        self._texts = threading.Lock()  # tokenizers are not made for threads
        self._upcasting = threading.Lock()

    def _around(self, model: ModelMixin | None) -> DiffusionPipeline:
        """Return a stock pipeline around an expert, of this pipeline's parts."""
        raise NotImplementedError

    def _latent_size(self, model: ModelMixin) -> tuple[int, int]:
        """Return the latent's (h, w) that an expert was made for."""
        raise NotImplementedError

    def _macs_of(self, expert: int, model: ModelMixin, base: DiffusionPipeline, size: tuple[int, int]) -> int | None:
        """Return the exact MACs of all denoiser calls of one text at a latent of (h, w); None: not known."""
        return None

    @property
    def num_experts(self) -> int:
        """The number of experts."""
        return self.mixture.experts.num_experts

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As every diffusers pipeline's; the experts go along."""
        super().to(*args, **kwargs)  # type: ignore[misc]
        self.mixture.experts.to(self.vae.device, self.vae.dtype)
        return self

    def route(self, prompts: Sequence[str]) -> Tensor:
        """Return the expert of each prompt, LongTensor (n,); the same for a prompt in any company."""
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
        """Draw prompts, each by its expert.

        Args:
            prompt, negative_prompt: texts; a list of negative ones has one a prompt.
            num_inference_steps: scheduler steps.
            guidance_scale: classifier-free guidance; the recipe's by default.
            height, width: pixels; the model's own by default.
            num_images_per_prompt: images of a prompt, side by side in the output.
            seeds, generator: of the noise, as `images_of` says: one an image, so that it depends on nothing beside it.
            batch_size: images of one call of the stock pipeline. At 1 an image has the same bytes whatever is asked
                with it; in larger batches up to the rounding of the device's kernels.
            output_type: "pil", "np", "pt" or "latent".
            callback_on_step_end: called as callback(pipeline, step, timestep, tensors) for every batch; pipeline is the
                stock one, and its `image_indices` are the positions of the batch's images in the output.
            experts: who draws, one a prompt; by default whom the router chooses.
            return_dict: false: a tuple of RoutedOutput's fields.
            options: of the stock pipeline, the same for all images.

        Raises ValueError, one line, for what does not fit together or is unknown.

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
        """Return a stock pipeline around an expert, with a scheduler of its own: a call leaves nothing behind."""
        base = self._around(model)
        base.scheduler = copy.deepcopy(self.scheduler)  # set as a user does, so that it is taken as it is
        base.set_progress_bar_config(disable=True)
        return base

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        """Keep other threads out where the stock pipeline changes the shared autoencoder's type to decode."""
        upcasts = self.vae.dtype == torch.float16 and self.vae.config.get("force_upcast")
        with self._upcasting if upcasts else nullcontext():
            yield

    def _encoded(
        self, base: DiffusionPipeline, images: list[Image], guided: bool, clip_skip: int | None
    ) -> dict[str, Any]:
        """Return the texts of a batch as the stock pipeline's embeddings.

        Negative prompts are left out where no image has one, as the stock pipelines tell that from an empty text.
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
