"""Compressed pictures to RGB: any mode, upright, transparent parts over white."""

import io
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunekit.data.bad_samples import DataError


def decode(encoded: bytes, size: int) -> Tensor:
    """Decode one compressed picture to uint8 RGB (3, size, size): shorter side resized, centre cropped.

    Raises DataError where it cannot be decoded: "cannot be read (why)".
    """
    from PIL import Image, ImageOps

    picture = ImageOps.fit(to_rgb(_load(encoded)), (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def fault(encoded: bytes) -> str | None:
    """Return why a compressed picture cannot be used, or None; decodes it in full."""
    try:
        to_rgb(_load(encoded))
    except DataError as error:
        return str(error)
    return None


def to_rgb(image: Any) -> Any:
    """Return a PIL picture as RGB, turned as its EXIF orientation says.

    16-bit grey is scaled, transparent parts show white, palettes and CMYK are resolved; of an animation the first
    frame. Colour profiles are not applied.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips; "I" may hold 8 bits as well
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        scale = 257 if image.mode != "I" or values.max() > 255 else 1
        image = Image.fromarray((values / scale).round().astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA") if image.mode != "La" else image.convert("LA").convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise DataError(f"cannot be read as RGB ({error})") from error


def _load(encoded: bytes) -> Any:
    from PIL import Image

    if not encoded:
        raise DataError("cannot be read (zero bytes)")
    try:
        image = Image.open(io.BytesIO(encoded))
        image.load()
    except Exception as error:  # a damaged file makes Pillow's plugins raise whatever they come across
        reason = str(error).replace(repr(error.args[0]), "") if isinstance(error, KeyError) else str(error)
        raise DataError(f"cannot be read ({_without_addresses(reason) or type(error).__name__})") from error
    return image


def _without_addresses(text: str) -> str:
    """Leave out the address of the buffer that Pillow names, which differs between two runs."""
    return " ".join(text.split("<_io.BytesIO")[0].split())
