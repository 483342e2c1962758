"""Choose the captions or pictures that no training sees.

By pictures: a picture is held out with all its captions. Its duplicates, its near-duplicates and the pictures that
share a caption with it are held out too, and so are their duplicates, and so on. By captions: at most one caption of a
picture is drawn, and every picture stays in training; data with one caption per picture is held out by pictures.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from prunekit.data.bad_samples import DataError
from prunekit.data.fingerprint import Fingerprint
from prunekit.data.picture_files import decode
from prunekit.runtime.digests import Digests
from prunekit.runtime.randomness import generator
from prunekit.runtime.tensors import save_tensors

HoldoutBy = Literal["pictures", "captions"]
THUMBNAIL = 16  # side in pixels
NEAR = 0.06  # largest root mean square distance of near-duplicates' thumbnails, with values in [0, 1]
MOST_COMPARED = 20_000  # number of pictures above which a data set is not searched for near-duplicates
ROWS = 1024  # number of thumbnails that are compared with all others at once


@dataclass(frozen=True)
class HeldOut:
    """The held-out pairs, (P,) bool, and the number of held-out pictures.

    by_closure: number of pictures that are held out only because they resemble a chosen picture.
    """

    pairs: Tensor
    pictures: int = 0
    by_closure: int = 0


def hold_out(
    by: HoldoutBy,
    encoded: Sequence[bytes],
    captions: list[str],
    image_index: Tensor,
    share: float,
    seed: int,
    split: Tensor | None = None,
    cache: Path | None = None,
) -> HeldOut:
    """Choose the pairs that no training sees.

    Args:
        by: "pictures" or "captions", as the module's docstring describes.
        encoded: each picture's compressed bytes.
        captions: the text of each pair.
        image_index: the picture of each pair, (P,).
        share: fraction of the pictures, or of the captions, to hold out.
        seed: seed of the choice.
        split: (n,) bool, the pictures of a split to hold out instead of `share`; their duplicates are held out too.
        cache: directory that caches the pairs of similar pictures.

    """
    if split is not None:
        groups = duplicate_groups(encoded, captions, image_index, cache)
        held = torch.isin(groups, groups[split].unique())
        return HeldOut(held[image_index], int(held.sum()), int(held.sum()) - int(split.sum()))
    if not share:
        return HeldOut(torch.zeros(len(captions), dtype=torch.bool))
    if by == "captions" and len(image_index.unique()) < len(captions):
        return HeldOut(held_out_captions(captions, image_index, share, seed))
    return _held_out_pictures(duplicate_groups(encoded, captions, image_index, cache), image_index, share, seed)


def held_out_captions(captions: list[str], image_index: Tensor, share: float, seed: int) -> Tensor:
    """Return the pairs whose *text* training never sees, (P,) bool; at most one caption per image is drawn.

    All captions with exactly the text of a drawn one are held out. A text is not drawn if a picture, such as one with a
    single caption, would then have no caption left, so every picture stays in training.
    """
    image_of = image_index.tolist()
    images_of: dict[str, Counter[int]] = {}
    for text, image in zip(captions, image_of, strict=True):
        images_of.setdefault(text, Counter())[image] += 1
    left = Counter(image_of)  # captions of each picture that are not held out
    drawn: set[str] = set()
    images: set[int] = set()
    for pair in torch.randperm(len(captions), generator=generator(seed, "hold_out")).tolist():
        if len(images) >= round(share * len(captions)):
            break
        image, text = image_of[pair], captions[pair]
        if image in images or (text not in drawn and any(left[i] <= n for i, n in images_of[text].items())):
            continue
        images.add(image)
        if text not in drawn:
            drawn.add(text)
            left.subtract(images_of[text])
    return torch.tensor([text in drawn for text in captions])


def _held_out_pictures(groups: Tensor, image_index: Tensor, share: float, seed: int) -> HeldOut:
    """Draw whole groups of pictures until the share is reached; skip groups that would exceed the share.

    If every group would exceed it, draw the smallest group; if there is only one group, draw none.

    groups: (n,) the group of each picture.
    """
    wanted, order = round(share * len(groups)), torch.randperm(len(groups), generator=generator(seed, "hold_out"))
    sizes = torch.bincount(groups).tolist()
    drawn: set[int] = set()
    count = 0
    for picture in order.tolist():
        group = int(groups[picture])
        if group not in drawn and count + sizes[group] <= wanted:
            drawn.add(group)
            count += sizes[group]
        if count == wanted:
            break
    if not drawn and len(sizes) > 1:
        smallest = min(groups[order].tolist(), key=sizes.__getitem__)
        drawn, count = {smallest}, sizes[smallest]
    held = torch.isin(groups, torch.tensor(sorted(drawn), dtype=groups.dtype))
    return HeldOut(held[image_index], count, count - len(drawn))


def duplicate_groups(
    encoded: Sequence[bytes], captions: list[str], image_index: Tensor, cache: Path | None = None
) -> Tensor:
    """Return each picture's group, (n,) int64; a group must not be divided between training and evaluation.

    Two pictures are in one group if they have the same bytes, or share a caption, compared without case and surrounding
    blanks. In data sets of up to 20,000 pictures, they also are if the root mean square distance of their 16 x 16
    thumbnails is at most 0.06. Pictures that such pairs connect in a chain are in one group. Every call reads all
    pictures; with `cache`, only the first call for the same pictures does.
    """
    edges: list[tuple[int, int]] = []
    first: dict[str, int] = {}
    for caption, picture in zip(captions, image_index.tolist(), strict=True):
        edges.append((first.setdefault(caption.strip().casefold(), picture), picture))
    edges += _resembling(encoded, cache)
    rows, columns = np.array(edges, dtype=np.int64).reshape(-1, 2).T
    graph = coo_matrix((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(len(encoded), len(encoded)))
    return torch.from_numpy(connected_components(graph, directed=False)[1].astype(np.int64))


def _resembling(encoded: Sequence[bytes], cache: Path | None) -> list[tuple[int, int]]:
    """Return the pairs of pictures with equal bytes or, in data sets of up to 20,000 pictures, near thumbnails.

    The pairs are read from the cache if they are there.
    """
    path, is_small = None, len(encoded) <= MOST_COMPARED
    if cache is not None:
        fingerprint = Fingerprint("resembling", THUMBNAIL, NEAR) if is_small else Fingerprint("equal")
        key = fingerprint.add_pictures(encoded, Digests(cache)).key()
        path = cache / "resembling" / f"{key}.safetensors"
        if path.is_file():
            return [(first, second) for first, second in load_file(path)["pairs"].tolist()]
    pairs = equal_pairs(encoded) + (near_pairs(encoded) if is_small else [])
    if path is not None:
        save_tensors(path, {"pairs": torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)})
    return pairs


def equal_pairs(encoded: Sequence[bytes]) -> list[tuple[int, int]]:
    """Return the pairs (first picture with these bytes, other picture); skip pictures that cannot be read."""
    from prunekit.runtime.progress import Progress

    first: dict[bytes, int] = {}  # by digest
    pairs = []
    with Progress("duplicates", len(encoded), enabled=len(encoded) > MOST_COMPARED) as progress:
        for index in range(len(encoded)):
            with suppress(DataError):
                other = first.setdefault(hashlib.blake2b(encoded[index], digest_size=16).digest(), index)
                if other != index:
                    pairs.append((other, index))
            progress.update(index + 1)
    return pairs


def near_pairs(encoded: Sequence[bytes]) -> list[tuple[int, int]]:
    """Return the pairs of pictures whose thumbnails are near; skip pictures that cannot be decoded."""
    indices, thumbnails = [], []
    for index in range(len(encoded)):
        try:
            thumbnails.append(decode(encoded[index], THUMBNAIL).flatten().float() / 255)
        except DataError:
            continue
        indices.append(index)
    if not indices:
        return []
    values = torch.stack(thumbnails).double()
    squares = values.square().sum(1)
    most = NEAR**2 * values.shape[1]
    pairs = []
    for start in range(0, len(values), ROWS):
        part = values[start : start + ROWS]
        distances = squares[start : start + ROWS, None] + squares - 2 * part @ values.T  # squared
        for row, column in (distances <= most).nonzero().tolist():
            if start + row < column:
                pairs.append((indices[start + row], indices[column]))
    return pairs
