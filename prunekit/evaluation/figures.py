"""Figures of one model's pictures under a protocol, each with its error and the number of pictures that it uses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunekit.evaluation import metrics, uncertainty
from prunekit.evaluation.comparison import Prompts
from prunekit.evaluation.features import Features
from prunekit.evaluation.protocols import Protocol
from prunekit.runtime.errors import UserError
from prunekit.runtime.files import replacing

Figure = dict[str, float | int]
REAL_STATISTICS = "real-statistics.npz"  # in an evaluation's folder: moments of frechet's real pictures


@dataclass(frozen=True)
class Seen:
    """One model's pictures, and the prompts and real pictures to compare with; features are computed on demand."""

    protocol: Protocol
    features: Features
    prompts: Prompts
    paths: Sequence[Path]  # of the generated pictures, one per prompt
    size: int  # side of real and generated pictures in pixels

    def pair(self, name: str, view: str) -> tuple[Tensor, Tensor]:
        """Return an evaluator's rows of the real and of the generated pictures, (n, F) and (m, F)."""
        return self.features.real(self.prompts.real_images, name, view, self.size), self.drawn(name, view)

    def drawn(self, name: str, view: str = "embed_images") -> Tensor:
        """Return an evaluator's rows of the generated pictures, (m, F)."""
        return self.features.drawn(self.paths, name, view, self.size)

    def captioned(self, name: str) -> tuple[Tensor, Tensor]:
        """Return an evaluator's unit vectors of the captions' generated pictures and of the captions, (k, E) each."""
        first = self.prompts.num_names
        texts = self.features.model(name).embed_texts(self.prompts.prompts)  # all prompts, in the same batches as a run
        return self.drawn(name)[first:], texts[first:]

    @cached_property
    def ranks(self) -> Tensor:
        """The number of other names at least as near to each name's generated picture as the name, (num_names,)."""
        name, count = self.protocol.clip_model, self.prompts.num_names
        texts = self.features.model(name).embed_texts(self.prompts.real_images.names)
        return metrics.ranks(self.drawn(name)[:count], texts, self.prompts.targets[:count])


def figures(seen: Seen) -> dict[str, Figure]:
    """Return {metric: {value, error, low, high, count}}; low and high are the ends of the 95 % interval.

    error: the jackknife error over the generated pictures (`uncertainty`). count: number of generated pictures used.
    """
    return {name: FIGURES[name](seen) for name in seen.protocol.metrics}


def _figure(value: float, error: float, count: int) -> Figure:
    interval = uncertainty.estimate([value], [error])
    return {"value": value, "error": error, "low": interval.low, "high": interval.high, "count": count}


def _mean(values: Tensor) -> Figure:
    return _figure(float(values.mean()), uncertainty.error_of_mean(values), len(values))


def _cmmd(seen: Seen) -> Figure:
    real, drawn = seen.pair(seen.protocol.cmmd_model, "embed_images")
    return _figure(metrics.cmmd(real, drawn), uncertainty.cmmd_error(real, drawn), len(drawn))


def _kid(seen: Seen) -> Figure:
    real, drawn = seen.pair(seen.protocol.feature_model, "features")
    return _figure(metrics.kid(real, drawn), uncertainty.kid_error(real, drawn), len(drawn))


def _frechet(seen: Seen) -> Figure:
    name, file = seen.protocol.feature_model, seen.protocol.statistics
    if file is not None:
        drawn = seen.drawn(name, "features").double()
        mean, covariance = read_statistics(Path(file).expanduser(), drawn.shape[1])
    else:
        real, drawn = (rows.double() for rows in seen.pair(name, "features"))
        mean, covariance = real.mean(dim=0), torch.atleast_2d(real.T.cov())
        write_statistics(seen.features.folder.parent / REAL_STATISTICS, mean, covariance)
    drawn_moments = (drawn.mean(dim=0), torch.atleast_2d(drawn.T.cov()))
    value = metrics.gaussian_distance(mean, covariance, *drawn_moments)
    return _figure(value, uncertainty.frechet_error(mean, covariance, drawn), len(drawn))


def _clip_score(seen: Seen) -> Figure:
    return _mean(metrics.clip_scores(*seen.captioned(seen.protocol.clip_model)))


def _pick_score(seen: Seen) -> Figure:
    name = seen.protocol.pick_model
    scale = float(seen.features.model(name).logit_scale.exp())
    return _mean(metrics.pick_scores(*seen.captioned(name), scale))


FIGURES: dict[str, Callable[[Seen], Figure]] = {
    "cmmd": _cmmd,
    "kid": _kid,
    "frechet": _frechet,
    "clip_score": _clip_score,
    "top1": lambda seen: _mean((seen.ranks < 1).double()),
    "top5": lambda seen: _mean((seen.ranks < 5).double()),
    "pick_score": _pick_score,
}


NEEDS = {  # metric: (the setting that names its model, the attribute of the model that it uses)
    "cmmd": ("cmmd_model", "embed_images"),
    "kid": ("feature_model", "features"),
    "frechet": ("feature_model", "features"),
    "clip_score": ("clip_model", "embed_texts"),
    "top1": ("clip_model", "embed_texts"),
    "top5": ("clip_model", "embed_texts"),
    "pick_score": ("pick_model", "logit_scale"),
}


def refuse(protocol: Protocol, features: Features, prompts: Prompts) -> None:
    """Check, before pictures are generated, that every metric can be measured; this loads the metrics' models.

    Raises:
        ValueError: a model cannot be loaded or does not fit its metric, statistics cannot be read, or there are too few
            pictures for a Fréchet distance; the message is one line.
        ImportError: a model's package is missing.

    """
    for name in protocol.metrics:
        setting, need = NEEDS[name]
        if not hasattr(features.model(getattr(protocol, setting)), need):
            raise UserError(
                f"{setting}={getattr(protocol, setting)} has no {need}, which {name} needs: give a CLIP model"
            )
    if "frechet" not in protocol.metrics:
        return
    blank = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    width = features.model(protocol.feature_model).features(blank).shape[1]
    metrics.refuse_few(len(prompts.prompts), width, "pictures to draw")
    if protocol.statistics is None:
        metrics.refuse_few(prompts.real_images.num_images, width, "real pictures")
    else:
        read_statistics(Path(protocol.statistics).expanduser(), width)


def read_statistics(path: Path, width: int) -> tuple[Tensor, Tensor]:
    """Read mean (F,) and covariance (F, F) of real features from an .npz with `mu` and `sigma`, as pytorch-fid writes.

    Raises ValueError, one line, if there is no such file, or if its features do not have the width `width`.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays: list[Any] = [torch.from_numpy(np.asarray(content[name], dtype=np.float64)) for name in _STATISTICS]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"statistics={path} is not an .npz with {' and '.join(_STATISTICS)}: {error}") from error
    if arrays[0].shape != (width,) or arrays[1].shape != (width, width):
        shapes = " and ".join(str(tuple(array.shape)) for array in arrays)
        raise UserError(f"statistics={path} hold {shapes}, and the features are {width} wide: set feature_model")
    return arrays[0], arrays[1]


def write_statistics(path: Path, mean: Tensor, covariance: Tensor) -> None:
    """Write mean and covariance atomically, in the format that `read_statistics` and pytorch-fid read."""
    arrays: dict[str, Any] = dict(zip(_STATISTICS, (mean.numpy(), covariance.numpy()), strict=True))
    with replacing(path) as new, new.open("wb") as file:
        np.savez(file, **arrays)


_STATISTICS = ("mu", "sigma")
