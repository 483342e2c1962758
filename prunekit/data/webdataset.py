"""WebDataset shards: tar archives whose members KEY.jpg, KEY.txt and KEY.json make one sample."""

import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

from prunekit.data.bad_samples import MOST_BYTES, BadSample, DataError, too_large
from prunekit.data.samples import PICTURE_SUFFIXES, Sample
from prunekit.data.tar_index import Part, Shard, index_shard, index_shards

NUMBER = re.compile(r"(?P<series>.*?)(?P<number>\d+)(?P<of>-of-(?P<total>\d+))?(?P<rest>(?:-[0-9a-f]{16,})?\.\w+)")
SPLITS = {"train", "training", "val", "valid", "validation", "test"}
MOST_MISSING = 10_000  # with more missing numbers, the names are not a numbered series but dates or identifiers


def shards_of(path: Path, suffix: str, split: str | None) -> list[Path]:
    """Return the shards `*.suffix` at or below a path, ordered by name; with `split`, only the shards of this split.

    split: the part of the file names before the number ("cc3m-train"), or one of its words ("train"). Raises DataError
    if there is no shard, if the split is unknown, or if `split` is None and the shards are of several splits.
    """
    shards = [path] if path.is_file() else sorted(path.glob(f"*.{suffix}")) or sorted(path.rglob(f"*.{suffix}"))
    shards = [file for file in shards if not file.name.startswith(".")]
    if not shards:
        raise DataError(f"no shard to read in {path}: give a folder that holds *.{suffix} files, or one such file")
    series = {file: _series(file) for file in shards}
    names = sorted(set(series.values()))
    if split is None:
        several = sorted({word for name in names for word in _words(name)} & SPLITS)
        if len(several) > 1:
            raise DataError(
                f"{path} holds shards of several splits ({', '.join(names)}): set data.split to one of them"
            )
        return shards
    chosen = [file for file, name in series.items() if split == name or split in _words(name)]
    if not chosen:
        raise DataError(f"no shard of the split {split!r} in {path}: it holds {', '.join(names)}")
    return chosen


def missing_shards(shards: list[Path]) -> list[Path]:
    """Return the missing files of numbered series: between the first and last number; for NNNN-of-NNNN, of all."""
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


def webdataset_samples(
    shards: list[Path],
    missing: list[Path],
    image_suffix: str | None = None,
    text_suffix: str | None = None,
    indexes: Path | None = None,
) -> Iterator[Sample | BadSample]:
    """Yield the samples of shards in order, then the shards that are missing or damaged.

    image_suffix, text_suffix: suffixes of the members that hold picture and caption; None: any of PICTURE_SUFFIXES, and
    txt. indexes: folder that caches the shards' indexes (`index_shards`).
    A missing shard counts as many lost captions as the whole shards have samples (their median); a damaged shard counts
    the samples that it has less than this median.
    """
    images, text = (image_suffix,) if image_suffix else PICTURE_SUFFIXES, text_suffix or "txt"
    whole: list[int] = []
    damaged: list[tuple[Shard, int]] = []
    for shard in index_shards(shards, (text,), indexes):
        path = shard.path
        for key, parts in shard.parts.items():
            yield _sample(shard, key, parts, images, text)
        for key, suffix in shard.repeated:
            if suffix in images:
                yield BadSample(f"{path.name}:{key}", str(path), "has a key that occurs earlier in its shard")
        if shard.fault:
            damaged.append((shard, len(shard.parts)))
        else:
            whole.append(len(shard.parts))
    usual = int(statistics.median(whole)) if whole else 0
    for shard, count in damaged:
        reason = f"{shard.fault}; {count:,} samples before that were found" if count else shard.fault
        yield BadSample(shard.path.name, str(shard.path), str(reason), max(1, usual - count))
    for path in missing:
        yield BadSample(path.name, str(path), "is missing from the numbered shards", max(1, usual))


def _sample(shard: Shard, key: str, parts: dict[str, Part], images: tuple[str, ...], text: str) -> Sample | BadSample:
    name, file = f"{shard.path.name}:{key}", str(shard.path)
    suffix = next((suffix for suffix in images if suffix in parts), None)
    if suffix is None:
        return BadSample(name, file, f"has no picture ({', '.join(images)})")
    if parts[suffix][1] == 0:
        return BadSample(name, file, f"has no picture ({key}.{suffix} has zero bytes)")
    if text not in parts:
        return BadSample(name, file, f"has no caption ({key}.{text} is not there)")
    for kind, size in (("picture", parts[suffix][1]), ("caption", parts[text][1])):
        if size > MOST_BYTES:
            return BadSample(name, file, f"has a {kind} of {too_large(size)}")
    try:
        return Sample(name, file, parts[suffix], [shard.contents[key, text].decode("utf-8-sig")])
    except UnicodeDecodeError:
        return BadSample(name, file, "has a caption that is not UTF-8")


def read_webdataset(shards: list[Path]) -> list[dict]:
    """Read small shards (picture, txt, json) into memory, as one dictionary per sample, in the shards' order.

    Keys: `key` (shard and sample, for messages), `image` (bytes), `text` (str), `json` (dict, may be empty).
    Raises DataError for a shard that cannot be read and for any bad sample.
    """
    if not shards:
        raise DataError("no shard to read: give a folder that holds *.tar files, or the files themselves")
    samples = []
    for path in shards:
        shard = index_shard(path, ("txt", "json", *PICTURE_SUFFIXES))
        if shard.fault or shard.repeated:
            raise DataError(f"{path.name} {shard.fault or f'has {shard.repeated[0][0]} twice'}")
        for key, parts in shard.parts.items():
            sample = _sample(shard, key, parts, PICTURE_SUFFIXES, "txt")
            fault = sample.reason if isinstance(sample, BadSample) else None
            text = "" if isinstance(sample, BadSample) else sample.captions[0].strip()
            if fault or not text:
                raise DataError(f"{path.name}:{key} {fault or 'has an empty caption'}")
            image = next(shard.contents[key, suffix] for suffix in PICTURE_SUFFIXES if suffix in parts)
            try:
                metadata = json.loads(shard.contents.get((key, "json"), b"{}"))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path.name}:{key} has a json that cannot be read ({error})") from error
            if not isinstance(metadata, dict):
                raise DataError(
                    f"{path.name}:{key} has a json that is of type {type(metadata).__name__}, not an object"
                )
            samples.append({"key": f"{path.name}:{key}", "image": image, "text": text, "json": metadata})
    if not samples:
        raise DataError(f"no sample in {', '.join(str(path) for path in shards)}: the data set is empty")
    return samples
