import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode
from unets import SHAPES, build

from prunekit import Architecture, CostModel, discover, slice_unet
from prunekit.runtime.errors import UserError

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "unet_macs.json").read_text())["models"]


def golden_unet(name):
    with torch.device("meta"):
        return UNet2DConditionModel(**GOLDENS[name]["config"])


@pytest.mark.parametrize("name", ["sd-1.4", "sd-2.1@768"])
@pytest.mark.parametrize("convention", ["exact", "conv_linear", "aptp"])
def test_published_models(name, convention):
    unet, golden = golden_unet(name), GOLDENS[name]
    space = discover(unet)
    cost = CostModel(unet, space, golden["latent"], convention=convention)
    assert cost.dense_macs == golden[convention] == cost.macs(space.full())
    assert cost.dense_params == golden["params"] == cost.params(space.full())
    assert cost.ratio(space.full()) == 1.0


def test_at_256_pixels():
    unet = golden_unet("sd-2.1@768")
    assert CostModel(unet, discover(unet), 32).dense_macs == GOLDENS["sd-2.1@256"]["exact"]


BKSDM_BASE = [f"down_blocks.{i}.resnets.1" for i in range(4)] + [f"down_blocks.{i}.attentions.1" for i in range(3)]
BKSDM_BASE += [f"up_blocks.{i}.resnets.1" for i in range(4)] + [f"up_blocks.{i}.attentions.1" for i in (1, 2, 3)]
BKSDM_MID = ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"]


