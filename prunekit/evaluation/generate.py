"""Generate pictures with any diffusers text-to-image pipeline; a prompt and seed give the same picture in every run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from prunekit.core.registry import call_options, has_denoiser, pictures_of
from prunekit.data.picture_files import open_picture, write_image
from prunekit.models.shapes import pixels_of
from prunekit.runtime.errors import UserError
from prunekit.runtime.files import read_json, write_json
from prunekit.runtime.progress import Progress
from prunekit.runtime.work import Piece, Sharing

REQUEST = "request.json"


def draw(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    size: int | tuple[int, int] | None = None,
) -> Tensor:
    """Return uint8 pictures (n, 3, H, W) of one pipeline call.

    Each picture's noise comes from a CPU generator with the picture's seed, so `torch.Generator().manual_seed(seed)` in
    plain diffusers gives the same picture. `size` is the side or (height, width) in pixels; None: the pipeline's own.
    """
    if size is None and has_denoiser(pipeline):
        size = pixels_of(pipeline)
    height, width = (size, size) if isinstance(size, int) or size is None else size
    returned = pipeline(
        prompt=list(prompts),
        height=height,
        width=width,
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
        **call_options(pipeline, guidance),
    )
    output = pictures_of(pipeline, returned)  # (n, H, W, 3) in [0, 1]
    return torch.from_numpy((output * 255).round().astype(np.uint8)).permute(0, 3, 1, 2).contiguous()


@contextmanager
def quiet(pipeline: Any) -> Iterator[None]:
    """Disable, within the context, the pipeline's progress bar and its safety checker, which may blacken pictures."""
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


def generate(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = 25,
    guidance: float = 7.5,
    batch_size: int = 16,
    size: int | tuple[int, int] | None = None,
    title: str = "generate",
) -> Tensor:
    """Return uint8 pictures (n, 3, H, W), one per prompt.

    Each picture's noise comes from a CPU generator with the picture's seed, so `torch.Generator().manual_seed(seed)` in
    plain diffusers gives the same picture. Batches are fixed by index. `steps` is the number of scheduler steps (PNDM
    calls the denoiser once more). `size` is the side or (height, width) in pixels; None: the pipeline's own.
    Raises ValueError if there is not one seed per prompt.
    """
    _check(prompts, seeds, batch_size)
    pictures = []
    with quiet(pipeline), Progress(title, len(prompts)) as progress:
        for start in range(0, len(prompts), batch_size):
            batch = slice(start, start + batch_size)
            pictures.append(draw(pipeline, prompts[batch], seeds[batch], steps, guidance, size))
            progress.update(min(start + batch_size, len(prompts)))
    return torch.cat(pictures)


def generate_to(
    directory: Path,
    pipeline: DiffusionPipeline | Callable[[], DiffusionPipeline],
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = 25,
    guidance: float = 7.5,
    batch_size: int = 16,
    size: int | tuple[int, int] | None = None,
    title: str = "generate",
    sharing: Sharing | None = None,
) -> list[Path]:
    """Generate pictures as `generate` does into `directory`/00000.png, 00001.png …; return their paths.

    Pictures are written atomically, and a batch is skipped if all its pictures exist. The arguments are stored beside
    the pictures; a call with other arguments for the same directory raises ValueError, which names the difference.
    pipeline: the pipeline, or a function that returns it, which is called for this process's first batch.
    sharing: does the batches together with other processes that call this function; None: this process does all.
    """
    _check(prompts, seeds, batch_size)
    side = list(size) if isinstance(size, tuple) else size
    request = {"prompts": list(prompts), "seeds": list(seeds), "steps": steps, "guidance": guidance}
    request |= {"batch_size": batch_size, "size": side}
    if (directory / REQUEST).exists():
        earlier = read_json(directory / REQUEST)
        for name, value in request.items():
            if earlier.get(name) != value:
                raise UserError(
                    f"{directory} holds pictures made with other {name}; remove it or use another directory"
                )
    else:
        write_json(directory / REQUEST, request)
    paths = [directory / f"{index:05d}.png" for index in range(len(prompts))]
    batches = [slice(start, start + batch_size) for start in range(0, len(prompts), batch_size)]
    load = (lambda: pipeline) if isinstance(pipeline, DiffusionPipeline) else cache(pipeline)

    def done(batch: slice) -> bool:
        return all(path.exists() for path in paths[batch])

    with Progress(title, len(prompts)) as progress:

        def make(batch: slice) -> None:
            with quiet(load()):
                pictures = draw(load(), prompts[batch], seeds[batch], steps, guidance, size)
            for path, picture in zip(paths[batch], pictures, strict=True):
                write_image(path, Image.fromarray(picture.permute(1, 2, 0).numpy()))
            progress.update(min(batch.stop, len(prompts)))

        name = "-".join(directory.absolute().parts[-3:])
        pieces = [Piece(f"{name}-{b.start}", partial(done, b), partial(make, b)) for b in batches]
        if sharing is None:
            for piece in pieces:
                if not piece.done():
                    piece.do()
        else:
            sharing(pieces)
    return paths


def read_pictures(paths: Sequence[Path], size: int | None = None) -> Tensor:
    """Read PNG files of one size to uint8 (n, 3, H, W), resized to a side of `size` pixels (bilinear, antialiased)."""
    arrays = []
    for path in paths:
        rgb = open_picture(path).convert("RGB")
        if size is not None and rgb.size != (size, size):
            rgb = rgb.resize((size, size), Image.Resampling.BILINEAR)
        arrays.append(np.array(rgb))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def _check(prompts: Sequence[str], seeds: Sequence[int], batch_size: int) -> None:
    if len(prompts) != len(seeds) or not len(prompts):
        raise UserError(f"generation needs one seed per prompt, got {len(prompts)} prompts and {len(seeds)} seeds")
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
