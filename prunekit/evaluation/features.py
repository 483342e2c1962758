"""Features of pictures, cached by content, so that evaluators run only once over the real pictures."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from prunekit.data.fingerprint import Fingerprint
from prunekit.data.images import CaptionedImages
from prunekit.evaluation.evaluator import BATCH, EMBEDDED_EVALUATORS, INCEPTION, Evaluator
from prunekit.evaluation.generate import read_pictures
from prunekit.runtime.digests import Digests
from prunekit.runtime.progress import Progress
from prunekit.runtime.tensors import save_tensors

CHUNK = 4 * BATCH  # pictures in memory at once; a multiple of BATCH, so that chunks do not change the features


class Features:
    """Features of real and of generated pictures by model and view, computed once and cached in `folder`.

    A view is a method of an evaluator that maps uint8 pictures to rows: "features" or "embed_images". A file's name
    is a digest of the model's weights, the view, the pictures' contents and the side that they are resized to.
    """

    def __init__(self, folder: Path, digests: Digests):
        self.folder, self.digests = folder, digests
        self._models: dict[str, tuple[Any, str]] = {}

    def model(self, name: str) -> Any:
        """Return the evaluator with this name (see `load_evaluator`), which is loaded once."""
        return self._loaded(name)[0]

    def real(self, images: CaptionedImages, name: str, view: str, size: int) -> Tensor:
        """Return rows (n, F) of the real pictures that can be decoded, at a side of `size` pixels.

        Raises DataError if more pictures cannot be decoded than the data's tolerance allows.
        """
        model, key = self._loaded(name)
        key = Fingerprint("real", key, view, size).add_pictures(images.encoded, self.digests).key()

        def chunks() -> Iterator[Tensor]:
            bad: dict[int, str] = {}
            waiting: list[Tensor] = []
            for start in range(0, images.num_images, CHUNK):
                waiting += images.readable_pixels(range(start, min(start + CHUNK, images.num_images)), size, bad)
                while len(waiting) >= CHUNK:
                    yield torch.stack(waiting[:CHUNK])
                    waiting = waiting[CHUNK:]
            if waiting:
                yield torch.stack(waiting)

        return self._kept(key, lambda: _rows(chunks(), getattr(model, view), images.num_images, "real pictures"))

    def drawn(self, paths: Sequence[Path], name: str, view: str, size: int | None) -> Tensor:
        """Return rows (n, F) of generated pictures, resized to a side of `size` pixels (None: not resized)."""
        model, key = self._loaded(name)
        key = Fingerprint("drawn", key, view, size).add(*self.digests.of([str(path) for path in paths])).key()
        chunks = (read_pictures(paths[start : start + CHUNK], size) for start in range(0, len(paths), CHUNK))
        return self._kept(key, lambda: _rows(chunks, getattr(model, view), len(paths), "drawn pictures"))

    def _loaded(self, name: str) -> tuple[Any, str]:
        if name not in self._models:
            model = load_evaluator(name)
            self._models[name] = (model, identity(model))
        return self._models[name]

    def _kept(self, key: str, compute: Callable[[], Tensor]) -> Tensor:
        path = self.folder / f"{key}.safetensors"
        if not path.is_file():
            save_tensors(path, {"rows": compute()})
        return load_file(path)["rows"]


def _rows(chunks: Iterator[Tensor], view: Callable[[Tensor], Tensor], total: int, title: str) -> Tensor:
    rows, done = [], 0
    with Progress(f"look at {title}", total) as progress:
        for chunk in chunks:
            rows.append(view(chunk))
            done += len(chunk)
            progress.update(done)
    return torch.cat(rows)


def identity(evaluator: Any) -> str:
    """Return a digest that identifies an evaluator by its class and weights."""
    module = evaluator if isinstance(evaluator, nn.Module) else evaluator.model
    return Fingerprint(type(evaluator).__name__, BATCH).add_module(module).key()


def load_evaluator(name: str | Path) -> Any:
    """Load an evaluator, which has the methods `embed_images`, `embed_texts` and `features`, by name or folder.

    "emoji" is trained on all of Emoji-64. "emoji-held-out" is trained without the pictures that `holdout_by: pictures`
    holds out, up to 20 %, at seed 0. "inception" is FID's network, which has only `features`. A folder holds an
    `Evaluator` or a CLIP model of transformers; any other name is a CLIP model on the hub.
    Raises ValueError if there is no such model.
    """
    if name == INCEPTION:
        from prunekit.evaluation.inception import InceptionFeatures

        return InceptionFeatures.load()
    if name in EMBEDDED_EVALUATORS:
        return Evaluator.from_pretrained(EMBEDDED_EVALUATORS[str(name)])
    if (Path(name) / "vocabulary.json").is_file():
        return Evaluator.from_pretrained(name)
    from prunekit.evaluation.clip import CLIPEvaluator

    return CLIPEvaluator.from_pretrained(name)
