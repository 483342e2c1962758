"""The one place where pictures are written to disk."""

from pathlib import Path
from typing import Any

from PIL import Image

from prunekit.training.checkpoint import replacing


def write_image(path: Path, image: Image.Image, **options: Any) -> None:
    """Write a picture in the format that its name ends in (png, webp), atomically; `options` as Pillow's `save`."""
    with replacing(path) as new:
        image.save(new, format=path.suffix.removeprefix("."), **options)
