"""Pictures on disk that say how they were made: PNG text, or WebP's EXIF description."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from prunekit.data.picture_files import open_picture, write_image
from prunekit.errors import UserError

FORMATS = ("png", "webp")  # both without loss
KEY = "prunekit"
_DESCRIPTION = 0x010E  # EXIF's ImageDescription


def write_picture(path: Path, picture: Image.Image, metadata: Mapping[str, Any]) -> None:
    """Write a picture, by its name's ending, atomically; `metadata`, JSON values, goes in."""
    text = json.dumps(metadata, sort_keys=True)
    if path.suffix == ".webp":
        exif = Image.Exif()
        exif[_DESCRIPTION] = text
        write_image(path, picture, lossless=True, exif=exif)
    else:
        info = PngInfo()
        info.add_text(KEY, text)
        write_image(path, picture, pnginfo=info)


def read_metadata(path: Path) -> dict[str, Any]:
    """Return what `write_picture` put into a picture; UserError, one line, where there is nothing."""
    picture = open_picture(path)
    try:
        metadata = json.loads(picture.getexif()[_DESCRIPTION] if path.suffix == ".webp" else picture.info[KEY])
    except Exception as error:  # Pillow's EXIF parser raises whatever it comes across
        raise UserError(f"{path} does not say how it was made: it is no picture of `prunekit generate`") from error
    return metadata
