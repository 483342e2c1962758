"""Parquet files with a column of pictures (bytes, or bytes and path as `datasets` writes them) and one of captions."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prunekit.data.bad_samples import BadSample, DataError
from prunekit.data.samples import Sample
from prunekit.data.tables import check_columns

TEXT_COLUMNS = ("text", "caption", "txt")  # tried in this order where data.text_column is unset
IMAGE_COLUMNS = ("image", "jpg", "png")


def columns_of(files: list[Path], image_column: str | None, text_column: str | None) -> tuple[str, str]:
    """Return the columns of pictures and captions; raise DataError if no file can be read or a column is missing."""
    errors = []
    for path in files:
        try:
            names = _open(path).schema_arrow.names
        except DataError as error:
            errors.append(str(error))
            continue
        image = image_column or next((name for name in IMAGE_COLUMNS if name in names), IMAGE_COLUMNS[0])
        text = text_column or next((name for name in TEXT_COLUMNS if name in names), TEXT_COLUMNS[0])
        check_columns(path, names, image, text)
        return image, text
    raise DataError(f"no Parquet file can be read: {errors[0]}")


def parquet_samples(files: list[Path], missing: list[Path], text_column: str) -> Iterator[Sample | BadSample]:
    """Yield the rows of the files in order; only captions are read here, pictures are read on demand.

    A row's caption is a text or a list of texts. A file that is missing, damaged or without the column counts as many
    lost captions as the other files have rows (their median).
    """
    faults: tuple[type[Exception], ...] = (DataError, *_errors())
    whole: list[int] = []
    damaged: list[tuple[Path, str]] = []
    for path in files:
        try:
            opened = _open(path)
            if text_column not in opened.schema_arrow.names:
                raise DataError(f"no column {text_column!r}")
            captions = [opened.read_row_group(g, columns=[text_column]) for g in range(opened.num_row_groups)]
        except faults as error:
            damaged.append((path, f"cannot be read ({error})"))
            continue
        row = 0
        for group, table in enumerate(captions):
            for index, value in enumerate(_values(table.column(0))):
                name = f"{path.name}:row {row}"
                row += 1
                if isinstance(value, ValueError):
                    yield BadSample(name, str(path), f"has a caption that cannot be read ({value})")
                else:
                    yield Sample(name, str(path), (group, index), value if isinstance(value, list) else [value])
        whole.append(row)
    usual = max(1, int(statistics.median(whole))) if whole else 1
    for path, reason in damaged:
        yield BadSample(path.name, str(path), reason, usual)
    for path in missing:
        yield BadSample(path.name, str(path), "is missing from the numbered files", usual)


def _values(column: Any) -> list[Any]:
    """Return a column's values; a ValueError stands in for a value that cannot be read, such as non-UTF-8 text."""
    try:
        return column.to_pylist()
    except ValueError:
        return [_value(cell) for cell in column]


def _value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except ValueError as error:
        return error


def num_rows(files: list[Path]) -> int:
    """Return the number of rows in Parquet files, read from their footers."""
    return sum(_open(path).metadata.num_rows for path in files)


def _open(path: Path) -> Any:
    import pyarrow.parquet as pq

    if path.exists() and not path.is_file():  # a device or a pipe may have no end
        raise DataError(f"{path} is not a file")
    try:
        return pq.ParquetFile(path)
    except _errors() as error:
        raise DataError(f"{path} is not a complete Parquet file ({error})") from error


def _errors() -> tuple[type[Exception], ...]:
    import pyarrow as pa

    return (pa.ArrowException, OSError, KeyError)
