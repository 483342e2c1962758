"""From what a reader of some layout finds to one set of captioned images: order kept, bad samples left out."""

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from prunekit.data.bad_samples import BadSample, DataError, Tolerance
from prunekit.data.images import CaptionedImages, hold_out
from prunekit.data.pictures import Pictures

PICTURE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")


@dataclass(frozen=True)
class Sample:
    """One picture and its captions, as a reader finds them; the picture itself is not read."""

    key: str  # for messages: shard and key, row, or file
    file: str  # the file that holds the picture
    place: tuple[int, int]  # where in the file, as the layout's Pictures define
    captions: list[str]


def file_sample(key: str, path: Path, captions: list[str]) -> Sample | BadSample:
    """Return the sample of a picture that is a file, or what is wrong with that file as far as its size tells."""
    try:
        size = path.stat().st_size
        fault = "has zero bytes" if not size else None if path.is_file() else "is no file"
    except OSError as error:
        fault = f"is missing ({error.strerror})"
    if fault:
        return BadSample(key, str(path), f"names a picture that {fault}", max(1, len(captions)))
    return Sample(key, str(path), (0, size), captions)


def collect(
    found: Iterable[Sample | BadSample],
    pictures: Callable[[list[str], np.ndarray], Pictures],
    tolerance: Tolerance,
    where: str,
    verify: bool = False,
    holdout: float = 0.0,
    seed: int = 0,
) -> CaptionedImages:
    """Make captioned images of a reader's samples, in the reader's order.

    An empty caption is left out; a picture that has no other goes with it. verify: decode every picture once, here,
    and leave out those that cannot be; without it they are found, and left out, when they are encoded.
    Raises DataError where nothing is found, and where more is bad than `tolerance` allows.
    """
    files: list[str] = []
    places, image_index = array("q"), array("q")
    names: list[str] = []
    captions: list[str] = []
    skipped: list[BadSample] = []
    for sample in found:
        if isinstance(sample, BadSample):
            skipped.append(sample)
            continue
        texts = [text for text in (caption.strip() for caption in sample.captions) if text]
        empty = max(len(sample.captions), 1) - len(texts)
        skipped += [BadSample(sample.key, sample.file, "has an empty caption")] * empty
        if not texts:
            continue
        if not files or files[-1] != sample.file:
            files.append(sample.file)
        places.extend((len(files) - 1, *sample.place))
        image_index.extend([len(names)] * len(texts))
        names.append(texts[0])
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
    return replace(images, held_out=hold_out(images.captions, images.image_index, holdout, seed))
