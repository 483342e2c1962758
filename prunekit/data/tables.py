"""Tables of paths and captions: a CSV file, CC3M's TSV, the metadata of an image folder."""

import csv
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prunekit.data.bad_samples import BadSample, DataError
from prunekit.data.samples import Sample, caption_fault, file_sample
from prunekit.runtime.errors import nearest

Row = tuple[str, Path, Any]  # (label for messages, the picture's file, the caption)
NUMBERED = re.compile(r"(\d+)(?:_(\d+))?")  # file names of CC3M's downloads: row number from 0, checksum of the link


def grouped(rows: Iterable[Row | BadSample], where: Path) -> Iterator[Sample | BadSample]:
    """Yield a sample for each picture, with the captions of all its rows, in the order of the pictures' first rows.

    where: path of the table, for messages. A row is bad if its caption is bad or repeats one of the same picture.
    """
    captions: dict[Path, tuple[str, list[str]]] = {}
    for row in rows:
        if isinstance(row, BadSample):
            yield row
            continue
        label, picture, caption = row
        _, texts = captions.setdefault(picture, (f"{where.name}:{label}", []))
        fault = caption_fault(caption) or ("repeats an earlier row" if caption in texts else None)
        if fault:
            yield BadSample(f"{where.name}:{label}", str(picture), fault)
        else:
            texts.append(caption)
    for picture, (key, texts) in captions.items():
        if texts:
            yield file_sample(key, picture, texts)


def csv_rows(path: Path, root: Path, image_column: str, text_column: str) -> Iterator[Row | BadSample]:
    """Yield the rows of a CSV file whose first line names its columns; relative paths start at `root`.

    Bytes that are not UTF-8 become lone surrogates. A caption with a surrogate is bad; a path still names its file.
    """
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        try:
            check_columns(path, list(reader.fieldnames or ()), image_column, text_column)
            for row in reader:
                label = f"line {reader.line_num}"
                if not row[image_column]:
                    yield BadSample(f"{path.name}:{label}", str(path), f"has no {image_column}")
                else:
                    yield label, root / row[image_column], row[text_column] or ""
        except csv.Error as error:
            raise DataError(f"{path} cannot be read as CSV ({error})") from error


def check_columns(path: Path, columns: list[str], image_column: str, text_column: str) -> None:
    """Raise DataError if a column is missing; the message suggests the nearest name."""
    for setting, column in (("image_column", image_column), ("text_column", text_column)):
        if column not in columns:
            hint = nearest(column, columns)
            raise DataError(f"{path} has no column {column!r}{hint} (it has {listed(columns)}): set data.{setting}")


def listed(names: Iterable[Any]) -> str:
    """Return names as text for a message, at most 500 characters, as a damaged table may have a page of names."""
    text = ", ".join(str(name) for name in names)
    return text if len(text) <= 500 else f"{text[:500]} …"


def cc3m_rows(path: Path, images: Path) -> Iterator[Row | BadSample]:
    """Yield the rows of CC3M's TSV (caption, tab, link; no header) with their pictures in a folder.

    The second column is a path below `images`, or a link. A link's picture is the file that is named by the row's
    number, counted from 0, alone or followed by `_` and the link's CRC-32, as CC3M's downloaders name their files.
    """
    numbered: dict[int, tuple[str, str | None]] = {}
    for name in sorted(file.name for file in images.iterdir()):
        matched = NUMBERED.fullmatch(name.split(".")[0])
        if matched:
            numbered.setdefault(int(matched[1]), (name, matched[2]))
    with path.open(encoding="utf-8", newline="\n", errors="surrogateescape") as file:
        for index, line in enumerate(file):
            yield _cc3m_row(index, line.rstrip("\r\n"), path, images, numbered)


def _cc3m_row(
    index: int, line: str, path: Path, images: Path, numbered: dict[int, tuple[str, str | None]]
) -> Row | BadSample:
    label = f"line {index + 1}"
    key = f"{path.name}:{label}"
    caption, tab, link = line.partition("\t")
    link = link.strip()
    if not tab or not link:
        return BadSample(key, str(path), "has no tab between a caption and a link")
    if "://" not in link:
        return label, images / link, caption
    name, checksum = numbered.get(index, (None, None))
    if name is None:
        return BadSample(key, str(images), f"has no picture: no file of the folder is numbered {index}")
    if checksum is not None and int(checksum) != zlib.crc32(link.encode(errors="surrogateescape")):
        return BadSample(key, str(images / name), "has a picture whose name has the checksum of another link")
    return label, images / name, caption
