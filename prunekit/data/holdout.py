"""Which captions and pictures no training sees.

By pictures: a held-out picture takes all its captions with it. Its duplicates, its near-duplicates and the pictures
that share a caption with it are held out too, and theirs in turn. By captions: at most one caption of a picture is held
out, and every picture stays in training.
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
THUMBNAIL = 16  # pixels of a side
NEAR = 0.06  # root mean square distance of two thumbnails in [0, 1] up to which pictures are near-duplicates
MOST_COMPARED = 20_000  # pictures of a data set up to which near-duplicates are looked for
ROWS = 1024  # thumbnails that are compared with all at once


@dataclass(frozen=True)
class HeldOut:
    """The held-out pairs (P,) bool, the number of held-out pictures, and how many of these only the closure took."""

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
    """Choose what no training sees.

    Args:
        by: "pictures" or "captions", as this module says.
        encoded: each picture's compressed bytes.
        captions: the text of each pair.
        image_index: the picture of each pair, (P,).
        share: of the pictures, or of the captions.
        seed: the choice is keyed by it.
        split: pictures (n,) bool of a split that is held out in place of a share, with their duplicates elsewhere.
        cache: a directory in which it is remembered which pictures resemble each other.

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
    """Choose the pairs whose *text* training never sees, (P,) bool: at most one caption of an image.

    Only images with several captions give one up, so that every picture stays in training; where no image has
    several (one caption a picture), the held-out pairs' pictures are unseen too. The same text elsewhere goes with it.
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
    """Draw whole groups of pictures (n,) until the share is reached; a group that would go beyond it is left.

    Where every group would, the smallest is drawn; where there is but one group, none.
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
    """Return the group of each picture, (n,) int64: pictures that must not be divided between training and evaluation.

    Two pictures are in one group if they have the same bytes, if they share a caption, or if the root mean square
    distance of their 16 x 16 thumbnails is at most 0.06 (in data sets of up to 20,000 pictures), and so on through
    others. The captions compare without case and surrounding blanks.
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
    """Return the pairs of pictures with equal bytes or near thumbnails; with a cache, of pictures seen before, read."""
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
    """Return the pairs of pictures whose thumbnails are near; a picture that cannot be decoded is in none."""
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
