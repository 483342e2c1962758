"""The files of a sharded data set: which belong to a split, and which are missing from a numbered series."""

import re
from pathlib import Path

from prunekit.data.bad_samples import DataError

NUMBER = re.compile(r"(?P<series>.*?)(?P<number>\d+)(?P<of>-of-(?P<total>\d+))?(?P<rest>(?:-[0-9a-f]{16,})?\.\w+)")
SPLITS = {"train", "training", "val", "valid", "validation", "test"}
MOST_MISSING = 10_000  # a wider gap is no numbered series: dates, identifiers


def shards_of(path: Path, suffix: str, split: str | None) -> list[Path]:
    """Return the shards `*.suffix` at or below a path in the order of their names, those of one split if it is given.

    split: the series' name before the number ("cc3m-train"), or one of its words ("train"). Raises DataError for none,
    for an unknown split, and for shards of several splits when none is asked for.
    """
    found = [path] if path.is_file() else sorted(path.glob(f"*.{suffix}")) or sorted(path.rglob(f"*.{suffix}"))
    found = [file for file in found if not file.name.startswith(".")]
    if not found:
        raise DataError(f"no shard to read in {path}: give a folder that holds *.{suffix} files, or one such file")
    series = {file: _series(file) for file in found}
    names = sorted(set(series.values()))
    if split is None:
        several = sorted({word for name in names for word in _words(name)} & SPLITS)
        if len(several) > 1:
            raise DataError(
                f"{path} holds shards of several splits ({', '.join(names)}): set data.split to one of them"
            )
        return found
    chosen = [file for file, name in series.items() if split == name or split in _words(name)]
    if not chosen:
        raise DataError(f"no shard of the split {split!r} in {path}: it holds {', '.join(names)}")
    return chosen


def missing_shards(shards: list[Path]) -> list[Path]:
    """Return the files that a numbered series lacks: between its first and last, or of NNNN-of-NNNN all."""
    groups: dict[tuple[Path, str, str, str], dict[int, int]] = {}
    for path in shards:
        matched = NUMBER.fullmatch(path.name)
        if matched and "-" not in matched["rest"]:
            key = (path.parent, matched["series"], matched["of"] or "", matched["rest"])
            groups.setdefault(key, {})[int(matched["number"])] = len(matched["number"])
    missing = []
    for (folder, series, of, rest), numbers in groups.items():
        first, last = (0, int(of.rsplit("-", 1)[1]) - 1) if of else (min(numbers), max(numbers))
        if last - first < len(numbers) + MOST_MISSING:
            width = min(numbers.values())
            absent = (number for number in range(first, last + 1) if number not in numbers)
            missing += [folder / f"{series}{number:0{width}d}{of}{rest}" for number in absent]
    return missing


def _series(path: Path) -> str:
    matched = NUMBER.fullmatch(path.name)
    return matched["series"].rstrip("-_.") if matched else path.stem


def _words(series: str) -> list[str]:
    return re.split(r"[-_.]", series)
