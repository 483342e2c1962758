"""The sentence that sums up a run: the closest model, and whether the samples separate it from the next model."""

import pytest

from prunekit.evaluation.verdict import verdict

APTP_AT = "aptp at 70.0 % of the dense model's MACs has an agreement MSE of 0.0100"
DENSE = {"name": "dense", "macs_ratio": 1.0, "agreement": 0.0}
APTP = {"name": "aptp", "macs_ratio": 0.7, "agreement": 0.010}
NORM = {"name": "norm", "macs_ratio": 0.69, "agreement": 0.050}


def errors(**by_name):
    return {name: {"agreement": value} for name, value in by_name.items()}


@pytest.mark.parametrize("rows", [[DENSE, APTP, NORM], [DENSE, NORM, APTP]], ids=["in order", "last"])
def test_the_closest_model_comes_first(rows):
    sentence = verdict(rows, errors(aptp=0.001, norm=0.002))
    assert sentence.startswith(
        "aptp at 70.0 % of the dense model's MACs has an agreement MSE of 0.0100, the lowest; norm"
    )
    assert "beyond the noise of the samples (± 0.0044, one seed)." in sentence


def test_what_the_samples_do_not_separate_is_called_so():
    assert "do not separate the two (± 0.0438" in verdict([DENSE, APTP, NORM], errors(aptp=0.01, norm=0.02))


def test_without_errors_or_rows_nothing_is_claimed():
    assert verdict([DENSE, APTP, NORM], {}) == f"{APTP_AT}, the lowest; norm at 69.0 % has 0.0500."
    assert verdict([DENSE, APTP], {}) == f"{APTP_AT}."
    assert verdict([DENSE], {}) == "" and verdict([DENSE, {"name": "old", "macs_ratio": 0.7}], {}) == ""
