"""Captioned images: compressed pictures, their captions, and the pairs that training draws from."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from prunekit.data.bad_samples import BadSample, DataError, Tolerance, write_report
from prunekit.data.holdout import HoldoutBy
from prunekit.data.picture_files import decode, fault
from prunekit.data.pictures import Pictures

Split = Literal["held out", "training"]  # of data with held-out pictures
HELD_OUT: Split = "held out"
TRAINING: Split = "training"
__all__ = ["HELD_OUT", "TRAINING", "BadSample", "CaptionedImages", "DataError", "Split", "Tolerance"]


@dataclass(frozen=True)
class CaptionedImages:
    """Images and (image, caption) pairs; the pair is the unit of training data.

    `encoded[i]` is the i-th picture's compressed bytes (a list, or Pictures that are read on demand). `names[i]` is its
    short name, which the evaluation prompts with and searches for the nearest name. Pair p is the image
    `image_index[p]` with the text `captions[p]`. If `held_out[p]`, no training may see the pair (`data.holdout`) or,
    where pictures are held out, its picture. `skipped` lists the samples that were left out, and `tolerance` limits
    them; neither is part of the data's identity.
    """

    encoded: Sequence[bytes]
    names: list[str]
    captions: list[str]
    image_index: Tensor  # (P,) int64
    held_out: Tensor  # (P,) bool
    skipped: list[BadSample] = field(default_factory=list, compare=False)
    tolerance: Tolerance = field(default=Tolerance(), compare=False)
    holdout_by: HoldoutBy = "captions"
    held_by_closure: int = field(default=0, compare=False)  # pictures held out only as they resemble a drawn picture

    @property
    def num_images(self) -> int:
        """The number of pictures."""
        return len(self.encoded)

    @property
    def num_pairs(self) -> int:
        """The number of (image, caption) pairs, with the held-out pairs."""
        return len(self.captions)

    def training_pairs(self) -> Tensor:
        """Return the indices of the pairs that training may use, (P_train,)."""
        return torch.nonzero(~self.held_out).flatten()

    def training_pictures(self) -> "CaptionedImages":
        """Return the pictures that have at least one caption for training, with all their captions."""
        kept = self.image_index[self.training_pairs()].unique()
        return self if len(kept) == self.num_images else self.take(kept.tolist())

    @property
    def holds_pictures(self) -> bool:
        """Whether whole pictures are held out, so that the data has a split that no training has seen."""
        return self.holdout_by == "pictures" and bool(self.held_out.any())

    def pairs_of(self, split: Split | None) -> Tensor:
        """Return the indices of a split's pairs, (n,); None: of all pairs."""
        kept = torch.ones_like(self.held_out) if split is None else self.held_out == (split == HELD_OUT)
        return torch.nonzero(kept).flatten()

    def of_split(self, split: Split | None) -> "CaptionedImages":
        """Return the pictures of a split and their captions; None: all. A split needs data that holds out pictures."""
        if split is None:
            return self
        return self.take(self.image_index[self.pairs_of(split)].unique().tolist())

    def pairs_beside_names(self) -> Tensor:
        """Return the indices (n,) of the pairs whose caption differs from the picture's name.

        A picture without such a caption keeps all its pairs.
        """
        pictures = self.image_index.tolist()
        beside = torch.tensor([text != self.names[i] for text, i in zip(self.captions, pictures, strict=True)])
        has_other = torch.zeros(self.num_images, dtype=torch.bool)
        has_other[self.image_index[beside]] = True
        return torch.nonzero(beside | ~has_other[self.image_index]).flatten()

    def held_out_pictures(self) -> Tensor:
        """Return the indices (n,) of the pictures that no training sees, which have all their pairs held out."""
        training = torch.zeros(self.num_images, dtype=torch.bool)
        training[self.image_index[~self.held_out]] = True
        return torch.nonzero(~training).flatten()

    def pixels(self, indices: Iterable[int], size: int) -> Tensor:
        """Decode pictures to uint8 (n, 3, size, size): shorter side resized, center cropped.

        Raises DataError that names the picture when one cannot be decoded.
        """
        return torch.stack([self._decoded(index, size) for index in indices])

    def readable_pixels(self, indices: Iterable[int], size: int, bad: dict[int, str]) -> list[Tensor]:
        """Decode pictures as `pixels` does, but skip pictures that cannot be decoded and add their reasons to `bad`.

        Raises DataError as soon as more pictures are bad than `tolerance` allows.
        """
        decoded = []
        for index in indices:
            try:
                decoded.append(decode(self.encoded[index], size))
            except DataError as error:
                bad[index] = str(error)
                if len(bad) > self.tolerance.max_bad_share * self.num_images:
                    self.without(bad)
        return decoded

    def faults(self) -> dict[int, str]:
        """Decode every picture and return why each bad one cannot be used, by index."""
        from prunekit.runtime.progress import Progress

        reasons: dict[int, str] = {}
        with Progress("verify", self.num_images) as progress:
            for index in range(self.num_images):
                try:
                    reason = fault(self.encoded[index])
                except DataError as error:
                    reason = str(error)
                if reason:
                    reasons[index] = reason
                progress.update(index + 1)
        return reasons

    def without(self, bad: Mapping[int, str], names: Mapping[int, str] | None = None) -> "CaptionedImages":
        """Return the images without bad pictures and their captions; add them to `skipped` and the report.

        bad: the reasons by index of the bad pictures. names: their names for messages, by index; None: from `where`.
        Raises DataError if more pictures are bad than `tolerance` allows.
        """
        if not bad:
            return self
        lost = torch.bincount(self.image_index, minlength=self.num_images)
        named = {i: (names[i], self._file(i)) if names else self.where(i) for i in sorted(bad)}
        gone = [BadSample(*named[i], bad[i], int(lost[i])) for i in named]
        left = self.take([index for index in range(self.num_images) if index not in bad])
        left = replace(left, skipped=[*self.skipped, *gone])
        self.tolerance.check(left.skipped, left.num_pairs)
        return left

    def take(self, kept: list[int]) -> "CaptionedImages":
        """Return the pictures with these indices, ascending, and their captions."""
        new_index = torch.full((self.num_images,), -1)
        new_index[torch.tensor(kept, dtype=torch.long)] = torch.arange(len(kept))
        image_index = new_index[self.image_index]
        pairs = torch.nonzero(image_index >= 0).flatten()
        encoded = self.encoded
        return replace(
            self,
            encoded=encoded.take(kept) if isinstance(encoded, Pictures) else [encoded[i] for i in kept],
            names=[self.names[i] for i in kept],
            captions=[self.captions[p] for p in pairs.tolist()],
            image_index=image_index[pairs],
            held_out=self.held_out[pairs],
        )

    def write_report(self, path: str | Path) -> None:
        """Write the skipped samples as JSON Lines: sample, file, reason, captions."""
        write_report(self.skipped, Path(path))

    def _decoded(self, index: int, size: int) -> Tensor:
        try:
            return decode(self.encoded[index], size)
        except DataError as error:
            name = self.names[index]
            raise DataError(f"the picture of {name!r} {error}; remove or replace it") from error

    def where(self, index: int) -> tuple[str, str]:
        """Return (a picture's name for messages, its file)."""
        if isinstance(self.encoded, Pictures):
            return self.encoded.where(index)
        return f"the picture of {self.names[index]!r}", ""

    def _file(self, index: int) -> str:
        return self.encoded.file_of(index) if isinstance(self.encoded, Pictures) else ""
