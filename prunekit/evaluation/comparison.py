"""Compute one table row per model, from the same inputs: generate pictures, measure them, and describe experts."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor

from prunekit.core.registry import with_denoiser
from prunekit.core.timesteps import read_denoiser
from prunekit.data.encoded import EncodedData
from prunekit.data.images import TRAINING, CaptionedImages, Split
from prunekit.evaluation.generate import generate, generate_to
from prunekit.evaluation.metrics import clip_score, cmmd, frechet_of_enough, kid, retrieval
from prunekit.methods.router import Router
from prunekit.runtime.precision import autocast
from prunekit.runtime.randomness import generator
from prunekit.runtime.work import Sharing

TIMED_IMAGES = 8
FLOOR_SETS, MOST_FLOOR_PICTURES = 2, 2000
FREQUENT_WORDS = 6


@dataclass(frozen=True)
class Candidate:
    """A model under test: one denoiser, or several experts and the router that chooses among them."""

    name: str
    models: Sequence[ModelMixin]
    macs: Sequence[int]  # exact MACs of each model
    params: Sequence[int]
    router: Router | None = None
    training_seconds: float | None = None
    training_passes: float | None = None  # compute of pruning and recovery, in dense-model passes of one sample

    def used_params(self, shares: Tensor | None = None) -> int:
        """Return the number of parameters of the experts that receive prompts; other experts are not counted.

        shares: (N,) each expert's share of the training prompts; None: all experts are counted that are not in
        `router.unused`.
        """
        if shares is None:
            unused = () if self.router is None else self.router.unused
            return sum(params for expert, params in enumerate(self.params) if expert not in unused)
        return sum(params for params, share in zip(self.params, shares.tolist(), strict=True) if share)

    def experts(self, embeddings: Tensor) -> Tensor:
        """Return the expert of each prompt, (B,), from prompt embeddings (B, Z)."""
        return self.experts_of(embeddings, torch.arange(len(embeddings)))

    def experts_of(self, embeddings: Any, rows: Tensor) -> Tensor:
        """Return the expert of rows (R,) of all prompt embeddings (P, Z), which may lie on disk."""
        return (
            torch.zeros(len(rows), dtype=torch.long)
            if self.router is None
            else self.router.route_rows(embeddings, rows)
        )


class StoredModels(Sequence[ModelMixin]):
    """Pruned denoisers in folders, read on demand; the last denoiser that was read stays in memory."""

    def __init__(self, folders: Sequence[Path], hold: Callable[[ModelMixin], ModelMixin]):
        """Set the folders; hold: function that moves a model that was read to its device and dtype."""
        self.folders, self.hold = list(folders), hold
        self._last: tuple[int, ModelMixin] | None = None

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, index: Any) -> Any:
        """Return denoiser `index`, an integer, in evaluation mode, frozen."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        if self._last is None or self._last[0] != index:
            self._last = None  # free the last model before the next is read
            model = self.hold(read_denoiser(self.folders[index]))
            self._last = (index, model.eval().requires_grad_(False))
        return self._last[1]


