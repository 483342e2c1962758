"""Metrics of the tables, computed in float64: distances between sets of pictures, and the match of pictures and texts.

Lower is better for the three distances, which are zero, up to sampling noise, for two samples of one distribution;
higher is better for the other metrics. Features and embeddings come from an evaluator; figures from different
evaluators cannot be compared.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from prunekit.runtime.errors import UserError
from prunekit.runtime.randomness import generator

CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
FRECHET_SAMPLES = 10  # pictures per feature that a Fréchet distance needs in each set
BLOCK = 2048  # rows of a kernel matrix in memory at once
Kernel = Callable[[Tensor, Tensor], Tensor]


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Return ‖μ₁−μ₂‖² + tr(Σ₁+Σ₂−2(Σ₁Σ₂)^½) of features (n, F) and (m, F) (FID, Heusel et al., 2017).

    Raises ValueError for fewer than two samples in a set or for features of different widths.
    """
    real, generated = _checked(real, generated, least=2)
    covariances = [torch.atleast_2d(values.T.cov()) for values in (real, generated)]  # (F, F)
    return gaussian_distance(real.mean(dim=0), covariances[0], generated.mean(dim=0), covariances[1])


def frechet_of_enough(real: Tensor, generated: Tensor) -> float | None:
    """Return the `frechet_distance`, or None if there are too few pictures for it (see `refuse_few`)."""
    enough = min(len(real), len(generated)) >= FRECHET_SAMPLES * generated.shape[1]
    return frechet_distance(real, generated) if enough else None


def refuse_few(count: int, width: int, what: str = "generated pictures") -> None:
    """Raise ValueError if `count` pictures are too few for a Fréchet distance of features of width `width`.

    The bias of the distance falls with the number of pictures and differs between models. Below 10 pictures per
    feature, this bias decides the order of the table's rows.
    """
    if count < FRECHET_SAMPLES * width:
        raise UserError(
            f"a Fréchet distance of {width:,} features needs at least {FRECHET_SAMPLES * width:,} pictures in "
            f"each set, and there are {count:,} {what}: ask for more, or remove it (kid and cmmd serve few "
            "pictures)"
        )


def gaussian_distance(mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor) -> float:
    """Return the squared Fréchet (2-Wasserstein) distance of two Gaussians (Dowson and Landau, 1982).

    The trace of (Σ₁Σ₂)^½ is taken from the symmetric Σ₁^½ Σ₂ Σ₁^½, which has the same eigenvalues.
    """
    values, vectors = torch.linalg.eigh(covariance_1.double())
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # (F, F)
    product = root @ covariance_2.double() @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    traces = covariance_1.double().trace() + covariance_2.double().trace()
    return float(((mean_1 - mean_2).double().square().sum() + traces - 2 * cross).clamp(min=0))


def kid(real: Tensor, generated: Tensor, subset: int | None = None, subsets: int = 100, seed: int = 0) -> float:
    """Return the kernel distance: unbiased squared MMD, kernel (x·y/F + 1)³ (Bińkowski et al., 2018).

    Features are (n, F) and (m, F). With `subset`, the result is the mean over `subsets` random subsets of that size, as
    in the paper; without it, all samples are used at once. The estimate is unbiased, so it may be slightly negative for
    equal distributions. Raises ValueError if `subset` is below 2 or larger than a set.
    """
    real, generated = _checked(real, generated, least=2)
    if subset is None:
        return _kid(real, generated)
    if not 2 <= subset <= min(len(real), len(generated)):
        raise UserError(f"a KID subset of {subset} does not fit sets of {len(real)} and {len(generated)} samples")
    total = 0.0
    for index in range(subsets):
        draws = generator(seed, "kid", index)
        rows = [torch.randperm(len(values), generator=draws)[:subset] for values in (real, generated)]
        total += _kid(real[rows[0]], generated[rows[1]])
    return total / subsets


def _kid(x: Tensor, y: Tensor) -> float:
    same: float | Tensor = 0.0
    for values in (x, y):
        rows, diagonal = row_sums(polynomial_kernel, values, values), diagonal_of(polynomial_kernel, values)
        same = same + (rows.sum() - diagonal.sum()) / (len(values) * (len(values) - 1))
    return float(same - 2 * row_sums(polynomial_kernel, x, y).sum() / (len(x) * len(y)))


