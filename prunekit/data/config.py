"""Settings of a recipe's captioned images, and the reader of each layout."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from prunekit.data import coco
from prunekit.data.bad_samples import BadSample, DataError, Tolerance
from prunekit.data.emoji import EMOJI_DIRECTORY, load_emoji
from prunekit.data.folder import folder_samples
from prunekit.data.holdout import HoldoutBy
from prunekit.data.images import CaptionedImages
from prunekit.data.parquet import columns_of, num_rows, parquet_samples
from prunekit.data.pictures import FilePictures, ParquetPictures
from prunekit.data.samples import Sample, caption_fault, collect
from prunekit.data.tables import cc3m_rows, csv_rows, grouped
from prunekit.data.webdataset import missing_shards, shards_of, webdataset_samples
from prunekit.runtime.errors import UserError

CC3M_FOLDERS = {"Train_GCC-training.tsv": "training", "Validation_GCC-1.1.0-Validation.tsv": "validation"}
LAYOUT_SETTINGS = {  # settings that only some layouts use, and the kinds that use them
    "split": ("webdataset", "parquet", "coco"),
    "holdout_split": ("webdataset", "parquet", "coco", "cc3m_tsv", "csv"),
    "annotations": ("coco",),
    "images": ("coco", "cc3m_tsv", "csv"),
    "image_column": ("webdataset", "parquet", "csv", "folder"),
    "text_column": ("webdataset", "parquet", "csv", "folder"),
}
PATHS = {  # meaning of data.path, by kind
    "webdataset": "a folder of *.tar shards",
    "cc3m_tsv": "CC3M's TSV file",
    "coco": "COCO's folder",
    "folder": "a folder of pictures",
    "parquet": "a folder of *.parquet files",
    "csv": "a CSV file",
}
DATA_BEFORE = {"holdout_by": "captions"}  # values of settings that older runs did not record
MOST_COUNTED_BYTES = 256 * 2**20  # largest size of shards, or of a table, that are read to count captions


class DataConfig(BaseModel):
    """Source of the captioned images."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["emoji", "webdataset", "cc3m_tsv", "coco", "folder", "parquet", "csv"] = Field(
        "emoji", description="Layout of the data: the embedded Emoji-64, or a layout of docs/data.md."
    )
    path: str | None = Field(
        None, description="Folder of *.tar or *.parquet shards, of COCO or of pictures; or the TSV or CSV file."
    )
    split: str | None = Field(
        None,
        description="webdataset, parquet: read the shards with this word in their names; coco: train, val or val30k.",
    )
    annotations: str | None = Field(
        None, description="coco: JSON file of the captions, relative to `path`; unset: the split's file."
    )
    images: str | None = Field(
        None,
        description="coco, cc3m_tsv, csv: folder of the pictures, relative to `path` (if `path` is a file: to its "
        "folder).",
    )
    image_column: str | None = Field(
        None,
        description="Column or shard member of the picture; unset: any picture member, or image, path or file_name.",
    )
    text_column: str | None = Field(
        None, description="Column or shard member of the caption; unset: txt, text or caption."
    )
    holdout: float = Field(
        0.1, ge=0, lt=1, description="Fraction of the pictures, or of the captions, that no training sees."
    )
    holdout_by: HoldoutBy = Field(
        "pictures",
        description="What is held out. pictures: whole pictures with all their captions, their near-duplicates and "
        "pictures that share a caption; captions: one caption of a picture, while the picture stays in "
        "training.",
    )
    holdout_split: str | None = Field(
        None,
        description="webdataset, parquet, coco: split to hold out in place of a fraction; cc3m_tsv, csv: another file, "
        "relative to the folder of `path`.",
    )
    verify: bool = Field(
        False,
        description="Decode every picture once while the data is read; false: bad pictures are found when they are "
        "encoded.",
    )
    max_bad_share: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Largest fraction of captions that may be lost to bad samples; above it the run stops.",
    )
    report: str | None = Field(None, description="JSON Lines file that lists the bad samples; unset: none.")

    @model_validator(mode="after")
    def _layout(self) -> "DataConfig":
        for setting, kinds in LAYOUT_SETTINGS.items():
            if getattr(self, setting) is not None and self.kind not in kinds:
                raise UserError(f"data.{setting} has no effect for data.kind={self.kind}, only for {', '.join(kinds)}")
        if self.kind == "coco":
            allowed = ", ".join(coco.SPLITS)
            if self.split is None and self.annotations is None:
                raise UserError(f"data.kind='coco' needs data.split ({allowed}) or data.annotations with data.images")
            for setting in ("split", "holdout_split"):
                if getattr(self, setting) is not None and getattr(self, setting) not in coco.SPLITS:
                    raise UserError(
                        f"data.{setting}={getattr(self, setting)!r} of data.kind='coco': choose one of {allowed}"
                    )
            if self.split is None and self.images is None:
                raise UserError("data.annotations without data.split needs data.images, the folder of the pictures")
        if self.holdout_split is not None and self.holdout_by != "pictures":
            raise UserError("data.holdout_split holds out pictures: leave data.holdout_by=pictures")
        return self

    @property
    def holds_pictures(self) -> bool:
        """Return whether pictures, not only captions, are held out for the evaluation."""
        return self.holdout_by == "pictures" and (self.holdout > 0 or self.holdout_split is not None)

    @property
    def held_out_split(self) -> "DataConfig | None":
        """Settings of the split that is held out; None if a fraction of the data is held out instead."""
        if self.holdout_split is None:
            return None
        changes: dict[str, Any] = {"split": self.holdout_split, "annotations": None, "images": None}
        if self.kind in ("cc3m_tsv", "csv"):  # a split is a file
            other = None if self.path is None else str(Path(self.path).parent / self.holdout_split)
            changes = {"path": other, "images": self.images if self.kind == "csv" else None}
        return self.model_copy(update={**changes, "holdout_split": None})

    @property
    def tolerance(self) -> Tolerance:
        """The allowed share of bad samples, and the file that lists them."""
        return Tolerance(self.max_bad_share, Path(self.report).expanduser() if self.report else None)