@pytest.mark.parametrize(
    ("name", "removed"),
    [
        ("bk-sdm-base", BKSDM_BASE),
        ("bk-sdm-small", BKSDM_BASE + BKSDM_MID),
        ("bk-sdm-tiny", [*BKSDM_BASE, "down_blocks.3"]),
    ],
)
def test_bksdm_as_architectures(name, removed):
    unet, golden = golden_unet("sd-1.4"), GOLDENS[name]
    space = discover(unet, depth="blocks")
    gone = [group for group in space.depth_groups if group.path in removed]
    assert len(gone) == len(removed)
    values = torch.ones(space.size, dtype=torch.bool)
    values[[space.slice(group).start for group in gone]] = False
    architecture = Architecture(space, values)
    for convention in ("exact", "conv_linear"):
        assert CostModel(unet, space, 64, convention=convention).macs(architecture) == golden[convention]
    assert CostModel(unet, space, 64).params(architecture) == golden["params"]
    pruned = slice_unet(unet, architecture)
    assert sum(parameter.numel() for parameter in pruned.parameters()) == golden["params"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("convention", ["exact", "conv_linear", "aptp"])
def test_soft_equals_the_integer_at_the_corners_and_is_linear_in_every_gate(shape, convention):
    unet = build(shape, "meta")
    space = discover(unet, depth="blocks")
    cost = CostModel(unet, space, (9, 12), 5, convention)
    architectures = [space.random(keep, seed) for seed, keep in enumerate((0.1, 0.5, 0.9, 1.0, 0.0))]
    corners = torch.stack([architecture.values for architecture in architectures]).double()
    assert cost.macs(corners).tolist() == [cost.macs(architecture) for architecture in architectures]
    assert torch.equal(cost.expected_macs(corners), cost.macs(corners))
    assert torch.equal(cost.expected_macs(corners.bool()), cost.macs(corners))
    assert torch.equal(cost.expected_total(corners), cost.macs(corners))
    assert cost.params(corners).tolist() == [cost.params(architecture) for architecture in architectures]
    soft = torch.rand(space.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for unit in range(0, space.size, 97):
        ends = soft.repeat(3, 1)
        ends[0, unit], ends[1, unit] = 0, 1
        low, high, between = cost.macs(ends).tolist()
        assert between == pytest.approx(low + soft[unit].item() * (high - low), rel=1e-12)


@pytest.mark.parametrize("convention", ["exact", "aptp"])
def test_soft_is_the_expectation_over_independent_coins(convention):
    unet = build("sd2", "meta")
    space = discover(unet, depth="all", include="down_blocks.0.*")
    cost = CostModel(unet, space, 8, 5, convention)
    soft = torch.full((space.size,), 0.0, dtype=torch.float64)
    soft[[0, 1, 8, space.size - 4, space.size - 3]] = torch.tensor([0.3, 0.6, 0.5, 0.9, 0.2], dtype=torch.float64)
    open_units = soft.nonzero().flatten().tolist()
    expectation = 0.0
    for corner in range(2 ** len(open_units)):
        bits, probability = torch.zeros(space.size, dtype=torch.bool), 1.0
        for place, unit in enumerate(open_units):
            bits[unit] = bool(corner >> place & 1)
            probability *= soft[unit].item() if bits[unit] else 1 - soft[unit].item()
        expectation += probability * cost.macs(bits)
    assert cost.macs(soft).item() == pytest.approx(expectation, rel=1e-12)


def test_a_soft_architecture_has_no_exact_cost():
    unet = build("sd1", "meta")
    space = discover(unet)
    cost = CostModel(unet, space, 8, 5)
    soft = Architecture(space, torch.rand(space.size))
    for exact in (cost.macs, cost.params, cost.ratio, cost.total):
        with pytest.raises(UserError, match="threshold"):
            exact(soft)
    assert cost.expected_macs(soft.values).shape == ()


def test_gradient():
    unet = build("sdxl", "meta")
    space = discover(unet, depth="all")
    for convention in ("exact", "aptp"):
        cost = CostModel(unet, space, 8, 5, convention)
        gates = torch.rand(3, space.size, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(cost.ratio(gates).sum(), gates)
        for unit in range(0, space.size, 131):
            moved = gates.detach().repeat(2, 1, 1)
            moved[0, :, unit], moved[1, :, unit] = 0, 1
            low, high = cost.ratio(moved)
            assert torch.allclose(gradient[:, unit], high - low, rtol=1e-8, atol=1e-15)
    assert cost.ratio(gates.float()).dtype == torch.float32


@pytest.mark.parametrize("convention", ["exact", "aptp"])
def test_running_cost(convention):
    unet = build("sd1", "meta")
    space = discover(unet, depth="blocks")
    cost = CostModel(unet, space, (9, 8), 3, convention)
    architecture = space.random(0.5, seed=2)
    running = cost.running(architecture)
    marginal = cost.marginal(architecture)
    order = torch.randperm(space.size, generator=torch.Generator().manual_seed(0)).tolist()
    for unit in order[:40]:
        flipped = architecture.values.clone()
        flipped[unit] ^= True
        assert marginal[unit] == cost.macs(flipped) - cost.macs(architecture)
    for step, unit in enumerate(order):
        change = running.change(unit)
        assert running.flip(unit) == change
        if step % 50 == 0:
            assert running.total == cost.macs(torch.tensor(running.bits))
    for unit in order:
        running.flip(unit)
    assert running.total == cost.macs(architecture)
    assert running.bits == architecture.values.tolist()


def test_a_space_that_leaves_groups_out_keeps_their_cost():
    unet = build("sd2", "meta")
    part, whole = discover(unet, include="up_blocks.*"), discover(unet)
    assert CostModel(unet, part, 8).dense_macs == CostModel(unet, whole, 8).dense_macs
    nothing = torch.zeros(part.size, dtype=torch.bool)
    same = torch.ones(whole.size, dtype=torch.bool)
    for group in part.groups:
        same[whole.slice(group)] = False
    assert CostModel(unet, part, 8).macs(nothing) == CostModel(unet, whole, 8).macs(same)


def test_on_a_pruned_unet():
    unet = build("sdxl", "meta")
    space = discover(unet, depth="all")
    architecture = space.random(0.6, seed=5)
    pruned = slice_unet(unet, architecture)
    for convention in ("exact", "conv_linear", "aptp"):
        remaining = CostModel(pruned, discover(pruned), (9, 7), 5, convention)
        dense = CostModel(unet, space, (9, 7), 5, convention)
        assert remaining.dense_macs == dense.macs(architecture)
        assert remaining.dense_params == dense.params(architecture)


def test_a_space_without_units():
    unet = build("sd2", "meta")
    whole = discover(unet, depth="none")
    emptied = slice_unet(unet, Architecture(whole, torch.zeros(whole.size, dtype=torch.bool)))
    space = discover(emptied, depth="none")
    assert space.size == 0
    cost = CostModel(emptied, space, 8, 5)
    assert cost.macs(torch.rand(3, 0, dtype=torch.float64)).tolist() == [cost.dense_macs] * 3
    assert cost.dense_macs == CostModel(unet, whole, 8, 5).macs(Architecture(whole, torch.zeros(whole.size) > 0))
    depths = discover(emptied, depth="all")
    assert depths.num_width == 0
    soft = torch.ones(depths.size, dtype=torch.float64)
    assert CostModel(emptied, depths, 8, 5).macs(soft).item() == cost.dense_macs


def test_refusals():
    unet = build("sd2", "meta")
    space = discover(unet)
    with pytest.raises(ValueError, match="choose one of exact, conv_linear, aptp"):
        CostModel(unet, space, 8, convention="exakt")
    with pytest.raises(ValueError, match="pass the side of the latent"):
        CostModel(unet, space, (8, 8, 8))
    with pytest.raises(
        ValueError, match=r"'resnet:down_blocks\.0\.resnets\.0' has 8 units of 4 channels in this model"
    ):
        CostModel(build("sd2", "meta", norm_num_groups=8), discover(build("sd2", "meta", norm_num_groups=4)), 8)
    with pytest.raises(ValueError, match=f"shape \\(..., {space.size}\\)"):
        CostModel(unet, space, 8).macs(torch.rand(3, 5))
    with pytest.raises(ValueError, match="belongs to another space"):
        CostModel(unet, space, 8).macs(discover(unet, depth="all").full())
    assert CostModel(unet, space).sample_size == (16, 16)


class Operations(TorchDispatchMode):
    """Counts torch operations within the context."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_soft_costs_of_many_architectures_take_the_operations_of_one():
    unet = golden_unet("sd-2.1@768")
    cost, counts = CostModel(unet, discover(unet), 96), []
    cost.macs(torch.rand(1, 1620))  # the first call computes values that later calls reuse
    for batch in (2, 1000):
        gates = torch.rand(batch, 1620, requires_grad=True)
        with Operations() as operations:
            cost.macs(gates).sum().backward()
        counts.append(operations.count)
    assert counts[0] == counts[1] < 100


def test_sd21_on_meta_is_small():
    code = (
        "import json, re, sys, torch; from pathlib import Path; from diffusers import UNet2DConditionModel\n"
        "import prunekit as pk\n"
        "with torch.device('meta'): unet = UNet2DConditionModel(**json.loads(sys.argv[1]))\n"
        "cost = pk.CostModel(unet, pk.discover(unet), 96)\n"
        "loaded = [name for name in ('thop', 'fvcore') if name in sys.modules]\n"
        # ru_maxrss is not usable, as a process inherits it from its parent
        "peak = int(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])\n"
        "print(json.dumps([cost.dense_macs, peak, loaded]))"
    )
    config = json.dumps(GOLDENS["sd-2.1@768"]["config"])
    result = subprocess.run([sys.executable, "-c", code, config], capture_output=True, text=True, check=True)
    macs, kibibytes, loaded = json.loads(result.stdout)
    assert macs == GOLDENS["sd-2.1@768"]["exact"]
    assert kibibytes <= 700 * 1024
    assert loaded == []
