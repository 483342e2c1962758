"""Emoji-64, the embedded data set: 1,844 real pictures with real names and keywords (see `render_emoji.py`)."""

from pathlib import Path

import torch

from prunekit.data.bad_samples import DataError
from prunekit.data.holdout import HoldoutBy, hold_out
from prunekit.data.images import CaptionedImages
from prunekit.data.samples import caption_fault
from prunekit.data.webdataset import read_webdataset

EMOJI_DIRECTORY = Path(__file__).parent.parent / "assets" / "emoji64"
MAX_KEYWORDS = 4


def emoji_captions(name: str, keywords: list[str]) -> list[str]:
    """Return one emoji's captions: its name, its keywords, and both; with fewer than two keywords, only its name."""
    listed = ", ".join(keywords[:MAX_KEYWORDS])
    return [name] if len(keywords) < 2 else [name, listed, f"{name}: {listed}"]


def load_emoji(
    path: Path | None = None,
    holdout: float = 0.1,
    seed: int = 0,
    holdout_by: HoldoutBy = "captions",
    cache: Path | None = None,
) -> CaptionedImages:
    """Read Emoji-64 (or a folder of shards with the same json: name, keywords) through the WebDataset reader."""
    folder = path or EMOJI_DIRECTORY
    samples = read_webdataset(sorted(folder.glob("*.tar")))
    captions: list[str] = []
    image_index: list[int] = []
    for index, sample in enumerate(samples):
        if "name" not in sample["json"]:
            raise DataError(
                f"{sample['key']} has no `name` in its json; is it an emoji shard? use data.kind=webdataset"
            )
        name, keywords = sample["json"]["name"], sample["json"].get("keywords", [])
        if not isinstance(keywords, list) or not all(isinstance(keyword, str) for keyword in keywords):
            raise DataError(f"{sample['key']} has `keywords` in its json that are not a list of texts")
        keywords = [keyword.strip() for keyword in keywords if keyword.strip()]
        fault = next(filter(None, map(caption_fault, [name, *keywords])), None)
        if fault:
            raise DataError(f"{sample['key']} {fault}: `name` and `keywords` in its json must be texts in UTF-8")
        texts = emoji_captions(name.strip(), keywords)
        captions += texts
        image_index += [index] * len(texts)
    indices, encoded = torch.tensor(image_index), [sample["image"] for sample in samples]
    held = hold_out(holdout_by, encoded, captions, indices, holdout, seed, cache=cache)
    return CaptionedImages(
        encoded=encoded,
        names=[sample["text"] for sample in samples],
        captions=captions,
        image_index=indices,
        held_out=held.pairs,
        holdout_by=holdout_by,
        held_by_closure=held.by_closure,
    )
