"""Gates and slicing of norms whose statistics are over all units, and of depthwise convolutions."""

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from unets import relative_error

from prunekit.core import cutting
from prunekit.core.gates import normalized_over
from prunekit.export import plain_cutting

WIDTH = 12
NORMS = {"torch": nn.RMSNorm, "diffusers": RMSNorm}


def norm_of(kind, eps=1e-5, dtype=torch.float32):
    norm = NORMS[kind](WIDTH, eps=eps)
    nn.init.normal_(norm.weight, mean=1.0)
    return norm.to(dtype)


def drawn(seed=0, batch=2, dtype=torch.float32):
    return torch.randn(batch, 3, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(list(NORMS)), st.sets(st.integers(0, WIDTH - 1), min_size=1), st.integers(0, 99))
def test_a_gated_norm_is_a_shorter_one(kind, kept, seed):
    torch.manual_seed(seed)
    norm, x, kept = norm_of(kind), drawn(seed), sorted(kept)
    gates = torch.zeros(1, WIDTH)
    gates[:, kept] = 1
    gated = normalized_over(gates, x, norm(x), norm.eps)[..., kept]
    cutting.keep_each(norm, kept)
    assert relative_error(norm(x[..., kept]), gated) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", NORMS)
def test_open_gates_change_no_bit_and_rows_are_samples(kind, dtype):
    norm, x = norm_of(kind, dtype=dtype), drawn(dtype=dtype)
    output = norm(x)
    assert torch.equal(normalized_over(torch.ones(1, WIDTH), x, output, norm.eps), output)
    soft = torch.rand(2, WIDTH)
    both = normalized_over(soft, x, output, norm.eps)
    assert both.dtype == dtype
    for row in range(2):
        one = normalized_over(soft[row : row + 1], x[row : row + 1], output[row : row + 1], norm.eps)
        assert torch.equal(one, both[row : row + 1])


def test_no_eps_is_torchs():
    x = 1e-3 * drawn()
    gates = torch.ones(1, WIDTH)
    gates[:, 5:] = 0
    norm = norm_of("torch", eps=None)
    gated = normalized_over(gates, x, norm(x), norm.eps)[..., :5]
    cutting.keep_each(norm, list(range(5)))
    assert relative_error(norm(x[..., :5]), gated) <= 1e-6


@pytest.mark.parametrize("level", [0.0, 1e-30, 1e-8])
def test_closed_gates_leave_values_and_gradients_finite(level):
    norm, x = norm_of("torch"), drawn()
    gates = torch.full((1, WIDTH), level, requires_grad=True)
    output = normalized_over(gates, x, norm(x), norm.eps)
    (gradient,) = torch.autograd.grad((output * gates).sum(), gates)
    assert output.isfinite().all() and gradient.isfinite().all()


def layers():
    torch.manual_seed(0)
    depthwise = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
    with_bias = RMSNorm(WIDTH, eps=1e-5, bias=True)
    frozen = norm_of("torch").requires_grad_(False)
    nn.init.normal_(with_bias.bias)
    return {"depthwise": depthwise, "torch": frozen, "diffusers": norm_of("diffusers"), "bias": with_bias}


@pytest.mark.parametrize("kind", layers())
def test_cuts_keep_channels_and_are_those_of_class_files(kind):
    kept = [1, 4, 5, 11]
    whole, ours, plain = (layers()[kind] for _ in range(3))
    cutting.keep_each(ours, kept)
    plain_cutting.keep_each(plain, kept)
    assert repr(ours) == repr(plain)
    for (name, value), (_, other) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        before = getattr(whole, name)
        assert torch.equal(value, other) and torch.equal(value, before[kept]), name
        assert value.requires_grad == other.requires_grad == before.requires_grad
    if kind == "depthwise":
        x = torch.randn(2, WIDTH, 5, 4)
        assert ours.groups == ours.in_channels == len(kept)
        assert relative_error(ours(x[:, kept]), whole(x)[:, kept]) <= 1e-6
