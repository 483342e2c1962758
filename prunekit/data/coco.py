"""COCO 2014's captions: every picture with all its captions, or the 30,000 captions that papers evaluate on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prunekit.data.bad_samples import BadSample, DataError
from prunekit.data.samples import Sample, file_sample

VALIDATION = "val30k"  # the split that `coco_validation` chooses
SPLITS = {"train": "train2014", "val": "val2014", VALIDATION: "val2014"}


def coco_validation(annotations: list[dict[str, Any]], count: int = 30_000, seed: int = 42) -> list[dict[str, Any]]:
    """Choose the captions of the validation protocol: take each picture's first caption, and draw `count` of these.

    The choice equals APTP's published script (`sample_coco_30k.py`): NumPy's legacy generator, without replacement, in
    the order drawn. If there are fewer than `count`, all are returned, in random order.
    """
    import numpy as np

    first: dict[Any, dict[str, Any]] = {}
    for annotation in annotations:
        first.setdefault(annotation["image_id"], annotation)
    unique = list(first.values())
    chosen = np.random.RandomState(seed).choice(len(unique), min(count, len(unique)), replace=False)
    return [unique[index] for index in chosen]


def coco_files(root: Path, split: str | None, annotations: str | None, images: str | None) -> tuple[Path, Path]:
    """Return the JSON file of captions and the folder of pictures; relative settings are relative to `root`."""
    year = SPLITS.get(split or "", "")
    captions = root / (annotations or f"annotations/captions_{year}.json")
    if not captions.is_file():
        raise DataError(f"no COCO captions at {captions}: set data.path to COCO's folder, or data.annotations")
    candidates = [root / images] if images else [root / year, root / "images" / year]
    folder = next((folder for folder in candidates if folder.is_dir()), None)
    if folder is None:
        raise DataError(f"no folder of pictures at {' or '.join(map(str, candidates))}: set data.images")
    return captions, folder


def coco_samples(captions: Path, images: Path, validation: bool = False) -> Iterator[Sample | BadSample]:
    """Yield each picture with its captions, in the file's order; with `validation`, only those of `coco_validation`.

    Raises DataError for a file that is not a COCO captions json.
    """
    try:
        content = json.loads(captions.read_text(encoding="utf-8"))
        annotations = [{key: entry[key] for key in ("id", "image_id", "caption")} for entry in content["annotations"]]
        listed = [(image["id"], image["file_name"]) for image in content.get("images", [])]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{captions} is not a JSON file of COCO captions ({type(error).__name__}: {error})") from error
    names: dict[Any, str] = {}
    for position, (number, name) in enumerate(listed):
        if not isinstance(number, int | str) or not isinstance(name, str):
            yield BadSample(f"images[{position}]", str(captions), "has an id or a file_name of the wrong type", 0)
        elif names.setdefault(number, name) != name:
            yield BadSample(f"image {number}", str(captions), f"is listed twice; {name} is skipped", 0)
    usable = []
    for position, entry in enumerate(annotations):
        if isinstance(entry["id"], int | str) and isinstance(entry["image_id"], int | str if listed else int):
            usable.append(entry)
        else:
            yield BadSample(f"annotations[{position}]", str(captions), "has an id or an image_id of the wrong type")
    if not listed:  # the published file of 30,000 captions lists no images: use COCO 2014's file names
        names = {entry["image_id"]: f"COCO_{images.name}_{entry['image_id']:012d}.jpg" for entry in usable}
    texts: dict[Any, list[str]] = {} if validation else {number: [] for number in names}
    seen: set[Any] = set()
    for entry in coco_validation(usable) if validation else usable:
        fault = "comes twice" if entry["id"] in seen else None
        if entry["image_id"] not in names:
            fault = f"belongs to image {entry['image_id']}, which the file does not list"
        if fault:
            yield BadSample(f"annotation {entry['id']}", str(captions), fault)
            continue
        seen.add(entry["id"])
        texts.setdefault(entry["image_id"], []).append(entry["caption"])
    for number, image_captions in texts.items():
        yield file_sample(f"image {number}", images / names[number], image_captions)
