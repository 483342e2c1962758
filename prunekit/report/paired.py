"""Differences between rows of a comparison, paired by seed, with Holm's correction over all tested differences.

Rows of one seed share prompts, noise and data order, so paired differences separate more rows than intervals per row.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.05  # significance level
TESTED = ("agreement", "kid")  # figures that are tested for every pair of rows that a recipe names


@dataclass(frozen=True)
class Difference:
    """The mean over the seeds of one row's figure minus another's."""

    mean: float
    low: float  # ends of the 95 % interval, Student's t
    high: float
    p: float  # two-sided p-value of the hypothesis of no difference
    count: int  # number of seeds


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """Return the difference of two rows' figures, paired by seed; None if they share fewer than two seeds.

    first, second: each row's figure by seed.
    """
    from scipy.stats import t

    seeds = sorted(first.keys() & second.keys())
    if len(seeds) < 2:
        return None
    values = [first[seed] - second[seed] for seed in seeds]
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    if error == 0:
        return Difference(mean, mean, mean, float(mean == 0), len(values))
    half = float(t.ppf(0.975, len(values) - 1)) * error
    p = 2 * float(t.sf(abs(mean) / error, len(values) - 1))
    return Difference(mean, mean - half, mean + half, p, len(values))


def holm(ps: Sequence[float]) -> list[float]:
    """Return p-values corrected for multiple tests (Holm, 1979), in the given order; none gets smaller or exceeds 1."""
    order = sorted(range(len(ps)), key=ps.__getitem__)
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted
