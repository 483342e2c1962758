"""Train the embedded evaluator by contrasting distorted pictures with their names and captions."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunekit.data.images import CaptionedImages
from prunekit.evaluation.ceiling import soften
from prunekit.evaluation.evaluator import Evaluator, EvaluatorConfig, vocabulary_of
from prunekit.runtime.precision import autocast
from prunekit.runtime.randomness import epoch_indices, generator
from prunekit.training.trainer import Trainer, TrainerConfig

MAX_SCALE = 100.0  # of the logits, as in CLIP


class ImageTextModel(Protocol):
    """Interface of the models that `ContrastiveObjective` can train."""

    logit_scale: nn.Parameter  # log of the softmax's inverse temperature

    def image_embeddings(self, pixels: Tensor) -> Tensor:
        """Embed float pixels (n, 3, H, W) in [0, 1] as unit vectors (n, E)."""

    def text_embeddings(self, texts: list[str]) -> Tensor:
        """Embed texts as unit vectors (n, E)."""


@dataclass
class ContrastiveObjective:
    """Symmetric InfoNCE between augmented pictures and captions, and a softmax over all names.

    The second term is InfoNCE with all other names of the data set as negatives. It is affordable because the text
    tower is small, and it trains the model for the search of the nearest name.
    """

    model: ImageTextModel
    data: CaptionedImages
    size: int  # pixels of a picture's side
    batch_size: int
    seed: int
    device: torch.device
    precision: str = "float32"  # `Precision` of the image tower; the losses are float32
    images: Tensor = field(init=False, repr=False)  # (num_images, 3, size, size) uint8
    texts: list[list[str]] = field(init=False, repr=False)  # an image's name first, then its other captions

    def __post_init__(self) -> None:
        self.images = self.data.pixels(range(self.data.num_images), self.size)
        self.texts = [[name] for name in self.data.names]
        for pair in self.data.training_pairs().tolist():
            texts, caption = self.texts[int(self.data.image_index[pair])], self.data.captions[pair]
            if caption not in texts:
                texts.append(caption)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Return the modules that are trained, by the names that checkpoints give them."""
        assert isinstance(self.model, nn.Module)
        return {"model": self.model}

    def batch(self, step: int) -> tuple[Tensor, list[str], int]:
        """Return (image indices (B,), one caption per image, step)."""
        indices = epoch_indices(self.data.num_images, self.batch_size, self.seed, step)
        draws = torch.rand(self.batch_size, generator=generator(self.seed, "caption", step)).tolist()
        captions = [
            self.texts[i][int(draw * len(self.texts[i]))] for i, draw in zip(indices.tolist(), draws, strict=True)
        ]
        return indices, captions, step

    def shared_loss(self, batch: tuple[Tensor, list[str], int]) -> dict[str, Tensor]:
        """Return both terms; they need the whole batch, because its other samples are the negatives of a sample."""
        indices, captions, step = batch
        pixels = augment(self.images[indices], generator(self.seed, "augment", step)).to(self.device)
        with autocast(self.precision, self.device):
            images = self.model.image_embeddings(pixels)
        images = images.float()  # (B, E)
        texts, names = self.model.text_embeddings(captions), self.model.text_embeddings(self.data.names)
        scale = self.model.logit_scale.exp().clamp(max=MAX_SCALE)
        same_text = torch.tensor([[a == b for b in captions] for a in captions])
        positive = (same_text | (indices[:, None] == indices)).to(self.device)  # (B, B)
        logits = scale * images @ texts.T  # (B, B)
        return {
            "pairs": (_info_nce(logits, positive) + _info_nce(logits.T, positive.T)) / 2,
            "names": F.cross_entropy(scale * images @ names.T, indices.to(self.device)),
        }

    def micro_loss(self, batch: tuple[Tensor, list[str], int], positions: Tensor) -> dict[str, Tensor]:
        """Return no terms: all of them need the whole batch."""
        return {}


