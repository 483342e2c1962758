"""The embedded evaluator: a small CLIP-like model, with an image tower and a text tower, that judges generated emoji.

It shares no weights with the diffusion model that it judges, and is trained separately
(`prunekit.embedded.evaluator_training`). Photographs are judged by a CLIP model instead (`prunekit.evaluation.clip`).
"""

import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from prunekit.runtime.errors import UserError
from prunekit.runtime.files import read_json, write_folder, write_json
from prunekit.runtime.tensors import save_tensors

EVALUATOR_DIRECTORY = Path(__file__).parent.parent / "assets" / "evaluator"
EMBEDDED_EVALUATORS = {
    "emoji": EVALUATOR_DIRECTORY,
    "emoji-held-out": EVALUATOR_DIRECTORY.parent / "evaluator_held_out",
}
INCEPTION = "inception"
BATCH = 64  # pictures in every forward pass, so that a picture's result does not depend on the number of pictures
INITIAL_SCALE = 14.0  # of the logits, as in CLIP
WORDS = re.compile(r"\w+|[^\w\s,:]")


class EvaluatorConfig(BaseModel):
    """Shapes of the image tower and the text tower."""

    model_config = ConfigDict(extra="forbid")

    format: int = 1
    size: int = 64
    widths: tuple[int, int, int, int] = (32, 64, 128, 192)
    text_width: int = 96
    embedding: int = 128


def pieces(text: str) -> list[str]:
    """Return a text's words and its pairs of neighboring words, lower case; commas and colons are dropped."""
    words = WORDS.findall(text.lower())
    return words + [f"{a} {b}" for a, b in pairwise(words)]


def vocabulary_of(texts: list[str]) -> list[str]:
    """Return every piece of `texts`, sorted."""
    return sorted(Counter(piece for text in texts for piece in pieces(text)))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with group normalization, added to the input."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (n, width, h, w) to the same shape."""
        hidden_1 = self.conv1(F.relu(self.norm1(hidden)))
        return hidden + self.conv2(F.relu(self.norm2(hidden_1)))


