"""PromptRoutedPipeline: a pipeline whose denoiser is, prompt by prompt, the one that the router chooses."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from prunekit.core.cost import CostModel
from prunekit.core.discovery import discover
from prunekit.core.registry import family_of, latent_size, scale_of, text_length, texts_of
from prunekit.core.timesteps import TimestepModel
from prunekit.data.prompt_encoder import EMBEDDED, PromptEncoder, load_prompt_encoder
from prunekit.export.pipeline_parts import Parts
from prunekit.methods.router import Router
from prunekit.runtime.errors import UserError
from prunekit.serving.experts import DEFAULT_GUIDANCE, Experts, Mixture
from prunekit.serving.requests import Image, check_options, images_of
from prunekit.serving.routed_directory import load, save

DEFAULT_STEPS = 25
OPTIONAL = ("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")  # parts that some pipelines have
PARTS = ("vae", "text_encoder", "tokenizer", "scheduler", *OPTIONAL)


@dataclass
class RoutedOutput(BaseOutput):
    """images: as the stock pipeline gives them, in the order asked for. The rest has one entry an image.

    experts: who drew it. macs: what its denoiser calls took, both halves of guidance counted. seeds: of its noise.
    """

    images: Any
    experts: list[int]
    macs: list[int]
    seeds: list[int]


class PromptRoutedPipeline(DiffusionPipeline):
    """A base pipeline that draws each prompt with the expert that the router chooses.

    Call it like the base pipeline. Prompts of one expert run together, `batch_size` of them per call of the stock
    pipeline. Images are returned in the order of the prompts, and the noise of each depends only on its seed. Assign
    any diffusers scheduler to `.scheduler`. Many threads may call one pipeline. Create it by `from_pretrained` or
    `from_experts`.
    """

    _optional_components = list(OPTIONAL)  # noqa: RUF012 (as diffusers has it)

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: Any,
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
        text_encoder_3: Any = None,
        tokenizer_3: Any = None,
        parts: Parts | None = None,
        mixture: Mixture | None = None,
    ):
        super().__init__()
        if parts is None or mixture is None:
            raise UserError("create a PromptRoutedPipeline with from_pretrained(RUN or DIRECTORY) or from_experts")
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
        )
        self.parts, self.mixture = parts, mixture
        self._texts = threading.Lock()  # tokenizers are not made for threads
        self._upcasting = threading.Lock()
        self._macs: dict[tuple[tuple[int, int], tuple[int, int]], int] = {}

    @classmethod
    def of(cls, parts: Parts, mixture: Mixture) -> PromptRoutedPipeline:
        """Put a mixture of experts into a pipeline's parts."""
        given = {name: parts.components[name] for name in PARTS if name in parts.components}
        return cls(**given, parts=parts, mixture=mixture)

    @classmethod
    def from_experts(
        cls,
        pipeline: DiffusionPipeline,
        experts: Sequence[ModelMixin],
        router: Router | None = None,
        prompt_encoder: PromptEncoder | str | Path = EMBEDDED,
        guidance: float = DEFAULT_GUIDANCE,
    ) -> PromptRoutedPipeline:
        """Serve denoisers that are in memory, in place of a pipeline's own, whose other parts are shared.

        experts: denoisers; they are put into evaluation mode and frozen, and move where the pipeline moves.
        router: sends prompts, embedded by `prompt_encoder` (or what its name loads), to them; None if there is one.
        guidance: where a call asks for none. Raises ValueError for a router of another number of experts.
        """
        if (1 if router is None else router.num_experts) != len(experts):
            known = "no router, which takes one expert" if router is None else f"a router of {router.num_experts}"
            raise UserError(f"{len(experts)} experts with {known}: give as many experts as the router has")
        models = [model.eval().requires_grad_(False) for model in experts]
        held = Experts(
            lambda index, device, dtype: models[index].to(device=device, dtype=dtype),
            lambda index: models[index].num_parameters(),
            len(models),
            pipeline.device,
            pipeline.dtype,
        )
        encoder = load_prompt_encoder(prompt_encoder) if isinstance(prompt_encoder, str | Path) else prompt_encoder
        return cls.of(Parts.of(pipeline), Mixture(held, router, encoder if router else None, guidance))

    @classmethod
    def from_pretrained(  # noqa: D417
        cls,
        directory: str | Path,
        method: str | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        max_resident: int | None = None,
        max_bytes: int | None = None,
    ) -> PromptRoutedPipeline:
        """Load a run, what `save_pretrained` or `prunekit export` wrote, or any diffusers directory (one expert).

        Args:
            directory: where it is.
            method: of a run: whose architectures; by default the one that routes, else the first by name.
            device: where it runs; by default a GPU where there is one.
            dtype: of all weights.
            max_resident, max_bytes: how many experts, or bytes of their weights, may be in memory; by default all.
                The least recently used goes first; an expert is read when it is first used.

        Raises FileNotFoundError for a directory without a model, ValueError, one line, for a faulty one.

        """
        parts, mixture = load(Path(directory), method, device, dtype, max_resident, max_bytes)
        return cls.of(parts, mixture)

    def save_pretrained(self, save_directory: str | Path, tier: str = "auto") -> None:
        """Write base pipeline, experts, router and prompt encoder as one directory of safetensors and JSON.

        tier: tier of the experts' files, as in `prunekit export`.
        """
        save(self.parts, self.mixture, Path(save_directory), tier)

    @property
    def text_length(self) -> int:
        """The tokens of a prompt as the denoiser takes it."""
        with self.mixture.experts.use(0) as model:
            return text_length(self._base(model))

    @property
    def num_experts(self) -> int:
        """The number of experts."""
        return self.mixture.experts.num_experts

    def to(self, *args: Any, **kwargs: Any) -> PromptRoutedPipeline:
        """As every diffusers pipeline's; the experts go along."""
        super().to(*args, **kwargs)
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
        check_options(self.parts.kind, options)
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
        drawn: dict[int, tuple[Any, int]] = {}
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
            macs=[drawn[row][1] for row in range(len(images))],
            seeds=[image.seed for image in images],
        )
        return output if return_dict else output.to_tuple()

    def _draw(
        self, expert: int, model: ModelMixin, rows: list[int], images: list[Image], options: dict[str, Any]
    ) -> dict[int, tuple[Any, int]]:
        """Draw one batch by one expert; return each row's image and the MACs of its denoiser calls."""
        base = self._base(model)
        base.image_indices = list(rows)
        family, guidance = family_of(base), options["guidance_scale"]
        texts = texts_of(base, guidance, options)
        scale, sides = scale_of(base), latent_size(model)
        assert scale is not None, "every pipeline has an autoencoder"
        height, width = options["height"] or sides[0] * scale, options["width"] or sides[1] * scale
        with self._texts:
            given = _encoded(base, images, texts > 1, options.get("clip_skip"))
        options = {key: value for key, value in options.items() if key != "guidance_scale"}
        options |= {**family.call_options(base, guidance), "height": height, "width": width}
        with self._decoding():
            output = base(**given, **options, generator=[image.noise() for image in images])
            drawn = family.pictures(output)
        size = (height // scale, width // scale)
        if isinstance(model, TimestepModel):
            bins = model.bins.of(torch.as_tensor(base.scheduler.timesteps)).tolist()
            calls = sum(self._call_macs((expert, index), model.slices[index], size) for index in bins)
        else:
            calls = self._call_macs((expert, 0), model, size) * len(base.scheduler.timesteps)
        macs = calls * texts
        return {row: (image, macs) for row, image in zip(rows, drawn, strict=True)}

    def _base(self, model: ModelMixin) -> DiffusionPipeline:
        """Return a stock pipeline around an expert, with a scheduler of its own: a call leaves nothing behind."""
        parts = {name: getattr(self, name) for name in PARTS if name != "scheduler" and name in self.parts.components}
        base = self.parts.pipeline(model, **parts)
        base.scheduler = copy.deepcopy(self.scheduler)  # set as a user does, so that it is taken as it is
        base.set_progress_bar_config(disable=True)
        return base

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        """Keep other threads out where the stock pipeline changes the shared autoencoder's type to decode."""
        upcasts = self.vae.dtype == torch.float16 and self.vae.config.get("force_upcast")
        with self._upcasting if upcasts else nullcontext():
            yield

    def _call_macs(self, slot: tuple[int, int], model: ModelMixin, size: tuple[int, int]) -> int:
        """Exact MACs of one denoiser call for one image at a latent of (h, w); slot: expert, and bin of timesteps."""
        if (slot, size) not in self._macs:
            cost = CostModel(model, discover(model, "none"), size, text_length(self._base(model)))
            self._macs[slot, size] = cost.dense_macs
        return self._macs[slot, size]


def _encoded(base: DiffusionPipeline, images: list[Image], guided: bool, clip_skip: int | None) -> dict[str, Any]:
    """Return the texts of a batch as the stock pipeline's embeddings.

    Negative prompts are left out where no image has one, as the stock pipelines tell that from an empty text.
    """
    negatives = [image.negative_prompt for image in images]
    negative = None if all(text is None for text in negatives) else [text or "" for text in negatives]
    texts = [image.prompt for image in images]
    skipped = {} if clip_skip is None else {"clip_skip": clip_skip}
    return family_of(base).embeddings(base, texts, negative, guided, **skipped)


def _joined(images: list[Any]) -> Any:
    """Return single images in the form of a stock pipeline's output."""
    if isinstance(images[0], np.ndarray):
        return np.stack(images)
    return torch.stack(images) if isinstance(images[0], Tensor) else images
