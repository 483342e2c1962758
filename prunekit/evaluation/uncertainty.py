"""Uncertainty of a row's figures: jackknife errors for other pictures, and Student's t intervals for other seeds.

The jackknife leaves out one picture at a time (Efron and Stein, 1981). Most figures have it in closed form, so nothing
is drawn at random, and the same pictures give the same error. The Fréchet distance has no closed form, so a tenth of
the pictures is left out at a time. Its bias from the number of pictures is larger than its spread, and is not part of
the error.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from prunekit.evaluation.comparison import EvaluationSet, Judged
from prunekit.evaluation.metrics import (
    CMMD_SCALE,
    Kernel,
    clip_scores,
    diagonal_of,
    gaussian_distance,
    gaussian_kernel,
    polynomial_kernel,
    ranks,
    row_sums,
)

NORMAL_975 = 1.96
FRECHET_GROUPS = 10


def jackknife_errors(judged: Judged, prompts: EvaluationSet) -> dict[str, float]:
    """Return the standard error over the row's pictures of cmmd, kid, clip_score, top1 and top5.

    The jackknife does not leave out real pictures, because they are the whole data set.
    """
    count = prompts.num_names
    rank = ranks(judged.embedded[:count], judged.names, prompts.targets[:count])
    return {
        "cmmd": cmmd_error(prompts.real_embeddings, judged.embedded),
        "kid": kid_error(prompts.real_features, judged.features),
        "clip_score": error_of_mean(clip_scores(judged.embedded[count:], judged.texts[count:])),
        "top1": error_of_mean((rank < 1).double()),
        "top5": error_of_mean((rank < 5).double()),
    }


def cmmd_error(real: Tensor, generated: Tensor) -> float:
    """Return the jackknife error of CMMD over the generated pictures; embeddings (n, E) and (m, E)."""
    real, generated = (normalize(values.double(), dim=1) for values in (real, generated))
    return CMMD_SCALE * _jackknife(_distance_without_one(gaussian_kernel, real, generated, unbiased=False))


def kid_error(real: Tensor, generated: Tensor) -> float:
    """Return the jackknife error of KID over the generated pictures; features (n, F) and (m, F)."""
    return _jackknife(_distance_without_one(polynomial_kernel, real.double(), generated.double(), unbiased=True))


def frechet_error(mean: Tensor, covariance: Tensor, generated: Tensor) -> float:
    """Return the delete-a-tenth jackknife error of the Fréchet distance over the generated pictures' features (m, F).

    mean, covariance: of the real features, (F,) and (F, F).
    """
    generated = generated.double()
    group = torch.arange(len(generated)) % FRECHET_GROUPS
    left = [generated[group != index] for index in range(FRECHET_GROUPS)]
    values = [gaussian_distance(mean, covariance, part.mean(dim=0), torch.atleast_2d(part.T.cov())) for part in left]
    return _jackknife(torch.tensor(values, dtype=torch.float64))


def _distance_without_one(kernel: Kernel, real: Tensor, generated: Tensor, unbiased: bool) -> Tensor:
    """Return the squared MMD without each generated picture in turn, (m,), less the constant term of real pictures."""
    count, rows, diagonal = len(generated), row_sums(kernel, generated, generated), diagonal_of(kernel, generated)
    rest = rows.sum() - 2 * rows + diagonal  # sum of the kernel without row and column i
    pairs = (count - 1) * (count - 2) if unbiased else (count - 1) ** 2
    generated_term = (rest - (diagonal.sum() - diagonal) * unbiased) / pairs
    columns = row_sums(kernel, generated, real) / len(real)
    return generated_term - 2 * (columns.sum() - columns) / (count - 1)


def _jackknife(without_one: Tensor) -> float:
    count = len(without_one)
    return float(((count - 1) / count * (without_one - without_one.mean()).square().sum()).sqrt())


def error_of_mean(values: Tensor) -> float:
    """Return the standard error of the mean of values (n,); NaN for a single value."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


@dataclass(frozen=True)
class Estimate:
    """A figure over the seeds of a row: mean, standard deviation (None for one seed), and a 95 % interval."""

    mean: float
    deviation: float | None
    low: float
    high: float
    count: int

    def overlaps(self, other: "Estimate") -> bool:
        """Return whether the two intervals overlap, so that the figures cannot be told apart."""
        return self.low <= other.high and other.low <= self.high


def estimate(values: Sequence[float], errors: Sequence[float]) -> Estimate:
    """Return the estimate of a figure from its values and its jackknife errors, one of each per seed.

    Several seeds: mean ± t·s/√n (Student, 1908). One seed: ± 1.96 jackknife errors, so only the spread of the pictures.
    """
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Estimate(mean, None, mean - NORMAL_975 * errors[0], mean + NORMAL_975 * errors[0], 1)
    from scipy.stats import t

    deviation = statistics.stdev(values)
    half = float(t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
    return Estimate(mean, deviation, mean - half, mean + half, count)