def recorded_data(settings: Mapping[str, Any]) -> DataConfig:
    """Return the section `data` that a run recorded; runs that recorded no `holdout_by` held out captions."""
    return DataConfig.model_validate({**DATA_BEFORE, **settings})


def load_data(config: DataConfig, seed: int, cache: Path | None = None) -> CaptionedImages:
    """Read the images and captions that a recipe names; pictures stay on disk until they are requested.

    Bad samples are left out with their captions: they are listed in `skipped` of the result and in `data.report`.

    Args:
        config: the recipe's section `data`.
        seed: seed of the held-out part.
        cache: directory for the index of tar shards and for the groups of similar pictures, so that a second start does
            not read the shards again.

    Raises:
        DataError: a path that is missing or empty, or more bad samples than `data.max_bad_share` allows.

    """
    path = Path(config.path).expanduser() if config.path else None
    if path is not None and not path.exists():
        raise DataError(f"data.path={config.path} does not exist; give {PATHS.get(config.kind, 'a folder of shards')}")
    if config.kind == "emoji":
        return load_emoji(path, config.holdout, seed, config.holdout_by, cache)
    if path is None:
        raise DataError(f"data.kind={config.kind} needs data.path, {PATHS[config.kind]}")
    remembered = {"indexes": cache / "indexes"} if cache is not None and config.kind == "webdataset" else {}
    samples, pictures = READERS[config.kind](config, path, **remembered)
    if (other := config.held_out_split) is not None:
        assert other.path is not None
        if not (place := Path(other.path).expanduser()).exists():
            raise DataError(f"data.holdout_split={config.holdout_split}: there is no {place}")
        samples = chain(samples, _held_out(READERS[config.kind](other, place, **remembered)[0]))
    held = (config.holdout, seed, config.holdout_by, cache)
    return collect(samples, pictures, config.tolerance, str(path), config.verify, *held)


def _held_out(samples: Iterable[Sample | BadSample]) -> Iterator[Sample | BadSample]:
    for sample in samples:
        yield replace(sample, is_held_out=True) if isinstance(sample, Sample) else sample


