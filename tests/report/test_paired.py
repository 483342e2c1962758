"""Paired differences and Holm's correction agree with their definitions and with scipy."""

import numpy as np
import pytest
from scipy.stats import ttest_rel

from prunekit.report.paired import difference, holm


def test_a_difference_is_scipys_paired_test():
    draws = np.random.default_rng(0)
    first, second = draws.normal(1.0, 0.1, 5), draws.normal(1.1, 0.1, 5)
    own = difference(dict(enumerate(first)), {**dict(enumerate(second)), 9: 3.0})
    known = ttest_rel(first, second)
    interval = known.confidence_interval(0.95)
    assert own.mean == pytest.approx((first - second).mean()) and own.count == 5
    assert (own.low, own.high, own.p) == pytest.approx((interval.low, interval.high, known.pvalue))


def test_one_seed_tells_nothing_and_equal_rows_are_inseparable():
    assert difference({0: 1.0}, {0: 2.0}) is None
    assert difference({0: 1.0, 1: 2.0}, {2: 1.0, 3: 2.0}) is None
    assert difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).p == 1
    assert difference({0: 1.0, 1: 2.0}, {0: 0.5, 1: 1.5}).p == 0


def test_holms_correction():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # Holm's example
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []
