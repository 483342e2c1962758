"""The images that a call of the pipeline requests, one entry per image, before they are routed and drawn."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline

from prunekit.runtime.errors import UserError
from prunekit.serving.limits import MOST_SEED

PER_PROMPT = (  # arguments of the stock pipelines that would have to be split by expert
    "latents",
    "prompt_2",
    "negative_prompt_2",
    "prompt_3",
    "negative_prompt_3",
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
    "ip_adapter_image",
    "ip_adapter_image_embeds",
    "return_dict",
)


@dataclass(frozen=True)
class Image:
    """One image to draw: its prompts, its seed, and the noise generator that the caller gave, if any."""

    prompt: str
    negative_prompt: str | None
    seed: int
    generator: torch.Generator | None = None

    def noise(self) -> torch.Generator:
        """Return the generator of the image's noise: the caller's, or a CPU generator with the image's seed."""
        return self.generator or torch.Generator().manual_seed(self.seed)


def images_of(
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None = None,
    num_images_per_prompt: int = 1,
    seeds: int | Sequence[int] | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> list[Image]:
    """Return the requested images; the images of one prompt follow each other.

    Args:
        prompt: one text or several.
        negative_prompt: one text for all prompts, or one per prompt.
        num_images_per_prompt: images of each prompt.
        seeds: one per image or one per prompt; one int is the seed of every prompt. With one seed per prompt, image j
            of a prompt, counted from 0, has the seed plus j.
        generator: one per image, or a single one from which each image's seed is drawn, in this order. With neither
            seeds nor generator, seeds are drawn at random.

    Raises:
        UserError: an argument is faulty, or the arguments do not fit together.

    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise UserError("prompt must be a text or a list of texts with at least one; got " + repr(prompt)[:80])
    count = num_images_per_prompt
    if not isinstance(count, int) or count < 1:
        raise UserError(f"num_images_per_prompt={count!r}: a whole number, at least 1")
    negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str | None) else list(negative_prompt)
    if not all(isinstance(text, str | None) for text in negatives) or len({text is None for text in negatives}) > 1:
        raise UserError("negative_prompt must be a text or a list of texts; an empty text means none")
    if len(negatives) != len(prompts):
        raise UserError(
            f"negative_prompt has {len(negatives)} texts for {len(prompts)} prompts: give one text, or one per prompt"
        )
    total = len(prompts) * count
    if seeds is not None and generator is not None:
        raise UserError("seeds and generator are both given: give only one of them")
    generators: list[torch.Generator | None] = [None] * total
    if generator is None:
        numbers = _seeds(seeds, len(prompts), count)
    elif isinstance(generator, torch.Generator) and total > 1:
        drawn = torch.randint(MOST_SEED, (total,), generator=generator, device=generator.device)
        numbers = drawn.tolist()
    else:
        given = [generator] if isinstance(generator, torch.Generator) else list(generator)
        if len(given) != total:
            raise UserError(f"generator has {len(given)} entries for {total} images: give one, or one per image")
        generators, numbers = [*given], [rng.initial_seed() for rng in given]
    rows = [(text, negative) for text, negative in zip(prompts, negatives, strict=True) for _ in range(count)]
    return [Image(*row, seed, rng) for row, seed, rng in zip(rows, numbers, generators, strict=True)]


def _seeds(seeds: int | Sequence[int] | None, prompts: int, count: int) -> list[int]:
    if seeds is None:
        return torch.randint(MOST_SEED, (prompts * count,)).tolist()
    numbers = [seeds] * prompts if isinstance(seeds, int) else [int(seed) for seed in seeds]
    if len(numbers) == prompts:
        numbers = [seed + offset for seed in numbers for offset in range(count)]
    if len(numbers) != prompts * count:
        raise UserError(f"seeds has {len(numbers)} entries for {prompts} prompts and {prompts * count} images")
    return numbers


def check_options(kind: type[DiffusionPipeline], options: Mapping[str, Any]) -> None:
    """Raise UserError for an argument that the stock pipeline does not have, or that routing does not support."""
    known = [name for name in inspect.signature(kind.__call__).parameters if name not in ("self", "kwargs")]
    for name in options:
        if name in PER_PROMPT:
            raise UserError(f"{name} cannot be given to a prompt-routed pipeline, which batches prompts by expert")
        if name not in known:
            allowed = ", ".join(item for item in known if item not in PER_PROMPT)
            raise UserError(f"{name} is not an argument of {kind.__name__}; allowed: {allowed}")