@dataclass
class Prompts:
    """The prompts and noise seeds from which every row generates its pictures.

    The first `num_names` prompts are names of pictures, for top-k retrieval; the other prompts are captions. `images`
    are the real pictures that the rows are compared with: all of the data set, or the requested number.
    """

    images: CaptionedImages | None  # None: there are only prompts
    prompts: list[str]
    targets: Tensor  # (n,) index in `images` of each prompt's picture
    num_names: int
    seeds: list[int]
    embeddings: Tensor  # (n, Z) of the prompts

    @property
    def real_images(self) -> CaptionedImages:
        """The real pictures; an AssertionError if there are only prompts."""
        assert self.images is not None, "these prompts have no pictures"
        return self.images

    @classmethod
    def choose(
        cls,
        images: CaptionedImages,
        count: int,
        seed: int,
        prompt_encoder: Any | None = None,
        num_references: int | None = None,
        split: Split | None = None,
    ) -> "Prompts":
        """Choose half of `count` prompts among the names and half among the captions; more names if captions are few.

        prompt_encoder: object with `encode`; None: embeddings are zeros (n, 1).
        num_references: largest number of real pictures, with the prompts' pictures first; None: all.
        split: split from which prompts and pictures come, for data with held-out pictures; None: names and pictures
            come from all the data, and captions from the held-out captions.
        """
        images = images.of_split(split)
        order = torch.randperm(images.num_images, generator=generator(seed, "evaluation names"))
        held = torch.nonzero(images.held_out).flatten()
        if split is not None or not len(held):
            held = images.pairs_beside_names()
        held = held[torch.randperm(len(held), generator=generator(seed, "evaluation captions"))]
        names = order[: count - min(count // 2, len(held))]
        if split is not None:  # captions of pictures whose name is not among the prompts come first
            asked = torch.isin(images.image_index[held], names)
            held = torch.cat([held[~asked], held[asked]])
        held = held[: count // 2]
        prompts = [images.names[i] for i in names] + [images.captions[i] for i in held]
        targets = torch.cat([names, images.image_index[held]])
        embeddings = torch.zeros(len(prompts), 1)
        if prompt_encoder is not None:
            embeddings = torch.as_tensor(prompt_encoder.encode(prompts)).float()
        images, targets = referred(images, targets, order, num_references)
        return cls(images, prompts, targets, len(names), noise_seeds(seed, len(prompts)), embeddings)

    def reseeded(self, seed: int | None) -> "Prompts":
        """Return the same prompts with the noise of another seed; None: the same noise."""
        return self if seed is None else replace(self, seeds=noise_seeds(seed, len(self.prompts)))


@dataclass
class EvaluationSet(Prompts):
    """The prompts on which a run's rows are measured, and the evaluator's output for the real pictures."""

    real_features: Tensor = field(repr=False)  # (num_images, F)
    real_embeddings: Tensor = field(repr=False)  # (num_images, E)
    floors: dict[str, float] = field(default_factory=dict)  # {"cmmd", "kid"} of equally many real training pictures

    @classmethod
    def of(
        cls, prompts: Prompts, evaluator: Any, size: int, images: CaptionedImages | None = None, seed: int = 0
    ) -> "EvaluationSet":
        """Return the evaluation set of prompts: run the evaluator over their real pictures, at a side of `size` pixels.

        images: all the data, with held-out pictures, for the floors; None: no floors. seed: draws the floors' pictures.
        """
        real = prompts.real_images.pixels(range(prompts.real_images.num_images), size)
        features, embeddings = evaluator.look(real)
        looked_at = cls(**vars(prompts), real_features=features, real_embeddings=embeddings)
        floors = {} if images is None else _floors(looked_at, images, evaluator, size, seed)
        return replace(looked_at, floors=floors)


def _floors(prompts: EvaluationSet, images: CaptionedImages, evaluator: Any, size: int, seed: int) -> dict[str, float]:
    """Return the floors of CMMD and KID: the distances of real training pictures, in place of generated pictures.

    A set has as many pictures as there are prompts, and none of them is a reference. The figures are means over up to 2
    such sets; the result is empty if there are too few pictures for one set.
    """
    training, used = images.of_split(TRAINING), {bytes(picture) for picture in prompts.real_images.encoded}
    order = torch.randperm(training.num_images, generator=generator(seed, "floor")).tolist()
    count = len(prompts.prompts)
    sets = max(1, min(FLOOR_SETS, MOST_FLOOR_PICTURES // count))
    rows: list[int] = []
    for picture in order:
        if len(rows) == sets * count:
            break
        if bytes(training.encoded[picture]) not in used:
            rows.append(picture)
    sets = len(rows) // count
    if not sets:
        return {}
    floors: dict[str, float] = {"cmmd": 0.0, "kid": 0.0}
    for index in range(sets):
        real = training.pixels(rows[index * count : (index + 1) * count], size)
        features, embeddings = evaluator.look(real)
        floors["cmmd"] += cmmd(prompts.real_embeddings, embeddings) / sets
        floors["kid"] += kid(prompts.real_features, features) / sets
    return floors


def referred(
    images: CaptionedImages, targets: Tensor, order: Tensor, most: int | None
) -> tuple[CaptionedImages, Tensor]:
    """Return about `most` real pictures (None: all), and the targets as indices of the returned pictures.

    All pictures of targets are kept, even if they are more than `most`; others follow in `order` up to `most`.

    targets: (n,) indices of `images`. order: (num_images,) a permutation of the indices of `images`.
    """
    if most is None or most >= images.num_images:
        return images, targets
    others = order[~torch.isin(order, targets)]
    kept = torch.cat([targets.unique(), others])[: max(most, len(targets.unique()))].sort().values
    return images.take(kept.tolist()), torch.searchsorted(kept, targets)


def noise_seeds(seed: int, count: int) -> list[int]:
    """Return the seed of each prompt's noise."""
    return [seed * 1_000_003 + index for index in range(count)]


@dataclass(frozen=True)
class Sampling:
    """Settings for generating pictures, the same for every row."""

    steps: int
    guidance: float
    batch_size: int
    precision: str = "float32"  # of the denoiser and the text encoder: a `Precision`
    size: int | None = None  # side in pixels; None: the model's own

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return the autocast context in which pictures are generated."""
        return autocast(self.precision, device)


def sample(
    candidate: Candidate,
    pipeline: DiffusionPipeline,
    prompts: Prompts,
    sampling: Sampling,
    folder: Path,
    sharing: Sharing,
) -> tuple[list[Path], Tensor]:
    """Generate every prompt's picture with its expert; resumable, and shared with other processes by `sharing`.

    Returns the pictures' files and the expert of each prompt (n,). A batch has prompts of one expert only.
    """
    experts = candidate.experts(prompts.embeddings)
    files: list[Path] = [folder] * len(prompts.prompts)

    def drawing(expert: int) -> DiffusionPipeline:
        return with_denoiser(pipeline, candidate.models[expert])

    for expert in experts.unique().tolist():
        rows = torch.nonzero(experts == expert).flatten().tolist()
        target = folder if len(candidate.models) == 1 else folder / f"expert-{expert}"
        with sampling.autocast(pipeline.device):
            paths = generate_to(
                target,
                partial(drawing, expert),
                [prompts.prompts[i] for i in rows],
                [prompts.seeds[i] for i in rows],
                sampling.steps,
                sampling.guidance,
                sampling.batch_size,
                sampling.size,
                title=f"{candidate.name}{f' {expert}' * (len(candidate.models) > 1)}: images",
                sharing=sharing,
            )
        for row, path in zip(rows, paths, strict=True):
            files[row] = path
    return files, experts


@dataclass(frozen=True)
class Judged:
    """An evaluator's output for a row's pictures, and for the texts that they are compared with."""

    features: Tensor  # (n, F)
    embedded: Tensor  # (n, E)
    texts: Tensor  # (n, E) of the prompts
    names: Tensor  # (num_images, E) of the real pictures' names


def judge(pictures: Tensor, prompts: EvaluationSet, evaluator: Any) -> Judged:
    """Run the evaluator over a row's pictures, uint8 (n, 3, H, W), and the texts."""
    features, embedded = evaluator.look(pictures)
    return Judged(
        features=features,
        embedded=embedded,
        texts=evaluator.embed_texts(prompts.prompts),
        names=evaluator.embed_texts(prompts.real_images.names),
    )


def measure(
    candidate: Candidate, judged: Judged, prompts: EvaluationSet, data: EncodedData, dense: Candidate, agreement: float
) -> dict[str, Any]:
    """Return the row's figures (keys of `table.COLUMNS`); its MACs are the mean over the training prompts."""
    shares = training_shares(candidate, data)
    macs = float((shares * torch.tensor(candidate.macs, dtype=torch.float64)).sum())
    return {
        "name": candidate.name,
        "params": candidate.used_params(shares),
        "macs": round(macs),
        "macs_ratio": macs / dense.macs[0],
        **quality(judged, prompts, agreement),
        "training_seconds": candidate.training_seconds,
        "training_passes": candidate.training_passes,
    }


def quality(judged: Judged, prompts: EvaluationSet, agreement: float) -> dict[str, float | None]:
    """Return the quality figures of a row's pictures and predictions; None for a figure that needs more pictures."""
    features, embedded, texts, names = judged.features, judged.embedded, judged.texts, judged.names
    asked = prompts.targets[: prompts.num_names]
    figures: dict[str, float | None] = {
        "cmmd": cmmd(prompts.real_embeddings, embedded),
        "kid": kid(prompts.real_features, features),
        "frechet": frechet_of_enough(prompts.real_features, features),
        "clip_score": clip_score(embedded[prompts.num_names :], texts[prompts.num_names :]),
        "top1": retrieval(embedded[: prompts.num_names], names, asked, k=1),
        "top5": retrieval(embedded[: prompts.num_names], names, asked, k=5),
        "agreement": agreement,
    }
    above = {f"{key}_above": float(figures[key] or 0.0) - floor for key, floor in prompts.floors.items()}
    return figures | above


def expert_rows(
    candidate: Candidate,
    experts: Tensor,
    data: EncodedData,
    prompts: EvaluationSet,
    dense: Candidate,
) -> list[dict[str, Any]]:
    """Return one row per expert: its cost, its share of the training and evaluated prompts, its frequent words."""
    shares, pairs = training_shares(candidate, data), data.training_pairs()
    routed = candidate.experts_of(data.prompts, pairs)
    captions_of = [[data.images.captions[i] for i in pairs[routed == e].tolist()] for e in range(len(candidate.models))]
    words, rows = frequent_words(captions_of), []
    for expert in range(len(candidate.models)):
        rows.append(
            {
                "expert": expert,
                "params": candidate.params[expert],
                "macs": candidate.macs[expert],
                "macs_ratio": candidate.macs[expert] / dense.macs[0],
                "training_share": float(shares[expert]),
                "prompts": int((experts == expert).sum()),
                "examples": ", ".join(words[expert]),
            }
        )
    return rows


def training_shares(candidate: Candidate, data: EncodedData) -> Tensor:
    """Return each expert's share of the training prompts by inference routing, (N,) float64."""
    routed = candidate.experts_of(data.prompts, data.training_pairs())
    return shares_of(routed, len(candidate.models))


def shares_of(experts: Tensor, count: int) -> Tensor:
    """Return each expert's share of prompts, (N,) float64, from the prompts' experts (n,) and the number of experts."""
    return torch.bincount(experts, minlength=count).double() / len(experts)


def frequent_words(captions_of: Sequence[Sequence[str]], count: int = FREQUENT_WORDS) -> list[list[str]]:
    """Return the words that distinguish each expert's captions from the others, by their mean TF-IDF in its captions.

    captions_of: each expert's captions. English stop words are left out; an expert without captions has no words.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(stop_words="english", token_pattern=r"(?u)\b[^\W\d]{3,}\b")
    try:
        weights = vectorizer.fit_transform([caption for captions in captions_of for caption in captions])
    except ValueError:  # no word is left
        return [[] for _ in captions_of]
    words, expert_words, start = vectorizer.get_feature_names_out(), [], 0
    for captions in captions_of:
        sums = weights[start : start + len(captions)].sum(axis=0).A1 if len(captions) else np.zeros(len(words))
        order = np.argsort(-sums, kind="stable")[:count]
        expert_words.append([str(words[index]) for index in order if sums[index] > 0])
        start += len(captions)
    return expert_words


def seconds_per_image(
    candidate: Candidate, pipeline: DiffusionPipeline, prompts: EvaluationSet, sampling: Sampling
) -> float:
    """Measure the seconds per image in a batch of 8, after a warm-up; the mean over experts is weighted by prompts."""
    count = min(TIMED_IMAGES, len(prompts.prompts))
    shares = shares_of(candidate.experts(prompts.embeddings), len(candidate.models))
    total = 0.0
    for expert, model in enumerate(candidate.models):
        if not shares[expert]:
            continue
        routed, inputs = with_denoiser(pipeline, model), (prompts.prompts[:count], prompts.seeds[:count])
        with sampling.autocast(model.device):
            generate(routed, *inputs, 2, sampling.guidance, count)
            start = time.perf_counter()
            generate(routed, *inputs, sampling.steps, sampling.guidance, count)
        total += float(shares[expert]) * (time.perf_counter() - start) / count
    return total
