"""The one place where pictures are opened, and written to disk."""

import io
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from prunekit.data.bad_samples import DataError
from prunekit.data.files import read_file
from prunekit.training.checkpoint import replacing

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow's others run programs (EPS) or differ by its version
MOST_PIXELS = 2**26  # 8192 x 8192
ORIENTATION = 0x0112  # EXIF's tag
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
    """Decode a picture in full, without turning it; of an animation the first frame.

    Args:
        source: a file, or a compressed picture.

    Raises:
        DataError: the format is not in FORMATS, the picture is damaged, or its header says that it has more than
            MOST_PIXELS pixels, which are then not decoded. "cannot be read (why)", with the path if `source` is one.

    """
    name, encoded = (f"{source} ", read_file(source)) if isinstance(source, Path) else ("", source)
    try:
        if not encoded:
            raise DataError("zero bytes")
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        if image.width * image.height > MOST_PIXELS:
            raise DataError(f"{image.width:,} x {image.height:,} pixels, more than {MOST_PIXELS:,}")
        image.load()
    except Exception as error:  # a damaged file makes Pillow's plugins raise whatever they come across
        raise DataError(f"{name}cannot be read ({why(error)})") from error
    return image


def why(error: Exception) -> str:
    """Return the words of a message about an error that Pillow raised."""
    if isinstance(error, UnidentifiedImageError):
        return f"no picture in one of the formats {', '.join(FORMATS)}, or its header is damaged"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MOST_PIXELS:,} pixels"
    reason = str(error).replace(repr(error.args[0]), "") if isinstance(error, KeyError) else str(error)
    reason = reason.split("<_io.BytesIO")[0]  # the buffer's address differs between two runs
    return " ".join(reason.split()) or type(error).__name__


def upright(image: Image.Image) -> Image.Image:
    """Return a picture turned as its EXIF orientation says; as it is stored where its EXIF data are damaged."""
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 0))
    except Exception:  # Pillow's parser raises whatever it comes across; the pixels do not depend on it
        turn = None
    return image if turn is None else image.transpose(turn)


def write_image(path: Path, image: Image.Image, **options: Any) -> None:
    """Write a picture in the format that its name ends in (png, webp), atomically; `options` as Pillow's `save`."""
    with replacing(path) as new:
        image.save(new, format=path.suffix.removeprefix("."), **options)
