"""The number of images and captions of a data set, and the width of its prompt embeddings."""

from dataclasses import dataclass
from pathlib import Path

from prunekit.data.config import DataConfig, data_size
from prunekit.data.prompt_encoder import EMBEDDED
from prunekit.models.names import read_object

PUBLISHED = {  # (images, captions) of data sets that recipes name and that this machine may not have
    "CC3M, train": (2_905_954, 2_905_954),
    "CC3M, validation": (13_443, 13_443),
    "COCO 2014, train": (82_783, 414_113),
    "COCO 2014, val": (40_504, 202_654),
    "COCO 2014, val30k": (30_000, 30_000),
}
PROMPT_WIDTH = 768  # assumed without a Sentence Transformer's config; that of all-mpnet-base-v2
EMBEDDED_WIDTH = 80  # of the embedded encoder


@dataclass(frozen=True)
class DataSize:
    """Images and captions of a data set, and where the numbers come from."""

    images: int
    captions: int
    source: str


def size_of(config: DataConfig) -> DataSize | None:
    """Return the counted size of a data set on this machine, else the published size if it is known, else None."""
    counted = data_size(config)
    if counted is not None:
        return DataSize(*counted, "counted")
    parts = [_published(part) for part in (config, config.held_out_split) if part is not None]
    names = [name for name in parts if name is not None]
    if len(names) < len(parts):
        return None
    images, captions = (sum(PUBLISHED[name][index] for name in names) for index in (0, 1))
    return DataSize(images, captions, f"as published ({' and '.join(names)}); the data is not counted here")


def _published(config: DataConfig) -> str | None:
    if config.kind == "coco":
        return f"COCO 2014, {config.split}" if config.split else None
    path = Path(config.path or "")
    words = f"{path} {config.split or ''}".lower()
    if config.kind == "cc3m_tsv" or (config.kind == "webdataset" and "cc3m" in words):
        return f"CC3M, {'validation' if 'valid' in words else 'train'}"
    return None


def prompt_width(name: str) -> int:
    """Return the length of a prompt encoder's vectors; nothing is loaded or fetched."""
    if name == EMBEDDED:
        return EMBEDDED_WIDTH
    config = Path(name).expanduser() / "config.json"
    return read_object(config).get("hidden_size", PROMPT_WIDTH) if config.is_file() else PROMPT_WIDTH
