"""Closed forms agree with the jackknife (one picture left out at a time), and intervals agree with scipy."""

import math
import statistics

import pytest
import torch
from torch.nn.functional import normalize

from prunekit.evaluation.comparison import EvaluationSet, Judged
from prunekit.evaluation.metrics import clip_score, cmmd, kid, retrieval
from prunekit.evaluation.uncertainty import estimate, jackknife_errors


def brute_force(figure, count):
    values = [figure([j for j in range(count) if j != i]) for i in range(count)]
    mean = statistics.fmean(values)
    return math.sqrt((count - 1) / count * sum((value - mean) ** 2 for value in values))


def test_jackknife_equals_leaving_one_out():
    source = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    real_features, real = draw(30, 6), normalize(draw(30, 5), dim=1)
    features, embedded, texts, names = draw(20, 6) + 0.4, normalize(draw(20, 5), dim=1), draw(20, 5), draw(30, 5)
    texts, names = normalize(texts + embedded, dim=1), normalize(names, dim=1)
    targets = torch.randperm(30, generator=source)[:20]
    prompts = EvaluationSet(None, [""] * 20, targets, 12, [], torch.zeros(20, 1), real_features, real)
    errors = jackknife_errors(Judged(features, embedded, texts, names), prompts)
    assert errors["cmmd"] == pytest.approx(brute_force(lambda rows: cmmd(real, embedded[rows]), 20), rel=1e-6)
    assert errors["kid"] == pytest.approx(brute_force(lambda rows: kid(real_features, features[rows]), 20), rel=1e-6)
    captions = brute_force(lambda rows: clip_score(embedded[12:][rows], texts[12:][rows]), 8)
    assert errors["clip_score"] == pytest.approx(captions, rel=1e-6)
    for k in (1, 5):
        expected = brute_force(lambda rows, k=k: retrieval(embedded[rows], names, targets[rows], k), 12)
        assert errors[f"top{k}"] == pytest.approx(expected, rel=1e-6)


def test_estimate_of_seeds_and_of_one():
    several = estimate([1.0, 2.0, 4.0], [9.0, 9.0, 9.0])
    half = 4.302652729911275 * statistics.stdev([1, 2, 4]) / math.sqrt(3)
    assert several.mean == pytest.approx(7 / 3) and several.deviation == pytest.approx(statistics.stdev([1, 2, 4]))
    assert several.high - several.mean == pytest.approx(half)
    one = estimate([1.0], [0.5])
    assert one.deviation is None and (one.low, one.high) == pytest.approx((0.02, 1.98))
    assert several.overlaps(one) and one.overlaps(several) and not estimate([5.0], [0.1]).overlaps(one)
