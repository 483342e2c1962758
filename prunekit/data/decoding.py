"""Compressed pictures to RGB: any mode, upright, transparent parts over white."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunekit.data.bad_samples import DataError


def decode(encoded: bytes, size: int) -> Tensor:
    """Decode one compressed picture to uint8 RGB (3, size, size): shorter side resized, center cropped.

    Raises DataError where it cannot be decoded: "cannot be read (why)".
    """
    from PIL import Image, ImageOps

    picture = ImageOps.fit(rgb(encoded), (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def fault(encoded: bytes) -> str | None:
    """Return why a compressed picture cannot be used, or None; decodes it in full."""
    try:
        rgb(encoded)
    except DataError as error:
        return str(error)
    return None


def rgb(encoded: bytes) -> Any:
    """Decode one compressed picture to a PIL picture in RGB, turned as its EXIF orientation says.

    16-bit gray is scaled, transparent parts show white, palettes and CMYK are resolved; of an animation the first
    frame. Color profiles are not applied, and damaged EXIF data are ignored.

    Raises DataError where it cannot be decoded: "cannot be read (why)".
    """
    from PIL import Image

    from prunekit.data.picture_files import open_picture, upright, why

    image = open_picture(encoded)
    try:
        image = upright(image)
        if image.mode.startswith("I"):  # 16-bit gray, which Pillow's own conversion clips; "I" may hold 8 bits as well
            values = np.asarray(image).clip(0, 65535)
            scale = 257 if image.mode != "I" or values.max() > 255 else 1
            levels = (np.arange(65536) / scale).round().clip(0, 255).astype(np.uint8)
            image = Image.fromarray(levels[values])
        if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
            image = image.convert("RGBA") if image.mode != "La" else image.convert("LA").convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            white.alpha_composite(image)
            image = white
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # a palette or transparency that does not fit the picture
        raise DataError(f"cannot be read as RGB ({why(error)})") from error