def row_sums(kernel: Kernel, x: Tensor, y: Tensor) -> Tensor:
    """Return the row sums (n,) of the kernel matrix of (n, F) and (m, F); the whole matrix is never in memory."""
    return torch.cat([kernel(part, y).sum(dim=1) for part in x.split(BLOCK)])


def diagonal_of(kernel: Kernel, x: Tensor) -> Tensor:
    """Return a kernel's values of each row of (n, F) with itself, (n,)."""
    return torch.cat([kernel(part, part).diagonal() for part in x.split(64)])


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Return KID's kernel (x·y/F + 1)³ of features (n, F) and (m, F): (n, m)."""
    return ((x @ y.T) / x.shape[1] + 1) ** 3


def gaussian_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Return CMMD's kernel exp(-‖x-y‖²/2σ²), σ = 10, of unit embeddings (n, E) and (m, E): (n, m)."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return torch.exp(-squares / (2 * CMMD_SIGMA**2))


def cmmd(real: Tensor, generated: Tensor) -> float:
    """Return CMMD: 1000 · squared MMD of L2-normalized embeddings, Gaussian kernel σ = 10 (Jayasumana et al., 2024).

    Embeddings are (n, E) and (m, E). As in the authors' code, the estimate is biased and never negative.
    """
    x, y = (torch.nn.functional.normalize(values, dim=1) for values in _checked(real, generated, least=1))
    means = (row_sums(gaussian_kernel, a, b).sum() / (len(a) * len(b)) for a, b in ((x, x), (y, y), (x, y)))
    within_x, within_y, between = means
    return float(CMMD_SCALE * (within_x + within_y - 2 * between))


def clip_score(images: Tensor, texts: Tensor) -> float:
    """Return the mean of 100 · max(cos, 0) over pairs of embeddings, both (n, E) (Hessel et al., 2021, w = 100)."""
    return float(clip_scores(images, texts).mean())


def clip_scores(images: Tensor, texts: Tensor) -> Tensor:
    """Return each pair's 100 · max(cos, 0), (n,)."""
    return 100 * _cosines(images, texts).clamp(min=0)


def pick_scores(images: Tensor, texts: Tensor, scale: float) -> Tensor:
    """Return each pair's scale · cos, (n,) (PickScore, Kirstain et al., 2023); `scale`: exp of the model's logit_scale.

    Embeddings are both (n, E). The score of a set is their mean.
    """
    return scale * _cosines(images, texts)


def _cosines(images: Tensor, texts: Tensor) -> Tensor:
    if images.shape != texts.shape or not len(images):
        raise UserError(f"a score of pairs needs one text per picture, got {tuple(images.shape)}, {tuple(texts.shape)}")
    return torch.nn.functional.cosine_similarity(images.double(), texts.double(), dim=1)


def retrieval(images: Tensor, texts: Tensor, targets: Tensor, k: int = 1) -> float:
    """Return the share of pictures whose own text is among the `k` nearest of all texts; arguments as in `ranks`."""
    return float((ranks(images, texts, targets) < k).double().mean())


def ranks(images: Tensor, texts: Tensor, targets: Tensor) -> Tensor:
    """Return the number of other texts at least as near to each picture as the picture's own text, (n,).

    `images` (n, E) and `texts` (m, E) are unit vectors, `targets` (n,) the index of each picture's text. A tie counts
    against the picture, so that collapsed embeddings, which are all equal, do not score.
    """
    if len(images) != len(targets) or not len(images):
        raise UserError(
            f"retrieval needs one target per picture, got {len(images)} pictures and {len(targets)} targets"
        )
    scores = images.double() @ texts.double().T  # (n, m)
    target_scores = scores.gather(1, targets.to(scores.device)[:, None])
    return (scores >= target_scores).sum(dim=1) - 1


def _checked(real: Tensor, generated: Tensor, least: int) -> tuple[Tensor, Tensor]:
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise UserError(f"features must be (n, F) and (m, F), got {tuple(real.shape)} and {tuple(generated.shape)}")
    if min(len(real), len(generated)) < least:
        raise UserError(f"a distance needs {least} samples in each set, got {len(real)} and {len(generated)}")
    return real.double(), generated.double()
