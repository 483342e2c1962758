"""Writers of small data sets in the layouts in which captioned images are published, and pictures of one color."""

import csv
import io
import json
import tarfile
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageColor

COLORS = ("red", "lime", "blue", "yellow", "cyan", "magenta", "black", "white")
LINK = "https://example.org/pictures/{}.jpg?größe=1"


def picture(color: str, kind: str = "png", mode: str = "RGB", side: int = 32, **options) -> bytes:
    """Return a picture of one color."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), color).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def samples(count: int) -> list[tuple[bytes, str]]:
    """Return (picture, caption) samples with different captions."""
    return [(picture(COLORS[i % 8], "jpeg"), f"{COLORS[i % 8]} picture number {i}") for i in range(count)]


def color_of(pixels: torch.Tensor) -> str:
    """Check that a decoded picture (3, h, w) has a single color, and return it."""
    values = pixels.flatten(1).float()
    assert values.std(dim=1).max() < 8, "not one color"
    mean = values.mean(dim=1)
    name = min(COLORS, key=lambda color: float((mean - torch.tensor(ImageColor.getrgb(color)).float()).norm()))
    assert (mean - torch.tensor(ImageColor.getrgb(name)).float()).norm() < 12, (name, mean)
    return name


def pairs(data) -> list[tuple[str, str]]:
    """Return every (color, caption) of a data set in order."""
    colors = [color_of(data.pixels([index], 8)[0]) for index in range(data.num_images)]
    return [(colors[image], caption) for image, caption in zip(data.image_index, data.captions, strict=True)]


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """Write a tar archive of (name, content) members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def members(key: str, image: bytes, caption: str, suffix: str = "jpg") -> list[tuple[str, bytes]]:
    """Return one sample's archive members, as in CC3M's shards."""
    return [(f"{key}.{suffix}", image), (f"{key}.json", b'{"status": "success"}'), (f"{key}.txt", caption.encode())]


def webdataset(folder: Path, samples: list[tuple[bytes, str]], per_shard: int = 3, split: str = "train") -> dict:
    for shard, first in enumerate(range(0, len(samples), per_shard)):
        content = []
        for index, (image, caption) in enumerate(samples[first : first + per_shard], first):
            content += members(f"{index:09d}", image, caption)
        write_tar(folder / f"cc3m-{split}-{shard:04d}.tar", content)
    return {"kind": "webdataset", "path": str(folder)}


def emoji(folder: Path, samples: list[tuple[bytes, str]]) -> dict:
    """Write a data set like Emoji-64: a sample's JSON has its name and keywords (the first word and "picture")."""
    content = []
    for index, (image, caption) in enumerate(samples):
        words = {"name": caption, "keywords": [caption.split()[0], "picture"]}
        parts = (("jpg", image), ("txt", caption.encode()), ("json", json.dumps(words).encode()))
        content += [(f"{index:05d}.{suffix}", part) for suffix, part in parts]
    write_tar(folder / "emoji64-00000.tar", content)
    return {"kind": "emoji", "path": str(folder)}


def cc3m_tsv(folder: Path, samples: list[tuple[bytes, str]]) -> dict:
    (folder / "training").mkdir(parents=True)
    lines = []
    for index, (image, caption) in enumerate(samples):
        link = LINK.format(index)
        lines.append(f"{caption}\t{link}\n")
        (folder / "training" / f"{index}_{zlib.crc32(link.encode())}").write_bytes(image)
    table = folder / "Train_GCC-training.tsv"
    table.write_text("".join(lines), encoding="utf-8")
    return {"kind": "cc3m_tsv", "path": str(table)}


def coco(folder: Path, samples: list[tuple[bytes, str]], captions_each: int = 1, year: str = "val2014") -> dict:
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / year).mkdir()
    images, annotations = [], []
    for index, (image, caption) in enumerate(samples):
        number, name = 1000 - index, f"COCO_{year}_{1000 - index:012d}.jpg"
        (folder / year / name).write_bytes(image)
        images.append({"id": number, "file_name": name, "width": 32, "height": 32})
        for copy in range(captions_each):
            text = caption if copy == 0 else f"{caption}, seen {copy}"
            annotations.append({"image_id": number, "id": index + 100 * copy, "caption": text})
    annotations.sort(key=lambda entry: entry["id"])
    content = {"info": {}, "images": images, "annotations": annotations}
    (folder / "annotations" / f"captions_{year}.json").write_text(json.dumps(content), encoding="utf-8")
    return {"kind": "coco", "path": str(folder), "split": year[:-4]}


def folder_txt(folder: Path, samples: list[tuple[bytes, str]]) -> dict:
    for index, (image, caption) in reversed(list(enumerate(samples))):
        name = folder / f"part{index // 4}" / f"{index:03d} é"
        name.parent.mkdir(parents=True, exist_ok=True)
        name.with_suffix(".JPG").write_bytes(image)
        name.with_suffix(".txt").write_text(caption, encoding="utf-8")
    (folder / "README.txt").write_text("no caption")
    return {"kind": "folder", "path": str(folder)}


def folder_jsonl(folder: Path, samples: list[tuple[bytes, str]]) -> dict:
    names = write_pictures(folder / "пикчи", samples)
    rows = [{"file_name": f"пикчи/{n}", "text": text} for n, (_, text) in zip(names, samples, strict=True)]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return {"kind": "folder", "path": str(folder)}


def folder_csv(folder: Path, samples: list[tuple[bytes, str]]) -> dict:
    return write_csv(folder / "metadata.csv", samples, "file_name", "text") | {"kind": "folder", "path": str(folder)}


def parquet(folder: Path, samples: list[tuple[bytes, str]], per_file: int = 3, split: str = "train") -> dict:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    total = -(-len(samples) // per_file)
    for file, first in enumerate(range(0, len(samples), per_file)):
        part = samples[first : first + per_file]
        images = [{"bytes": image, "path": f"{first + i}.jpg"} for i, (image, _) in enumerate(part)]
        table = pa.table({"image": images, "text": [caption for _, caption in part]})
        pq.write_table(table, folder / "data" / f"{split}-{file:05d}-of-{total:05d}.parquet", row_group_size=2)
    return {"kind": "parquet", "path": str(folder)}


def csv_table(folder: Path, samples: list[tuple[bytes, str]]) -> dict:
    return write_csv(folder / "table.csv", samples, "path", "caption")


def write_csv(path: Path, samples: list[tuple[bytes, str]], image_column: str, text_column: str) -> dict:
    names = write_pictures(path.parent, samples)
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow([text_column, "other", image_column])
        writer.writerows([caption, "x", name] for name, (_, caption) in zip(names, samples, strict=True))
    return {"kind": "csv", "path": str(path)}


def write_pictures(folder: Path, samples: list[tuple[bytes, str]]) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"絵 {index}.png" for index in range(len(samples))]
    for name, (image, _) in zip(names, samples, strict=True):
        (folder / name).write_bytes(image)
    return names


LAYOUTS = (webdataset, cc3m_tsv, coco, folder_txt, folder_jsonl, folder_csv, parquet, csv_table)
