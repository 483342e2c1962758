"""The ridge regression of a layer equals a dense least-squares solution, for every layer kind, padding and stride."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunekit.methods.least_squares import Sums, packed, unpack

LAYERS = {
    "linear": lambda: nn.Linear(5, 4),
    "linear without bias": lambda: nn.Linear(5, 4, bias=False),
    "3x3": lambda: nn.Conv2d(3, 4, 3, padding=1),
    "3x3, no padding, stride 2": lambda: nn.Conv2d(3, 4, 3, stride=2),
    "3x3, padding and stride": lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1),
    "1x1": lambda: nn.Conv2d(3, 4, 1),
    "3x2, dilated": lambda: nn.Conv2d(3, 4, (3, 2), padding=(2, 1), dilation=(2, 1)),
}


def world(name, seed=0, count=12):
    """Return a layer, its inputs, and targets: the outputs of another layer of the same shapes, plus noise."""
    torch.manual_seed(seed)
    layer, teacher = LAYERS[name](), LAYERS[name]()
    shape = (count, 7, 5) if isinstance(layer, nn.Linear) else (count, 3, 6, 7)
    inputs = torch.randn(shape)
    outputs = teacher(inputs).detach()
    return layer, inputs, outputs + 0.1 * torch.randn_like(outputs)


def unfolded(layer, inputs, targets):
    """Return inputs (with a constant if the layer has a bias) and targets in float64, one row per position."""
    if isinstance(layer, nn.Linear):
        rows, targets = inputs.reshape(-1, inputs.shape[-1]), targets.reshape(-1, targets.shape[-1])
    else:
        options = {name: getattr(layer, name) for name in ("dilation", "padding", "stride")}
        columns = nn.functional.unfold(inputs, layer.kernel_size, **options)  # (n, c·k, p), channels first
        rows = columns.transpose(1, 2).reshape(-1, columns.shape[1])
        targets = targets.flatten(2).transpose(1, 2).reshape(-1, targets.shape[1])
    rows = rows.double()
    if layer.bias is not None:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
    return rows, targets.double()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("parts", [1, 3])
def test_the_fit_is_the_least_squares_solution(name, parts):
    layer, inputs, targets = world(name)
    sums = Sums.of(layer)
    for x, y in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
        sums.add(layer, x, y, torch.ones(len(x)))
    solution = sums.solve(packed(layer), 1e-10)
    before = sums.error(packed(layer))
    unpack(layer, solution)
    rows, wanted = unfolded(layer, inputs, targets)
    expected = torch.linalg.lstsq(rows, wanted).solution
    known = layer.weight.flatten(1).T.double()
    known = known if layer.bias is None else torch.cat([known, layer.bias[None].double()])
    assert torch.allclose(known, expected, atol=1e-5), name
    error = (rows @ expected - wanted).square().sum() / len(inputs)
    assert sums.error(packed(layer)) == pytest.approx(float(error), rel=1e-5) and float(error) < before


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(name=st.sampled_from(sorted(LAYERS)), ridge=st.floats(1e-8, 1e6), seed=st.integers(0, 50))
def test_the_error_never_increases(name, ridge, seed):
    layer, inputs, targets = world(name, seed)
    sums = Sums.of(layer)
    sums.add(layer, inputs, targets, torch.rand(len(inputs)) + 0.1)
    start = packed(layer)
    assert sums.error(sums.solve(start, ridge)) <= sums.error(start) * (1 + 1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_an_endless_ridge_keeps_the_weights(name):
    layer, inputs, targets = world(name)
    sums, start = Sums.of(layer), packed(layer)
    sums.add(layer, inputs, targets, torch.ones(len(inputs)))
    assert torch.allclose(sums.solve(start, 1e15), start, atol=1e-8)


def test_weights_count_samples():
    layer, inputs, targets = world("3x3")
    twice, weighted = Sums.of(layer), Sums.of(layer)
    weights = torch.ones(len(inputs))
    weights[:4] = 2
    twice.add(layer, torch.cat([inputs, inputs[:4]]), torch.cat([targets, targets[:4]]), torch.ones(len(inputs) + 4))
    weighted.add(layer, inputs, targets, weights)
    for ours, theirs in zip(weighted.tensors(), twice.tensors(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-4)