class Evaluator(nn.Module):
    """A model that embeds pictures and texts as unit vectors, near each other if picture and text match."""

    def __init__(self, config: EvaluatorConfig, vocabulary: list[str]):
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.index = {piece: i for i, piece in enumerate(vocabulary)}
        first, *rest = config.widths
        layers: list[nn.Module] = [nn.Conv2d(3, first, 4, stride=2, padding=1), nn.ReLU()]
        for before, after in zip(config.widths, rest, strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), ResidualBlock(after)]
        self.image_tower = nn.Sequential(*layers, nn.GroupNorm(8, rest[-1]), nn.ReLU())
        self.image_projection = nn.Linear(rest[-1], config.embedding)
        self.pieces = nn.EmbeddingBag(len(vocabulary), config.text_width, mode="mean")
        self.text_projection = nn.Sequential(
            nn.LayerNorm(config.text_width),
            nn.Linear(config.text_width, 2 * config.embedding),
            nn.GELU(),
            nn.Linear(2 * config.embedding, config.embedding),
        )
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_SCALE).log())

    def image_features(self, pixels: Tensor) -> Tensor:
        """Return the image tower's pooled features (n, F) of float pixels (n, 3, H, W) in [0, 1]."""
        return self.image_tower(2 * pixels - 1).float().mean(dim=(2, 3))

    def image_embeddings(self, pixels: Tensor) -> Tensor:
        """Return unit vectors (n, E) of float pixels (n, 3, H, W) in [0, 1]; with gradients."""
        return F.normalize(self.image_projection(self.image_features(pixels)).float(), dim=-1)

    def stage_features(self, pixels: Tensor) -> Tensor:
        """Return features (n, F) of float pixels (n, 3, H, W): the pooled output of each stage, layer-normalized.

        The last stage alone hardly detects blur, because it was trained to ignore blur; the earlier stages detect it.
        """
        return _normalized(self._pooled(pixels))

    def _pooled(self, pixels: Tensor) -> list[Tensor]:
        """Return the pooled output of each stage, (n, width) each; the last is `image_features`."""
        hidden, stages = 2 * pixels - 1, []
        for layer in self.image_tower:
            hidden = layer(hidden)
            if isinstance(layer, ResidualBlock):
                stages.append(F.relu(hidden))
        return [stage.float().mean(dim=(2, 3)) for stage in (*stages[:-1], hidden)]

    def text_embeddings(self, texts: list[str]) -> Tensor:
        """Return unit vectors (n, E) of texts; pieces that the vocabulary lacks are left out; with gradients."""
        bags = [[self.index[p] for p in pieces(text) if p in self.index] for text in texts]
        starts = torch.tensor([0, *(len(bag) for bag in bags)]).cumsum(0)[:-1]
        device = self.logit_scale.device
        flat = torch.tensor([i for bag in bags for i in bag], dtype=torch.long, device=device)
        return F.normalize(self.text_projection(self.pieces(flat, starts.to(device))), dim=-1)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Embed uint8 pictures (n, 3, H, W) as unit vectors (n, E), float32, on the CPU."""
        return in_batches(lambda part: self.image_embeddings(self._pixels(part)), images)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return features (n, F) of uint8 pictures (n, 3, H, W), for distances between sets of pictures."""
        return in_batches(lambda part: self.stage_features(self._pixels(part)), images)

    @torch.no_grad()
    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return `features` and `embed_images` of pictures, from one forward pass."""

        def both(part: Tensor) -> Tensor:
            pooled = self._pooled(self._pixels(part))
            embedded = F.normalize(self.image_projection(pooled[-1]).float(), dim=-1)
            return torch.cat([_normalized(pooled), embedded], dim=1)

        rows = in_batches(both, images)
        return rows[:, : -self.config.embedding], rows[:, -self.config.embedding :]

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """Embed texts as unit vectors (n, E), float32, on the CPU."""
        return self.text_embeddings(texts).cpu()

    def _pixels(self, images: Tensor) -> Tensor:
        pixels = images.to(self.logit_scale.device).float() / 255
        size = (self.config.size, self.config.size)
        if pixels.shape[-2:] == size:
            return pixels
        return F.interpolate(pixels, size, mode="bilinear", antialias=True)

    def save_pretrained(self, folder: Path | str, info: dict | None = None) -> None:
        """Write config.json, vocabulary.json and model.safetensors (float16); `info` goes to training.json."""

        def write(temporary: Path) -> None:
            write_json(temporary / "config.json", self.config.model_dump(mode="json"))
            write_json(temporary / "vocabulary.json", self.vocabulary)
            save_tensors(temporary / "model.safetensors", {k: v.half() for k, v in self.state_dict().items()})
            if info is not None:
                write_json(temporary / "training.json", info)

        write_folder(Path(folder), write)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> "Evaluator":
        """Load an evaluator that `save_pretrained` wrote; raise ValueError if the folder holds none."""
        folder = Path(folder)
        if not (folder / "vocabulary.json").is_file():
            raise UserError(f"{folder} holds no evaluator (vocabulary.json is missing)")
        evaluator = cls(EvaluatorConfig(**read_json(folder / "config.json")), read_json(folder / "vocabulary.json"))
        tensors = load_file(folder / "model.safetensors")
        evaluator.load_state_dict({name: value.float() for name, value in tensors.items()})
        return evaluator.requires_grad_(False).eval()


def _normalized(pooled: list[Tensor]) -> Tensor:
    return torch.cat([F.layer_norm(stage, stage.shape[1:]) for stage in pooled], dim=1)


def in_batches(embed: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return `embed`, as (n, E), of uint8 pictures (n, 3, H, W), in batches of exactly BATCH; the last is padded.

    Raises ValueError if the pictures are not uint8 RGB, or if there are none.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise UserError(f"pictures must be uint8 (n, 3, H, W), not {images.dtype} {tuple(images.shape)}")
    if not len(images):
        raise UserError("there are no pictures to evaluate")
    missing = -len(images) % BATCH
    filled = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)])
    return torch.cat([embed(part).float().cpu() for part in filled.split(BATCH)])[: len(images)]
