"""Captioned images in memory: compressed pictures, their captions, and the pairs that training draws from."""

import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prunekit.randomness import generator


class DataError(ValueError):
    """Bad input data: the message names the file or sample and what is wrong with it."""


@dataclass(frozen=True)
class CaptionedImages:
    """Images and (image, caption) pairs; the pair is the unit of training data.

    `encoded[i]` is the i-th picture's compressed bytes, `names[i]` its short name (what "the nearest name" means in
    the evaluation); pair p is the image `image_index[p]` with the text `captions[p]`, and `held_out[p]` says that no
    training may see that text.
    """

    encoded: list[bytes]
    names: list[str]
    captions: list[str]
    image_index: Tensor  # (P,) int64
    held_out: Tensor  # (P,) bool

    @property
    def num_images(self) -> int:
        """How many pictures there are."""
        return len(self.encoded)

    @property
    def num_pairs(self) -> int:
        """How many (image, caption) pairs there are, held-out ones included."""
        return len(self.captions)

    def training_pairs(self) -> Tensor:
        """Return the indices of the pairs that training may use, (P_train,)."""
        return torch.nonzero(~self.held_out).flatten()

    def pixels(self, indices: Iterable[int], size: int) -> Tensor:
        """Decode pictures to uint8 (n, 3, size, size): shorter side resized, centre cropped.

        Raises DataError that names the picture when one cannot be decoded.
        """
        return torch.stack([decode(self.encoded[i], self.names[i], size) for i in indices])


def decode(encoded: bytes, name: str, size: int) -> Tensor:
    """Decode one compressed picture to uint8 RGB (3, size, size)."""
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(encoded)) as image:
            picture = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"the picture of {name!r} cannot be read ({error}); remove or replace it") from error
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def read_webdataset(shards: list[Path]) -> list[dict]:
    """Read WebDataset shards (png|jpg|webp / txt / json) into one dictionary a sample, in the shards' order.

    Keys: `key` (shard and sample, for messages), `image` (bytes), `text` (str), `json` (dict, maybe empty).
    Raises DataError for a shard that cannot be read and for a sample without picture or caption.
    """
    import datasets

    if not shards:
        raise DataError("no shard to read: give a folder that holds *.tar files, or the files themselves")
    files = {"train": [str(path) for path in shards]}
    samples = []
    try:
        for row in datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True).decode(False):
            samples.append(_sample(row))
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read {', '.join(p.name for p in shards)}: {error}") from error
    if not samples:
        raise DataError(f"no sample in {', '.join(str(path) for path in shards)}: the data set is empty")
    return samples


def _sample(row: Mapping) -> dict:
    key = f"{Path(row['__url__']).name}:{row['__key__']}"
    image = next((row[suffix] for suffix in ("png", "jpg", "jpeg", "webp") if row.get(suffix)), None)
    encoded = image["bytes"] if isinstance(image, Mapping) else image
    if not encoded:
        raise DataError(f"{key} has no picture (png, jpg, jpeg or webp)")
    text, metadata = row.get("txt") or "", row.get("json") or {}
    text = text.decode() if isinstance(text, bytes) else text
    metadata = json.loads(metadata) if isinstance(metadata, bytes | str) else metadata
    if not text.strip():
        raise DataError(f"{key} has an empty caption; give it a text or remove the sample")
    return {"key": key, "image": encoded, "text": text.strip(), "json": dict(metadata)}


def hold_out(captions: list[str], image_index: Tensor, share: float, seed: int) -> Tensor:
    """Choose the pairs whose *text* training never sees, (P,) bool: at most one caption of an image.

    Only images with several captions give one up, so that every picture stays in training; where no image has
    several (one caption a picture), the held-out pairs' pictures are unseen too. The same text elsewhere goes with it.
    """
    counts = torch.bincount(image_index)
    several = counts[image_index] > 1 if bool((counts > 1).any()) else torch.ones(len(captions), dtype=torch.bool)
    texts: set[str] = set()
    images: set[int] = set()
    for pair in torch.randperm(len(captions), generator=generator(seed, "hold_out")).tolist():
        if len(images) >= round(share * len(captions)):
            break
        image = int(image_index[pair])
        if several[pair] and image not in images:
            images.add(image)
            texts.add(captions[pair])
    return torch.tensor([bool(s) and text in texts for s, text in zip(several, captions, strict=True)])
