"""WebDataset shards: tar archives whose members KEY.jpg, KEY.txt and KEY.json make one sample."""

import json
import re
import statistics
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunekit.data.bad_samples import BadSample, DataError
from prunekit.data.samples import PICTURE_SUFFIXES, Sample

MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")  # key and suffix; the key ends at the base name's first dot
Part = tuple[int, int]  # offset and bytes in the archive


@dataclass
class Shard:
    """What one archive holds: the place of every sample's parts, by key and suffix, in the archive's order."""

    path: Path
    parts: dict[str, dict[str, Part]] = field(default_factory=dict)
    repeated: list[tuple[str, str]] = field(default_factory=list)  # (key, suffix) of members that come again
    contents: dict[tuple[str, str], bytes] = field(default_factory=dict)  # of the parts that were asked for
    fault: str | None = None  # why the archive could not be read to its end


def index_shard(path: Path, read: tuple[str, ...] = ("txt",)) -> Shard:
    """List an archive's samples without their pictures; of a damaged archive what comes before the damage.

    read: suffixes of the parts whose contents are kept. Of members with one name the first counts.
    """
    shard = Shard(path)
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError(f"the file ends within {member.name}")
                    matched = MEMBER.fullmatch(member.name) if member.isreg() else None
                    if matched:
                        _add(shard, matched[1], matched[2].lower(), (member.offset_data, member.size), file, read)
                file.seek(archive.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile stops at damage without a word
                    raise tarfile.ReadError(f"no end mark at byte {archive.offset} of {size}")
    except (tarfile.TarError, OSError, EOFError) as error:
        shard.fault = f"is cut short or damaged ({error})"
    if not shard.parts and shard.fault is None:
        shard.fault = "holds no sample"
    return shard


def _add(shard: Shard, key: str, suffix: str, part: Part, file: Any, read: tuple[str, ...]) -> None:
    parts = shard.parts.setdefault(key, {})
    if suffix in parts:
        shard.repeated.append((key, suffix))
        return
    parts[suffix] = part
    if suffix in read:
        file.seek(part[0])
        shard.contents[key, suffix] = file.read(part[1])


def webdataset_samples(
    shards: list[Path], missing: list[Path], image_suffix: str | None = None, text_suffix: str | None = None
) -> Iterator[Sample | BadSample]:
    """Yield the samples of shards in order, then the shards that are missing or damaged.

    image_suffix, text_suffix: the members that hold picture and caption; None: any picture's, and txt. A lost shard
    counts as many captions as the median of the whole ones, a damaged one those that it has less than that.
    """
    images, text = (image_suffix,) if image_suffix else PICTURE_SUFFIXES, text_suffix or "txt"
    whole: list[int] = []
    damaged: list[tuple[Shard, int]] = []
    for path in shards:
        shard = index_shard(path, (text,))
        for key, parts in shard.parts.items():
            yield _sample(shard, key, parts, images, text)
        for key, suffix in shard.repeated:
            if suffix in images:
                yield BadSample(f"{path.name}:{key}", str(path), "has a key that came before in its shard")
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
    try:
        return Sample(name, file, parts[suffix], [shard.contents[key, text].decode("utf-8-sig")])
    except UnicodeDecodeError:
        return BadSample(name, file, "has a caption that is not UTF-8")


def read_webdataset(shards: list[Path]) -> list[dict]:
    """Read small shards whole (picture / txt / json) into one dictionary a sample, in the shards' order.

    Keys: `key` (shard and sample, for messages), `image` (bytes), `text` (str), `json` (dict, maybe empty).
    Raises DataError for a shard that cannot be read and for any bad sample.
    """
    if not shards:
        raise DataError("no shard to read: give a folder that holds *.tar files, or the files themselves")
    samples = []
    for path in shards:
        shard = index_shard(path, ("txt", "json", *PICTURE_SUFFIXES))
        if shard.fault or shard.repeated:
            raise DataError(f"{path.name} {shard.fault or f'holds {shard.repeated[0][0]} twice'}")
        for key, parts in shard.parts.items():
            sample = _sample(shard, key, parts, PICTURE_SUFFIXES, "txt")
            fault = sample.reason if isinstance(sample, BadSample) else None
            text = "" if isinstance(sample, BadSample) else sample.captions[0].strip()
            if fault or not text:
                raise DataError(f"{path.name}:{key} {fault or 'has an empty caption'}")
            image = next(shard.contents[key, suffix] for suffix in PICTURE_SUFFIXES if suffix in parts)
            try:
                metadata = json.loads(shard.contents.get((key, "json"), b"{}"))
            except ValueError as error:
                raise DataError(f"{path.name}:{key} has a json that cannot be read ({error})") from error
            samples.append({"key": f"{path.name}:{key}", "image": image, "text": text, "json": dict(metadata)})
    if not samples:
        raise DataError(f"no sample in {', '.join(str(path) for path in shards)}: the data set is empty")
    return samples
