"""An evaluator's figures for pictures of known quality, as bounds for the figures of generated pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prunekit.core.family import Family, Guided
from prunekit.data.images import CaptionedImages
from prunekit.evaluation.metrics import clip_score, retrieval
from prunekit.evaluation.table import SEEN, TEXT
from prunekit.runtime.randomness import generator

REAL, REAL_TRAINING = "real", "real, of training"  # rows
TEXT_FIGURES = ("clip_score", "top1", "top5")


def text_figures(evaluator: Any, images: Tensor, texts: Tensor, targets: Tensor) -> dict[str, float]:
    """Return {"clip_score", "top1", "top5"} of uint8 pictures (n, 3, H, W).

    texts: (N, E), the embedded names. targets: (n,), the index of the name that each picture shows.
    """
    embeddings = evaluator.embed_images(images)
    return {
        "clip_score": clip_score(embeddings, texts[targets]),
        "top1": retrieval(embeddings, texts, targets, k=1),
        "top5": retrieval(embeddings, texts, targets, k=5),
    }


def evaluator_ceiling(
    evaluator: Any,
    data: CaptionedImages,
    shown: Tensor | None = None,
    autoencoder: Any | None = None,
    family: Family | None = None,
    size: int = 64,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Return {row: {"clip_score", "top1", "top5"}} of real, softened, reconstructed and noise pictures.

    The rows, which `table.CEILING_COLUMNS` shows, are "real", pictures of the data set; "half resolution", the same
    resized to half and back; "reconstructed", the same encoded and decoded by the autoencoder, the best that a latent
    diffusion model with this autoencoder can reach; and "noise", uniform random pixels.

    Args:
        evaluator: the evaluator.
        data: the data set; a picture's name is searched among all names of the data set.
        shown: (n,) indices of the pictures to use; None: all.
        autoencoder: an AutoencoderKL, or the autoencoder of `family`; None: no row "reconstructed".
        family: family of the autoencoder.
        size: side of the pictures in pixels.
        seed: seed of the noise.

    """
    targets = torch.arange(data.num_images) if shown is None else shown
    real, texts = data.pixels(targets.tolist(), size), evaluator.embed_texts(data.names)
    pictures = {REAL: real, "half resolution": to_bytes(soften(real.float() / 255, 2))}
    if autoencoder is not None:
        pictures["reconstructed"] = reconstruct(autoencoder, real, family=family)
    pictures["noise"] = torch.randint(0, 256, real.shape, dtype=torch.uint8, generator=generator(seed, "ceiling"))
    return {row: text_figures(evaluator, images, texts, targets) for row, images in pictures.items()}


def real_figures(evaluator: Any, data: CaptionedImages, shown: Tensor, size: int) -> dict[str, float]:
    """Return {"clip_score", "top1", "top5"} of the data's pictures `shown` (n,), at a side of `size` pixels."""
    return text_figures(evaluator, data.pixels(shown.tolist(), size), evaluator.embed_texts(data.names), shown)


def unfit(known: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the figures that the evaluator cannot judge on held-out pictures.

    These are the figures in which real held-out pictures score less than half as high as real training pictures.
    """
    if REAL_TRAINING not in known:
        return []
    return [name for name in TEXT_FIGURES if known[REAL][name] < known[REAL_TRAINING][name] / 2]


def fit(row: dict[str, Any], left_out: Sequence[str]) -> dict[str, Any]:
    """Return a table's row without the figures that the evaluator cannot judge."""
    keys = {name for figure in left_out for name in (figure, f"{SEEN}{figure}")}
    return {name: value for name, value in row.items() if name not in keys}


def unfit_line(name: str, known: Mapping[str, Mapping[str, float]]) -> str:
    """Return a sentence that says why a figure is left out."""
    column = next(column for column in TEXT if column.key == name)
    unit = f" {column.unit}" if column.unit else ""
    held, training = (f"{column.shown(known[pictures][name])}{unit}" for pictures in (REAL, REAL_TRAINING))
    return (
        f"{column.title} is omitted: the evaluator scores real held-out pictures {held} and real training pictures "
        f"{training}, so it cannot judge held-out pictures"
    )


@torch.no_grad()
def reconstruct(autoencoder: Any, images: Tensor, batch_size: int = 64, family: Family | None = None) -> Tensor:
    """Encode and decode uint8 pictures (n, 3, H, W); the latents are the posterior's means.

    family: family of the autoencoder; None: the autoencoder is an AutoencoderKL.
    """
    parameter, through = next(autoencoder.parameters()), (family or Guided()).reconstruct
    outputs = []
    for part in images.split(batch_size):
        pixels = through(autoencoder, to_unit(part).to(parameter))
        outputs.append(to_bytes(pixels.float().cpu() / 2 + 0.5))
    return torch.cat(outputs)


def to_bytes(pixels: Tensor) -> Tensor:
    """Turn float pixels in [0, 1] into uint8; values outside are clipped."""
    return (pixels.clamp(0, 1) * 255).round().byte()


def to_unit(images: Tensor) -> Tensor:
    """Turn uint8 pixels into float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def soften(pixels: Tensor, factor: int) -> Tensor:
    """Return float pictures (n, 3, H, W) resized to 1/`factor` of the resolution and back, which removes detail."""
    size = pixels.shape[-2:]
    small = F.interpolate(pixels, [side // factor for side in size], mode="bilinear", antialias=True)
    return F.interpolate(small, size, mode="bicubic").clamp(0, 1)
