"""Choose the captions or pictures that no training sees.

By pictures: a picture is held out with all its captions. Its duplicates, its near-duplicates and the pictures that
share a caption with it are held out too, and so are their duplicates, and so on. By captions: at most one caption of a
picture is drawn, and every picture stays in training.
"""

from __future__ import annotations

from collections.abc import Sequence
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
MOST_COMPARED = 20_000  # number of pictures above which a data set is not searched for duplicate pictures
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
    if by == "captions":
        return HeldOut(held_out_captions(captions, image_index, share, seed))
    return _held_out_pictures(duplicate_groups(encoded, captions, image_index, cache), image_index, share, seed)


def held_out_captions(captions: list[str], image_index: Tensor, share: float, seed: int) -> Tensor:
    """Return the pairs whose *text* training never sees, (P,) bool; at most one caption per image is drawn.

    Only captions of images with several captions are drawn, so that every picture stays in training. If no image has
    several, training does not see the pictures of the drawn captions either. Other captions that could have been drawn
    are held out too if their text equals a drawn one.
    """
    counts = torch.bincount(image_index)
    several = counts[image_index] > 1 if bool((counts > 1).any()) else torch.ones(len(captions), dtype=torch.bool)
    may_go, image_of = several.tolist(), image_index.tolist()
    texts: set[str] = set()
    images: set[int] = set()
    for pair in torch.randperm(len(captions), generator=generator(seed, "hold_out")).tolist():
        if len(images) >= round(share * len(captions)):
            break
        image = image_of[pair]
        if may_go[pair] and image not in images:
            images.add(image)
            texts.add(captions[pair])
    return torch.tensor([may and text in texts for may, text in zip(may_go, captions, strict=True)])


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

    Two pictures are in one group if they share a caption, compared without case and surrounding blanks. In data sets of
    up to 20,000 pictures, they also are if they have the same bytes, or if the root mean square distance of their
    16 x 16 thumbnails is at most 0.06. Pictures that such pairs connect in a chain are in one group.
    """
    edges: list[tuple[int, int]] = []
    first: dict[str, int] = {}
    for caption, picture in zip(captions, image_index.tolist(), strict=True):
        edges.append((first.setdefault(caption.strip().casefold(), picture), picture))
    if len(encoded) <= MOST_COMPARED:
        edges += _resembling(encoded, cache)
    rows, columns = np.array(edges, dtype=np.int64).reshape(-1, 2).T
    graph = coo_matrix((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(len(encoded), len(encoded)))
    return torch.from_numpy(connected_components(graph, directed=False)[1].astype(np.int64))


def _resembling(encoded: Sequence[bytes], cache: Path | None) -> list[tuple[int, int]]:
    """Return the pairs of pictures with equal bytes or near thumbnails; read them from the cache if they are there."""
    path = None
    if cache is not None:
        key = Fingerprint("resembling", THUMBNAIL, NEAR).add_pictures(encoded, Digests(cache)).key()
        path = cache / "resembling" / f"{key}.safetensors"
        if path.is_file():
            return [(first, second) for first, second in load_file(path)["pairs"].tolist()]
    content: dict[bytes, int] = {}
    pairs = [(content.setdefault(bytes(encoded[index]), index), index) for index in range(len(encoded))]
    pairs = [pair for pair in pairs if pair[0] != pair[1]] + near_pairs(encoded)
    if path is not None:
        save_tensors(path, {"pairs": torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)})
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
