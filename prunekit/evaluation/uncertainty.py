"""How far a row's figures would move with other pictures (jackknife errors) or other seeds (Student's t intervals).

The jackknife leaves out one picture at a time (Efron and Stein, 1981). These figures have it in closed form, so nothing
is drawn and the same pictures give the same error. The Fréchet distance has none here: no closed form, and its bias
with the number of pictures is larger than its spread.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from prunekit.evaluation.comparison import EvaluationSet, Judged
from prunekit.evaluation.metrics import CMMD_SCALE, gaussian_kernel, polynomial_kernel, ranks

NORMAL_975 = 1.96


def jackknife_errors(judged: Judged, prompts: EvaluationSet) -> dict[str, float]:
    """Return the standard error over the row's pictures of cmmd, kid, clip_score, top1 and top5.

    The real pictures are the whole data set: they are not left out.
    """
    count = prompts.num_names
    generated, real = (normalize(x.double(), dim=1) for x in (judged.embedded, prompts.real_embeddings))
    features, real_features = judged.features.double(), prompts.real_features.double()
    rank = ranks(judged.embedded[:count], judged.names, prompts.targets[:count])
    cosine = cosine_similarity(judged.embedded[count:].double(), judged.texts[count:].double(), dim=1)
    cmmd = _distance_without_one(
        gaussian_kernel(generated, generated), gaussian_kernel(real, generated), unbiased=False
    )
    kid = _distance_without_one(
        polynomial_kernel(features, features), polynomial_kernel(real_features, features), unbiased=True
    )
    return {
        "cmmd": CMMD_SCALE * _jackknife(cmmd),
        "kid": _jackknife(kid),
        "clip_score": 100 * _error_of_mean(cosine.clamp(min=0)),
        "top1": _error_of_mean((rank < 1).double()),
        "top5": _error_of_mean((rank < 5).double()),
    }


def _distance_without_one(within: Tensor, between: Tensor, unbiased: bool) -> Tensor:
    """Squared MMD without each generated picture in turn, (m,), but for the real pictures' own term.

    within: (m, m) kernel of the generated pictures; between: (n, m), real against generated.
    """
    count, diagonal = len(within), within.diagonal()
    rest = within.sum() - 2 * within.sum(1) + diagonal  # of the kernel without row and column i
    pairs = (count - 1) * (count - 2) if unbiased else (count - 1) ** 2
    own = (rest - (diagonal.sum() - diagonal) * unbiased) / pairs
    columns = between.mean(0)
    return own - 2 * (columns.sum() - columns) / (count - 1)


def _jackknife(without_one: Tensor) -> float:
    count = len(without_one)
    return float(((count - 1) / count * (without_one - without_one.mean()).square().sum()).sqrt())


def _error_of_mean(values: Tensor) -> float:
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
        """Whether the intervals have a point in common, so that the two cannot be told apart."""
        return self.low <= other.high and other.low <= self.high


def estimate(values: Sequence[float], errors: Sequence[float]) -> Estimate:
    """Return the estimate of a figure from its value, and its jackknife error, at every seed.

    Several seeds: mean ± t·s/√n (Student, 1908). One seed: ± 1.96 jackknife errors, so the pictures' spread alone.
    """
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Estimate(mean, None, mean - NORMAL_975 * errors[0], mean + NORMAL_975 * errors[0], 1)
    from scipy.stats import t

    deviation = statistics.stdev(values)
    half = float(t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
    return Estimate(mean, deviation, mean - half, mean + half, count)
