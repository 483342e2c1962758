"""OBS: removal costs equal those of a dense solver, the cheapest unit is removed first, refits match its updates."""

import itertools

import pytest
import torch
from small_data import encoded_for, stub
from torch import nn
from unets import build

from prunekit import discover
from prunekit.methods import OBS
from prunekit.methods.least_squares import Sums, packed
from prunekit.methods.obs import OBSSettings, Reader, removal_costs

DAMPING = 0.01
LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (40, 6), [[0, 1], [2, 3], [4, 5]]),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (40, 6), [[0, 1], [2, 3], [4, 5]]),
    "3x3": (lambda: nn.Conv2d(3, 4, 3, padding=1), (10, 3, 5, 5), [[0], [1], [2]]),
}


def reader_of(name, seed=0):
    """Return a layer's reader, its damped Σ x xᵀ with the constant in the last row, its weight W, and the sums."""
    torch.manual_seed(seed)
    make, shape, channels = LAYERS[name]
    layer, inputs = make(), torch.randn(shape)
    sums = Sums.of(layer)
    sums.add(layer, inputs, layer(inputs).detach(), torch.ones(len(inputs)))
    model = nn.ModuleDict({"layer": layer})
    damped = sums.gram.clone()
    damped.diagonal()[:-1] += DAMPING * damped.diagonal()[:-1].mean()
    return Reader.of(model, "layer", channels, sums, OBSSettings(damping=DAMPING)), damped, packed(layer), sums


def best_without(damped, weight, gone, has_bias):
    """Return half of the minimum of tr((W - W') H (W - W')ᵀ) over W' with zero rows `gone`, and W'; dense solver."""
    size = len(weight) if has_bias else len(weight) - 1
    kept = [row for row in range(size) if row not in gone]
    hessian, weight = damped[:size, :size], weight[:size]
    changed = torch.zeros_like(weight)
    changed[kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight)
    difference = weight - changed
    return float((difference * (hessian @ difference)).sum() / 2), changed


@pytest.mark.parametrize("name", LAYERS)
def test_a_removal_costs_what_a_dense_solver_says(name):
    reader, damped, weight, sums = reader_of(name)
    costs, total = reader.costs([0, 1, 2]), 0.0
    for unit, cost in enumerate(costs.tolist()):
        expected, _ = best_without(damped, weight, reader.columns[unit].tolist(), sums.has_bias)
        assert cost == pytest.approx(expected / float(sums.square), rel=1e-8)
    gone = []
    for unit in (1, 0):  # the costs of two removals add up to the optimum without both
        total += float(reader.costs([unit]))
        reader.remove(unit)
        gone += reader.columns[unit].tolist()
        expected, changed = best_without(damped, weight, gone, sums.has_bias)
        assert total == pytest.approx(expected / float(sums.square), rel=1e-8)
        rows = len(changed)
        torch.testing.assert_close(reader.weight[:rows], changed, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_the_updated_weights_are_the_ridge_regression_of_the_kept_columns(name):
    reader, _, weight, sums = reader_of(name)
    reader.remove(1)
    gone = reader.columns[1]
    start = weight.clone()
    start[gone] = 0.0
    left = torch.tensor([row for row in range(len(weight)) if row not in gone.tolist()])
    kept = Sums(sums.gram[left][:, left], sums.cross[left], sums.square, sums.weight, sums.has_bias)
    ridge = DAMPING * float(sums.gram.diagonal()[:-1].mean() / kept.gram.diagonal()[:-1].mean())
    torch.testing.assert_close(reader.weight[left], kept.solve(start[left], ridge), rtol=1e-4, atol=1e-5)


def test_the_cheapest_unit_goes_first_and_scores_rise_in_that_order():
    readers = [reader_of("linear", seed)[0] for seed in range(2)]  # as for a head that two streams share
    scores = removal_costs([reader_of("linear", seed)[0] for seed in range(2)], 3)
    left = [0, 1, 2]
    for unit in scores.argsort(stable=True).tolist():
        costs = sum(reader.costs(left) for reader in readers)
        assert costs[left.index(unit)] == costs.min()
        left.remove(unit)
        for reader in readers:
            reader.remove(unit)
    assert (scores.sort().values.diff() >= 0).all()


def test_a_unit_that_repeats_another_costs_nothing():
    layer = nn.Linear(4, 3)
    inputs = torch.randn(64, 2).repeat_interleave(2, dim=1)  # columns 0 and 1 are equal, and so are 2 and 3
    sums = Sums.of(layer)
    sums.add(layer, inputs, layer(inputs).detach(), torch.ones(64))
    model = nn.ModuleDict({"layer": layer})
    reader = Reader.of(model, "layer", [[0], [1], [2], [3]], sums, OBSSettings(damping=1e-9))
    scores = removal_costs([reader], 4).sort().values
    assert scores[1] < 1e-6 * scores[2]


@pytest.fixture(scope="module")
def world():
    torch.manual_seed(0)
    unet = build("sd2").eval()
    return unet, encoded_for(unet, num=16)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_budget_is_met_and_the_model_stays(scope, world):
    unet, data = world
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    method = OBS(budget=0.7, samples=4, batch_size=4, scope=scope, depth="aptp", precision="float32")
    result = method.prune(stub(unet), data)
    assert 0.6 < result.info.mean_ratio <= 0.7
    assert all(torch.equal(before[name], value) for name, value in unet.state_dict().items())


def test_packages_of_layers_change_nothing(world):
    unet, data = world
    settings = {"samples": 2, "batch_size": 2, "depth": "none", "precision": "float32"}
    few, many = (OBS(layers_at_once=count, **settings).score(stub(unet), data).values for count in (10, 64))
    torch.testing.assert_close(few, many, rtol=1e-6, atol=1e-12)


def test_the_paper_preset_takes_its_settings_unless_others_are_given():
    paper = OBS(preset="paper").config
    assert (paper.samples, paper.batch_size, paper.scope) == (100, 4, "layer")
    assert paper.timestep_weights == "logarithmic" and OBS(preset="paper", samples=8).config.samples == 8


@pytest.mark.long
def test_a_group_goes_in_the_order_that_exhaustive_search_confirms(world):
    """In a small group, the greedy pair costs at most 1.5 times as much as the best pair."""
    unet, data = world
    method, space = OBS(samples=16, batch_size=8, depth="none", precision="float32"), discover(unet, depth="none")
    group = min(space.width_groups, key=lambda group: (group.size < 4, group.size))

    def readers():
        return method._readers(stub(unet), [group], data)[group]

    def cost(units):
        current, total = readers(), 0.0
        for unit in units:
            total += float(sum(reader.costs([unit]) for reader in current))
            for reader in current:
                reader.remove(unit)
        return total

    scores = removal_costs(readers(), group.size)
    greedy = cost(scores.argsort(stable=True).tolist()[:2])
    best = min(cost(pair) for pair in itertools.combinations(range(group.size), 2))
    assert best <= greedy <= 1.5 * best + 1e-12