def data_size(config: DataConfig) -> tuple[int, int] | None:
    """Return (images, captions) of a local data set, counted without decoding; None if it is missing or too large.

    Samples that the reader finds bad are not counted. A split that is held out is counted too.
    """
    sizes = [_size_of(part) for part in (config, config.held_out_split) if part is not None]
    counted = [size for size in sizes if size is not None]
    if len(counted) < len(sizes):
        return None
    return sum(images for images, _ in counted), sum(captions for _, captions in counted)


def _size_of(config: DataConfig) -> tuple[int, int] | None:
    path = Path(config.path).expanduser() if config.path else EMOJI_DIRECTORY if config.kind == "emoji" else None
    try:
        if path is None or not path.exists():
            return None
        if config.kind == "parquet":
            rows = num_rows(shards_of(path, "parquet", config.split))
            return rows, rows
        if _bytes_to_read(config, path) > MOST_COUNTED_BYTES:
            return None
        if config.kind == "emoji":
            data = load_emoji(path, 0.0)
            return data.num_images, data.num_pairs
        samples = (s for s in READERS[config.kind](config, path)[0] if isinstance(s, Sample))
        counts = [sum(caption_fault(caption) is None for caption in sample.captions) for sample in samples]
    except (DataError, OSError):  # a plan does not report faulty data; the run does
        return None
    return sum(count > 0 for count in counts), sum(counts)


def _bytes_to_read(config: DataConfig, path: Path) -> int:
    """Return the number of bytes that a reader reads to find captions; for a folder of pictures, about none."""
    if config.kind == "coco":
        return coco.coco_files(path, config.split, config.annotations, config.images)[0].stat().st_size
    if config.kind in ("emoji", "webdataset"):
        return sum(shard.stat().st_size for shard in shards_of(path, "tar", config.split))
    return path.stat().st_size


Found = tuple[Iterable[Sample | BadSample], Callable[..., Any]]


def _webdataset(config: DataConfig, path: Path, indexes: Path | None = None) -> Found:
    shards = shards_of(path, "tar", config.split)
    members = (config.image_column, config.text_column)
    return webdataset_samples(shards, missing_shards(shards), *members, indexes), FilePictures


def _cc3m_tsv(config: DataConfig, path: Path) -> Found:
    if not path.is_file():
        raise DataError(f"data.path={path} is not a file; give CC3M's TSV, such as Train_GCC-training.tsv")
    return grouped(cc3m_rows(path, _images(path, config.images or CC3M_FOLDERS.get(path.name))), path), FilePictures


def _coco(config: DataConfig, path: Path) -> Found:
    captions, images = coco.coco_files(path, config.split, config.annotations, config.images)
    return coco.coco_samples(captions, images, config.split == coco.VALIDATION), FilePictures


def _folder(config: DataConfig, path: Path) -> Found:
    return folder_samples(path, config.image_column or "file_name", config.text_column or "text"), FilePictures


def _parquet(config: DataConfig, path: Path) -> Found:
    files = shards_of(path, "parquet", config.split)
    image_column, text_column = columns_of(files, config.image_column, config.text_column)
    return parquet_samples(files, missing_shards(files), text_column), partial(ParquetPictures, column=image_column)


def _csv(config: DataConfig, path: Path) -> Found:
    if not path.is_file():
        raise DataError(f"data.path={path} is not a file; give a CSV file")
    columns = (config.image_column or "path", config.text_column or "caption")
    return grouped(csv_rows(path, _images(path, config.images), *columns), path), FilePictures


def _images(table: Path, images: str | None) -> Path:
    folder = table.parent / images if images else table.parent
    if not folder.is_dir():
        raise DataError(f"no folder of pictures at {folder}: set data.images")
    return folder


READERS: dict[str, Callable[..., Found]] = {
    "webdataset": _webdataset,
    "cc3m_tsv": _cc3m_tsv,
    "coco": _coco,
    "folder": _folder,
    "parquet": _parquet,
    "csv": _csv,
}
