"""Collect the samples that a layout's reader finds into one set of captioned images, without the bad samples."""

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunekit.data.bad_samples import BadSample, DataError, Tolerance, file_size
from prunekit.data.holdout import HoldoutBy, hold_out
from prunekit.data.images import CaptionedImages
from prunekit.data.pictures import Pictures

PICTURE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")


@dataclass(frozen=True)
class Sample:
    """One picture and its captions, as a reader finds them; the picture itself is not read."""

    key: str  # for messages: shard and key, row, or file
    file: str  # the file that holds the picture
    place: tuple[int, int]  # where the picture is in the file, as the layout's Pictures define
    captions: list[Any]  # as they are in the data: `caption_fault` says which are good
    is_held_out: bool = False  # whether the sample is in a split that no training sees


def file_sample(key: str, path: Path, captions: list[Any]) -> Sample | BadSample:
    """Return the sample of a picture file, or a bad sample if the file is missing, empty or too large."""
    try:
        size = file_size(path)
        if not size:
            raise DataError("has zero bytes")
    except DataError as error:
        return BadSample(key, str(path), f"names a picture that {error}", max(1, len(captions)))
    return Sample(key, str(path), (0, size), captions)


def caption_fault(caption: Any) -> str | None:
    """Return why a caption cannot be used, or None for a text that is not blank and that UTF-8 can encode."""
    if caption is None:
        return "has an empty caption"
    if not isinstance(caption, str):
        return f"has a caption of type {type(caption).__name__}, not text"
    if not caption.strip():
        return "has an empty caption"
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        return f"has a caption that is not UTF-8 (lone surrogate U+{ord(caption[error.start]):04X})"
    return None


def collect(
    samples: Iterable[Sample | BadSample],
    pictures: Callable[[list[str], np.ndarray], Pictures],
    tolerance: Tolerance,
    where: str,
    verify: bool = False,
    holdout: float = 0.0,
    seed: int = 0,
    holdout_by: HoldoutBy = "captions",
    cache: Path | None = None,
) -> CaptionedImages:
    """Return the captioned images of a reader's samples, in the reader's order.

    A caption that `caption_fault` finds bad is left out; a picture without another caption is left out too.
    where: name of the data set for error messages. verify: decode every picture once, and leave out the pictures that
    cannot be decoded; otherwise they are found and left out when they are encoded. cache: as in `hold_out`.
    Raises DataError if there is no sample, or if more samples are bad than `tolerance` allows.
    """
    files: list[str] = []
    places, image_index = array("q"), array("q")
    names: list[str] = []
    captions: list[str] = []
    split: list[bool] = []  # for each picture: whether it is in the held-out split
    skipped: list[BadSample] = []
    for sample in samples:
        if isinstance(sample, BadSample):
            skipped.append(sample)
            continue
        faults = [caption_fault(caption) for caption in sample.captions or [None]]
        skipped += [BadSample(sample.key, sample.file, fault) for fault in faults if fault]
        texts = [caption.strip() for caption, fault in zip(sample.captions, faults, strict=False) if not fault]
        if not texts:
            continue
        if not files or files[-1] != sample.file:
            files.append(sample.file)
        places.extend((len(files) - 1, *sample.place))
        image_index.extend([len(names)] * len(texts))
        names.append(texts[0])
        split.append(sample.is_held_out)
        captions += texts
    if not names and not skipped:
        raise DataError(f"no sample in {where}: the data set is empty")
    if not names:
        tolerance.check(skipped, 0)
    indices = torch.from_numpy(np.array(image_index, dtype=np.int64))
    stored = pictures(files, np.array(places, dtype=np.int64).reshape(-1, 3))
    nothing_held = torch.zeros(len(captions), dtype=torch.bool)
    images = CaptionedImages(stored, names, captions, indices, nothing_held, skipped, tolerance)
    bad = images.faults() if verify else {}
    if bad:
        images = images.without(bad)
    else:
        tolerance.check(skipped, len(captions))
    of_split = torch.tensor([held for picture, held in enumerate(split) if picture not in bad])
    parts = (images.encoded, images.captions, images.image_index)
    held = hold_out(holdout_by, *parts, holdout, seed, of_split if of_split.any() else None, cache)
    return replace(images, held_out=held.pairs, holdout_by=holdout_by, held_by_closure=held.by_closure)
