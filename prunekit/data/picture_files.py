"""Pictures in files: opened with limits, decoded to RGB, written atomically."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from prunekit.data.bad_samples import DataError, read_file
from prunekit.runtime.files import replacing

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow's other formats run programs (EPS) or vary by version
MOST_PIXELS = 2**26  # 8192 x 8192
ORIENTATION = 0x0112  # EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_picture(source: Path | bytes) -> Image.Image:
    """Decode a picture in full, without applying its EXIF orientation; of an animation, decode the first frame.

    Args:
        source: a file, or a compressed picture.

    Raises:
        DataError: the format is not in FORMATS, the picture is damaged, or its header gives more than MOST_PIXELS
            pixels (it is not decoded then). The message is "cannot be read (why)", after the path if there is one.

    """
    name, encoded = (f"{source} ", read_file(source)) if isinstance(source, Path) else ("", source)
    try:
        if not encoded:
            raise DataError("zero bytes")
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        if image.width * image.height > MOST_PIXELS:
            raise DataError(f"{image.width:,} x {image.height:,} pixels, more than {MOST_PIXELS:,}")
        image.load()
    except Exception as error:  # Pillow's plugins may raise any exception for a damaged file
        raise DataError(f"{name}cannot be read ({why(error)})") from error
    return image


def why(error: Exception) -> str:
    """Return the reason of an error that Pillow raised, for an error message."""
    if isinstance(error, UnidentifiedImageError):
        return f"no picture in one of the formats {', '.join(FORMATS)}, or its header is damaged"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MOST_PIXELS:,} pixels"
    reason = str(error).replace(repr(error.args[0]), "") if isinstance(error, KeyError) else str(error)
    reason = reason.split("<_io.BytesIO")[0]  # the buffer's address differs between two runs
    return " ".join(reason.split()) or type(error).__name__


def upright(image: Image.Image) -> Image.Image:
    """Return a picture turned as its EXIF orientation says; unchanged if its EXIF data are damaged."""
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 0))
    except Exception:  # Pillow's EXIF parser may raise any exception; the pixels do not depend on it
        turn = None
    return image if turn is None else image.transpose(turn)


def write_image(path: Path, image: Image.Image, **options: Any) -> None:
    """Write a picture atomically, in the format of the path's suffix (png, webp); `options` go to Pillow's `save`."""
    with replacing(path) as new:
        image.save(new, format=path.suffix.removeprefix("."), **options)


def decode(encoded: bytes, size: int) -> Tensor:
    """Decode one compressed picture to uint8 RGB (3, size, size): shorter side resized, center cropped.

    Raises DataError if it cannot be decoded: "cannot be read (why)".
    """
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

    16-bit gray is scaled to 8 bits, transparent parts become white, palettes and CMYK are converted. Of an animation,
    the first frame is decoded. Color profiles are not applied, and damaged EXIF data are ignored.

    Raises DataError if it cannot be decoded: "cannot be read (why)".
    """
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