def _info_nce(logits: Tensor, positive: Tensor) -> Tensor:
    """Return the mean over rows of −log(the softmax's mass on the positives)."""
    chosen = logits.masked_fill(~positive, -math.inf)
    return (logits.logsumexp(dim=1) - chosen.logsumexp(dim=1)).mean()


def augment(images: Tensor, draws: torch.Generator) -> Tensor:
    """Distort uint8 pictures (B, 3, H, W) as a generative model might; return float32 pictures in [0, 1].

    A small rotation, scale, shift and elastic warp; contrast, brightness, saturation and channel gains; softness (a mix
    with a copy of half or a third of the resolution); mild noise. No flips, because names contain left and right.
    """
    batch, _, height, width = images.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=draws)

    angle, zoom = uniform(-0.12, 0.12), uniform(0.9, 1.12, 2)  # in radians; a zoom above 1 shrinks
    shift = uniform(-0.1, 0.1, 2)  # as a fraction of half a side
    cosine, sine = angle.cos(), angle.sin()
    affine = torch.stack(
        [
            torch.stack([cosine * zoom[:, 0], -sine * zoom[:, 1], shift[:, 0]], dim=1),
            torch.stack([sine * zoom[:, 0], cosine * zoom[:, 1], shift[:, 1]], dim=1),
        ],
        dim=1,
    )  # (B, 2, 3)
    warp = torch.randn(batch, 2, 4, 4, generator=draws) * uniform(0, 0.03, 1, 1, 1)
    warp = F.interpolate(warp, (height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    grid = F.affine_grid(affine, [batch, 3, height, width], align_corners=False) + warp
    pixels = F.grid_sample(images.float() / 255, grid, padding_mode="border", align_corners=False)

    gray = pixels.mean(dim=1, keepdim=True)
    pixels = gray + (pixels - gray) * uniform(0.7, 1.25, 1, 1, 1)
    pixels = 0.5 + (pixels - 0.5) * uniform(0.8, 1.15, 1, 1, 1) + uniform(-0.08, 0.08, 1, 1, 1)
    pixels = pixels * uniform(0.94, 1.06, 3, 1, 1)

    half, third = (soften(pixels, factor) for factor in (2, 3))
    soft = torch.where(uniform(0, 1, 1, 1, 1) < 0.6, half, third)
    pixels = pixels + uniform(-0.6, 1.0, 1, 1, 1).clamp(min=0) * (soft - pixels)
    noise = torch.randn(pixels.shape, generator=draws) * uniform(-0.04, 0.08, 1, 1, 1).clamp(min=0)
    return (pixels + noise).clamp(0, 1)


def train_evaluator(
    data: CaptionedImages,
    config: TrainerConfig,
    directory: Path,
    seed: int,
    log: Callable[[dict], None] | None = None,
    shape: EvaluatorConfig | None = None,
) -> Evaluator:
    """Train an evaluator on every picture of `data`, save it to `directory`/evaluator, and return it as saved.

    Resumes from the checkpoints in `directory`/checkpoints, which it removes at the end.
    """
    shape = shape or EvaluatorConfig()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    texts = [*data.names, *(data.captions[pair] for pair in data.training_pairs().tolist())]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        evaluator = Evaluator(shape, vocabulary_of(texts)).to(device)
    objective = ContrastiveObjective(evaluator, data, shape.size, config.batch_size, seed, device, config.precision)
    trainer = Trainer(config, objective, directory / "checkpoints", "evaluator", log)
    result = trainer.fit()
    info = {"seed": seed, **config.model_dump(mode="json"), **{k: round(v, 4) for k, v in result.items()}}
    evaluator.save_pretrained(directory / "evaluator", info)
    trainer.checkpoints.clear()
    return Evaluator.from_pretrained(directory / "evaluator")


def evaluator_training() -> TrainerConfig:
    """Return the settings that the embedded evaluator was trained with (about 12 minutes on one core)."""
    return TrainerConfig(
        steps=2600,
        batch_size=128,
        learning_rate=2e-3,
        warmup_steps=100,
        decay_share=0.6,
        weight_decay=0.02,
        precision="auto",
        log_every=50,
    )
