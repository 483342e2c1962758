"""Which captioned images a recipe uses."""

from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from prunekit.data.emoji import load_emoji
from prunekit.data.images import CaptionedImages, DataError, hold_out, read_webdataset


class DataConfig(BaseModel):
    """Where captioned images come from."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["emoji", "webdataset"] = Field("emoji", description="the embedded Emoji-64, or WebDataset shards")
    path: str | None = Field(None, description="a folder of *.tar shards; unset: the embedded data")
    holdout: float = Field(0.1, ge=0, lt=1, description="share of the captions that no training sees")


def load_data(config: DataConfig, seed: int) -> CaptionedImages:
    """Read the images and captions that a recipe names.

    Raises DataError for a folder that is missing or empty, and for bad samples.
    """
    if config.path is None and config.kind != "emoji":
        raise DataError(f"data.kind={config.kind} needs data.path, a folder of *.tar shards")
    folder = Path(config.path).expanduser() if config.path else None
    if folder is not None and not folder.is_dir():
        raise DataError(f"data.path={config.path} is no folder")
    if config.kind == "emoji":
        return load_emoji(folder, config.holdout, seed)
    assert folder is not None
    samples = read_webdataset(sorted(folder.glob("*.tar")))
    captions, indices = [sample["text"] for sample in samples], torch.arange(len(samples))
    held_out = hold_out(captions, indices, config.holdout, seed)
    return CaptionedImages([sample["image"] for sample in samples], captions, captions, indices, held_out)
