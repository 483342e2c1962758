"""The parts of encoded data (latents, text, prompts): compute each part's key and rows, in memory or in a cache."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.data.cache import Batch, Part, StoredPart, collect
from prunekit.data.cache_config import CacheConfig
from prunekit.data.encoders import BATCH, FrozenEncoders
from prunekit.data.fingerprint import Fingerprint
from prunekit.data.images import CaptionedImages
from prunekit.data.rows import Rows
from prunekit.runtime.digests import Digests
from prunekit.runtime.processes import current
from prunekit.runtime.progress import Progress

PRECISIONS = {"float32": torch.float32, "float16": torch.float16}
PROBES = 16  # number of captions whose embeddings identify a prompt encoder


@dataclass(frozen=True)
class Made:
    """A part's rows, by tensor name, and the bad sources, which have no rows."""

    key: str
    rows: Mapping[str, Tensor | Rows]
    bad: dict[int, tuple[str, str]]  # index of a bad source: (its name, the reason)


class PartMaker:
    """Computes the parts of one data set, or reads the parts that are in the cache."""

    def __init__(self, encoders: FrozenEncoders, config: CacheConfig, cache: Path | None = None, verify: bool = False):
        self.encoders, self.config, self.cache, self.verify = encoders, config, cache, verify
        self.digests = Digests(cache)

    def latents(self, images: CaptionedImages) -> Made:
        """Return `mean` and, for "moments", `deviation` of every picture that can be decoded; for "off", no rows.

        Raises DataError as soon as more pictures are bad than `images.tolerance` allows.
        """
        kept = {"means": ("mean",), "moments": ("mean", "deviation"), "off": ()}[self.config.latents]
        key = Fingerprint(kept, self.encoders.picture_key if kept else None)
        key.add_pictures(images.encoded, self.digests)
        bad: dict[int, str] = {}

        def make(sources: range) -> Iterator[Batch]:
            for part in _split(sources, self.encoders.batch):
                decoded = images.readable_pixels(part, self.encoders.resolution, bad)
                tensors = {}
                if kept:
                    moments = self.encoders.moments(torch.stack(decoded) if decoded else torch.empty(0))
                    tensors = {name: moments[name] for name in kept}
                yield Batch(tensors, {i: (images.where(i)[0], bad[i]) for i in part if i in bad}, len(part))

        return self._made("latents" if kept else "pictures", key, images.num_images, make)

    def text(self, captions: list[str]) -> Made:
        """Return every caption's text states: `text`, and the other conditions that the denoiser takes, by role."""

        def make(sources: range) -> Iterator[Batch]:
            for part in _split(sources, BATCH):
                yield Batch(self.encoders.states(captions[part.start : part.stop]), sources=len(part))

        return self._made("text", Fingerprint(self.encoders.text_key).add_texts(captions), len(captions), make)

    def null_text(self) -> Made:
        """Return the text states of the empty caption, as one row."""

        def make(sources: range) -> Iterator[Batch]:
            yield Batch(self.encoders.null_states(), sources=len(sources))

        return self._made("null", Fingerprint(self.encoders.text_key), 1, make)

    def prompts(self, prompt_encoder: Any, captions: list[str]) -> Made:
        """Return `prompts`, the prompt encoder's embeddings of every caption."""

        def embed(texts: list[str]) -> Tensor:
            return torch.as_tensor(prompt_encoder.encode(texts)).float().cpu()

        def make(sources: range) -> Iterator[Batch]:
            yield Batch({"prompts": embed(captions[sources.start : sources.stop])}, sources=len(sources))

        key = Fingerprint("prompts").add_texts(captions).add_tensor(embed(captions[:PROBES]))
        if isinstance(model := getattr(prompt_encoder, "model", None), nn.Module):
            key.add_module(model)
        return self._made("prompts", key, len(captions), make)

    def _made(self, kind: str, key: Fingerprint, count: int, make: Any) -> Made:
        precision, shard_size = PRECISIONS[self.config.precision], self.config.shard_size
        part = Part(kind, key.add(count, precision, shard_size).key(), count, make, precision, shard_size)
        stored = None if self.cache is None else StoredPart(part, self.cache, self.digests, self.verify)
        done = 0

        def progress(sources: int) -> None:
            nonlocal done
            done += sources
            bar.update(done)

        with ExitStack() as stack:
            if stored is None or not stored.is_whole():
                bar = stack.enter_context(Progress(f"encode {kind}", count, enabled=current().is_main))
            if stored is not None:
                stored.complete(progress)
                return Made(part.key, stored.rows(), stored.bad)
            batches = chain.from_iterable(make(sources) for sources in part.ranges.values())
            whole = collect(batches, count, torch.float32, progress)
            return Made(part.key, whole.tensors, whole.bad)


def _split(sources: range, size: int) -> list[range]:
    return [range(start, min(start + size, sources.stop)) for start in range(sources.start, sources.stop, size)]
