"""Laws 1 and 2 of the core: masked equals sliced, and costs are exact."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from unets import SHAPES, build, inputs, relative_error, with_empty_groups

from prunekit import Architecture, CostModel, discover, gated, slice_unet

POLICIES = ("aptp", "all", "blocks", "none")
SIZES = (16, (9, 12), (11, 8), (10, 14), 8)
TEXT_LENGTHS = (1, 77, 154)
KEEPS = (0.2, 0.5, 0.8, 0.95)
UNETS = {}
ARCHITECTURES = (3, pytest.param(int(os.environ.get("PRUNEKIT_ARCHITECTURES", "24")), marks=pytest.mark.long))


def unet_of(shape, device="cpu"):
    if (shape, device) not in UNETS:
        UNETS[shape, device] = build(shape, device)
    return UNETS[shape, device]


def flops(unet, size, text_length):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(**inputs(unet, size=size, text_length=text_length))
    return counter.get_total_flops()


def masked_error(unet, architecture, arguments):
    """Return (relative error of gated against sliced, the sliced UNet, the FLOPs of its run).

    Attention uses plain matrix products, so that the FLOPs equal those on the meta device and one run tests both laws.
    """
    pruned = slice_unet(unet, architecture)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with gated(unet, architecture.space) as gates:
            gates.set(architecture)
            masked = unet(**arguments).sample
        with FlopCounterMode(display=False) as counter:
            sliced = pruned(**arguments).sample
    return relative_error(masked, sliced), pruned, counter.get_total_flops()


@pytest.mark.parametrize("count", ARCHITECTURES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_random_architectures(shape, policy, count):
    unet = unet_of(shape)
    space, worst = discover(unet, depth=policy), 0.0
    for seed in range(count):
        architecture = space.random(keep=KEEPS[seed % 4], seed=seed)
        if seed % 3 == 0:
            architecture = with_empty_groups(architecture, seed)
        size, text_length = SIZES[seed % 5], TEXT_LENGTHS[seed % 3]
        arguments = inputs(unet, size=size, text_length=text_length, seed=seed)
        error, pruned, counted = masked_error(unet, architecture, arguments)
        worst = max(worst, error)
        cost = CostModel(unet, architecture.space, size, text_length)
        assert cost.params(architecture) == sum(parameter.numel() for parameter in pruned.parameters())
        assert 2 * cost.macs(architecture) == counted, seed
    assert worst <= 1e-5


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(
    shape=st.sampled_from(SHAPES),
    policy=st.sampled_from(POLICIES),
    keep=st.floats(0, 1),
    seed=st.integers(0, 10**6),
    size=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    text_length=st.sampled_from(TEXT_LENGTHS),
)
def test_masked_is_sliced(shape, policy, keep, seed, size, text_length):
    unet = unet_of(shape)
    architecture = discover(unet, depth=policy).random(keep, seed)
    error, *_ = masked_error(unet, architecture, inputs(unet, 2, size, text_length, seed))
    assert error <= 1e-5


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    shape=st.sampled_from(SHAPES),
    policy=st.sampled_from(POLICIES),
    keep=st.floats(0, 1),
    seed=st.integers(0, 10**6),
    size=st.tuples(st.integers(1, 99), st.integers(1, 99)),
    text_length=st.integers(1, 200),
)
def test_a_cost_is_exact(shape, policy, keep, seed, size, text_length):
    unet = unet_of(shape, "meta")
    space = discover(unet, depth=policy)
    architecture = with_empty_groups(space.random(keep, seed), seed)
    counted = flops(slice_unet(unet, architecture), size, text_length)
    assert 2 * CostModel(unet, space, size, text_length).macs(architecture) == counted


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_everything_and_nothing(shape, kept):
    unet = unet_of(shape)
    space = discover(unet, depth="none")
    architecture = Architecture(space, torch.full((space.size,), bool(kept)))
    arguments = inputs(unet, 1, (9, 12))
    error, pruned, counted = masked_error(unet, architecture, arguments)
    assert error <= 1e-6
    assert counted == flops(pruned.to("meta"), (9, 12), 7)
    assert 2 * CostModel(unet, space, (9, 12), 7).macs(architecture) == counted


@pytest.mark.parametrize("shape", SHAPES)
def test_every_depth_unit_alone(shape):
    unet = unet_of(shape)
    space = discover(unet, depth="blocks")
    units = range(space.num_width, space.size)
    for unit in {*units[::4], space.size - 1}:
        values = torch.ones(space.size, dtype=torch.bool)
        values[unit] = False
        error, *_ = masked_error(unet, Architecture(space, values), inputs(unet, size=(10, 7)))
        assert error <= 1e-5, space.groups[unit - space.num_width]


@pytest.mark.parametrize("shape", SHAPES)
def test_soft_rows_equal_each_row_alone(shape):
    unet = unet_of(shape)
    space = discover(unet, depth="blocks")
    soft = torch.rand(2, space.size, generator=torch.Generator().manual_seed(3))
    soft[1] = (soft[1] > 0.4).float()
    rows = torch.tensor([1, 0, 1])
    arguments = inputs(unet, 3, (9, 10))
    with torch.no_grad(), gated(unet, space) as gates:
        gates.set(soft, rows)
        together = unet(**arguments).sample
        for sample, row in enumerate(rows.tolist()):
            alone = {key: value[sample : sample + 1] for key, value in arguments.items() if torch.is_tensor(value)}
            if "added_cond_kwargs" in arguments:
                added = arguments["added_cond_kwargs"]
                alone["added_cond_kwargs"] = {key: value[sample : sample + 1] for key, value in added.items()}
            gates.set(soft[row])
            assert relative_error(together[sample : sample + 1], unet(**alone).sample) <= 5e-6
