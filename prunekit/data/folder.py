"""Image folders: captions in NAME.txt beside NAME.jpg, or in metadata.jsonl or metadata.csv as in imagefolder."""

import json
from collections.abc import Iterator
from pathlib import Path

from prunekit.data.bad_samples import BadSample, DataError, file_size
from prunekit.data.samples import PICTURE_SUFFIXES, Sample, file_sample
from prunekit.data.tables import Row, csv_rows, grouped, listed

NO_CAPTIONS = ("readme", "license", "requirements")  # text files that belong to no picture


def folder_samples(
    folder: Path, image_column: str = "file_name", text_column: str = "text"
) -> Iterator[Sample | BadSample]:
    """Yield the pictures of a folder and its subfolders with their captions.

    If there is a metadata file, its rows name the pictures, in order, by paths relative to the file's folder. Otherwise
    the pictures come in the order of their paths, each with the text file beside it.
    """
    if not folder.is_dir():
        raise DataError(f"data.path={folder} is not a folder")
    files = sorted(path for path in folder.rglob("*") if not path.name.startswith("."))
    pictures = [path for path in files if path.suffix[1:].lower() in PICTURE_SUFFIXES]
    metadata = [path for path in files if path.name in ("metadata.jsonl", "metadata.csv") and path.is_file()]
    yield from _listed(metadata, pictures, image_column, text_column) if metadata else _beside(files, pictures)


def _listed(
    metadata: list[Path], pictures: list[Path], image_column: str, text_column: str
) -> Iterator[Sample | BadSample]:
    seen: set[str] = set()
    for path in metadata:
        read = csv_rows if path.suffix == ".csv" else _json_rows
        for sample in grouped(read(path, path.parent, image_column, text_column), path):
            seen.add(sample.file)
            yield sample
    for picture in pictures:
        if str(picture) not in seen:
            yield BadSample(picture.name, str(picture), f"has no row in {metadata[0].name}")


def _beside(files: list[Path], pictures: list[Path]) -> Iterator[Sample | BadSample]:
    texts = {path.with_suffix(""): path for path in files if path.suffix == ".txt"}
    owned: set[Path] = set()
    for picture in pictures:
        text = texts.get(picture.with_suffix(""))
        if text is None:
            yield BadSample(picture.name, str(picture), f"has no caption ({picture.stem}.txt is not there)")
            continue
        owned.add(text)
        try:
            file_size(text)
            caption = text.read_text(encoding="utf-8-sig")
        except (DataError, OSError, UnicodeDecodeError) as error:
            yield BadSample(picture.name, str(text), f"has a caption that cannot be read as UTF-8 ({error})")
            continue
        yield file_sample(picture.name, picture, [caption])
    for text in texts.values():
        if text not in owned and not text.name.lower().startswith(NO_CAPTIONS):
            yield BadSample(text.name, str(text), "is a caption without a picture")


def _json_rows(path: Path, root: Path, image_column: str, text_column: str) -> Iterator[Row | BadSample]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            label = f"line {number}"
            try:
                row = json.loads(line)
                name, text = row[image_column], row[text_column]
            except KeyError as error:
                setting = "image_column" if error.args[0] == image_column else "text_column"
                reason = f"has no {error} but {listed(map(repr, row))} (set data.{setting} to another name)"
                yield BadSample(f"{path.name}:{label}", str(path), reason)
                continue
            except (ValueError, TypeError, RecursionError) as error:
                reason = f"is not JSON with {image_column} and {text_column} ({type(error).__name__}: {error})"
                yield BadSample(f"{path.name}:{label}", str(path), reason)
                continue
            if not isinstance(name, str):
                reason = f"has a {image_column} of type {type(name).__name__}, not text"
                yield BadSample(f"{path.name}:{label}", str(path), reason)
                continue
            yield label, root / name, text
