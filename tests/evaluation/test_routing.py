"""Routing reports of routers with known assignments."""

import pytest
import torch
from small_data import encoded_for, stub
from unets import build

import prunekit as pk
from prunekit.evaluation.agreement import agreement, data_samples, predictions
from prunekit.evaluation.comparison import Candidate
from prunekit.evaluation.routing import (
    _controls,
    _difficulty,
    _entropy,
    _paraphrases,
    error_matrix,
    routing_lines,
    routing_report,
)
from prunekit.methods.router import Router


@pytest.fixture(scope="module")
def world():
    unet = build("sd2")
    data, space = encoded_for(unet, num=24), pk.discover(unet)
    architectures = [space.random(keep, seed=seed) for seed, keep in enumerate((0.9, 0.6, 0.3))]
    cost = pk.CostModel(unet, space)
    weight = torch.randn(3, data.prompts.shape[1], generator=torch.Generator().manual_seed(0))
    students = [pk.slice_unet(unet, architecture) for architecture in architectures]
    macs = [cost.macs(architecture) for architecture in architectures]
    candidate = Candidate("aptp", students, macs, [1, 1, 1], Router(weight, torch.zeros(3)))
    samples = data_samples(data, stub(unet), 0, 16)
    return candidate, data, samples, predictions(unet, samples)


def test_the_matrix_is_the_agreement_of_every_expert(world):
    candidate, _, samples, reference = world
    errors = error_matrix(candidate, samples, reference)
    for index, unet in enumerate(candidate.models):
        assert float(errors[:, index].mean()) == pytest.approx(agreement(reference, unet, samples), rel=1e-6)


def test_a_report_has_every_part_in_order(world):
    candidate, data, samples, reference = world
    report = routing_report(candidate, data, samples, reference)
    controls = report["controls"]
    assert sum(report["shares"]) == pytest.approx(1) and 0 < report["entropy"] <= 1
    assert controls["oracle"] <= controls["routed"] and controls["oracle"] <= controls["best_single"]
    assert controls["gain_interval"][0] <= controls["gain"] <= controls["gain_interval"][1]
    assert controls["best_single_expert"] == 0 and controls["best_single_macs_over_mean"] > 1  # the least pruned expert
    assert report["samples"] == 16 and len(report["words"]) == 3
    text = "\n".join(routing_lines("aptp", report))
    assert "where the router sends them" in text and "| 2 |" in text
    assert report == routing_report(candidate, data, samples, reference)


def test_a_perfect_router_beats_its_controls_and_a_random_one_does_not():
    draw = torch.Generator().manual_seed(0)
    errors = torch.rand(400, 4, generator=draw, dtype=torch.float64)
    even, macs = torch.full((4,), 0.25, dtype=torch.float64), [1, 2, 3, 4]
    perfect = _controls(errors, errors.argmin(1), even, macs, 0)
    assert perfect["routed"] == perfect["oracle"] and perfect["gain_interval"][0] > 0.3
    blind = _controls(errors, torch.randint(4, (400,), generator=draw), even, macs, 0)
    assert blind["gain_interval"][0] < 0 < blind["gain_interval"][1]


def test_hard_prompts_on_large_experts_correlate():
    errors = torch.rand(300, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    by_difficulty = (errors.mean(1).argsort().argsort() * 3 // 300).long()
    assert _difficulty(errors, by_difficulty, [10, 20, 30])["correlation"] > 0.9
    assert _difficulty(errors, 2 - by_difficulty, [10, 20, 30])["correlation"] < -0.9
    assert _difficulty(errors, by_difficulty, [10, 10, 10]) == {"correlation": None, "p": None}


def test_paraphrases_and_entropy():
    images, shares = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert _paraphrases(images, torch.tensor([0, 0, 1, 1, 0, 1]), shares) == {"pairs": 4, "agree": 0.5, "chance": 0.5}
    assert _paraphrases(torch.arange(3), torch.tensor([0, 1, 0]), shares)["agree"] is None
    assert _entropy(shares) == pytest.approx(1)
    assert _entropy(torch.tensor([1.0, 0.0], dtype=torch.float64)) == 0
