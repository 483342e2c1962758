"""Conversion of logits to soft gates: several kinds of noise, and layer gates that are independent or ordered."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunekit.methods.relaxation import DepthGates, Noise, Relaxation, drop_order, gumbel, gumbel_sigmoid, logistic
from prunekit.runtime.randomness import generator

NUM_WIDTH, NUM_DEPTH = 20, 14


def logits(rows=3, seed=0):
    return torch.randn(rows, NUM_WIDTH + NUM_DEPTH, generator=generator(seed, "logits"), dtype=torch.float64)


def test_gumbel_sigmoid_equals_the_paper():
    values, noise = logits(), logits(seed=1)
    expected = 1 / (1 + np.exp(-(values.numpy() + noise.numpy()) / 0.4))
    np.testing.assert_allclose(gumbel_sigmoid(values, 0.4, noise).numpy(), expected, rtol=0, atol=1e-12)
    assert torch.equal(gumbel_sigmoid(values, 0.4), torch.sigmoid(values / 0.4))


@pytest.mark.parametrize(
    ("draw", "mean", "variance"), [(gumbel, 0.5772, math.pi**2 / 6), (logistic, 0.0, math.pi**2 / 3)]
)
def test_noise(draw, mean, variance):
    noise = draw((200_000,), torch.Generator().manual_seed(0))
    assert torch.equal(noise, draw((200_000,), torch.Generator().manual_seed(0)))
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(mean, abs=0.01)
    assert noise.var().item() == pytest.approx(variance, rel=0.02)


@pytest.mark.parametrize("noise", get_args(Noise))
@pytest.mark.parametrize("depth", get_args(DepthGates))
def test_gates_are_differentiable_shares(noise, depth):
    values = logits().requires_grad_()
    relaxation = Relaxation(NUM_WIDTH, noise, depth, offset=0.0)
    gates = relaxation.gates(values, generator(0, "draw"))
    assert gates.shape == values.shape and bool(((gates >= 0) & (gates <= 1)).all())
    assert torch.equal(gates, relaxation.gates(values, generator(0, "draw")))
    gates.sum().backward()
    assert values.grad.isfinite().all() and int((values.grad != 0).sum()) > values.numel() / 3
    clipped = int(((gates == 0) | (gates == 1)).sum())
    assert clipped if noise == "hard_concrete" else not clipped


@pytest.mark.parametrize(("noise", "share"), [("gumbel", 1 - math.exp(-1)), ("logistic", 0.5), ("hard_concrete", 0.5)])
def test_a_coin_at_logit_zero(noise, share):
    gates = Relaxation(50_000, noise, offset=0.0).gates(torch.zeros(1, 50_000), generator(0, "coin"))
    assert float((gates > 0.5).double().mean()) == pytest.approx(share, abs=0.01)


def test_the_published_order_of_layers():
    published = [-1, -2, 0, 1, -3, -4, 2, 3, -5, -6, 4, 5, -7, 6]  # in its config; removed last comes first
    assert drop_order(14)[::-1] == [layer % 14 for layer in published]


@given(st.integers(0, 40))
def test_an_order_has_every_layer_once(count):
    assert sorted(drop_order(count)) == list(range(count))


@given(st.integers(0, 10_000))
def test_cumulative_layers_are_surer_outwards(seed):
    scores = Relaxation(NUM_WIDTH, depth="cumulative").scores(logits(seed=seed) * 5)
    assert torch.equal(scores[:, :NUM_WIDTH], (logits(seed=seed) * 5)[:, :NUM_WIDTH])
    ordered = scores[:, NUM_WIDTH:][:, drop_order(NUM_DEPTH)]
    assert (ordered.diff(dim=1) >= 0).all() and scores.isfinite().all()


def test_cumulative_gates_equal_the_published_formula():
    values = logits()
    p = values[:, NUM_WIDTH:].softmax(1)
    inner = torch.empty_like(p)
    stay = drop_order(NUM_DEPTH)[::-1]
    # The published order of operations is: softmax over positions, cumulative sum, flip. Position k is layer stay[k].
    positions = values[:, NUM_WIDTH:][:, stay].flip(1).softmax(1).cumsum(1).flip(1).clamp(1e-6, 1 - 1e-6)
    inner[:, stay] = torch.sigmoid((positions.logit() + 3) / 0.4)
    gates = Relaxation(NUM_WIDTH, depth="cumulative").gates(values)
    torch.testing.assert_close(gates[:, NUM_WIDTH:], inner)
