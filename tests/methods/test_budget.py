from fractions import Fraction
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from unets import build

from prunekit import Architecture, CostModel, UnitGroup, discover
from prunekit.methods import Scores, select, select_mixture
from prunekit.methods.budget import ALIGNMENTS, budget_limit, unaligned, unit_step

SPACES = {
    "sd1": ("sd1", "aptp", None, "exact"),
    "sd2-blocks": ("sd2", "blocks", None, "exact"),
    "sdxl": ("sdxl", "all", None, "exact"),
    "aptp-counter": ("sd2", "all", None, "aptp"),  # a group's first unit costs more than the others
    "one-block": ("sdxl", "all", "up_blocks.1.*", "aptp"),
}
seeds = st.integers(0, 2**31)
spaces = st.sampled_from(list(SPACES))
kinds = st.sampled_from(["normal", "ties", "equal", "depth first", "depth last"])
alignments = st.sampled_from([None, *ALIGNMENTS])


@cache
def cost_of(name: str) -> CostModel:
    shape, depth, include, convention = SPACES[name]
    unet = build(shape, device="meta")
    return CostModel(unet, discover(unet, depth, include), 16, 7, convention)


def draw(cost, kind, seed, rows=1):
    scores = torch.randn(rows, cost.space.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "ties":
        scores = scores.round()
    elif kind == "equal":
        scores = scores * 0
    elif kind.startswith("depth"):
        scores[:, cost.space.num_width :] += -10 if kind == "depth first" else 10
    return scores


def floor(cost):
    return Fraction(cost.macs(Architecture(cost.space, torch.zeros(cost.space.size).bool())), cost.dense_macs)


def a_budget(cost, share):
    lowest = float(floor(cost)) + 1e-6
    return round(lowest + share * (0.999 - lowest), 6)


def live_and_missing(architecture):
    """Yield removed units that are not inside a removed layer."""
    space = architecture.space
    for group in space.groups:
        over = [space.num_width + depth for depth in space.depth_units_over(group.path, group.kind)]
        if all(architecture.values[over]):
            positions = range(space.size)[space.slice(group)]
            yield from (position for position in positions if not architecture.values[position])


def flipped(architecture, *positions):
    values = architecture.values.clone()
    values[list(positions)] ^= True
    return Architecture(architecture.space, values)


def missing_steps(architecture, align):
    """Yield, per group outside removed layers, the removed positions and how many of them are restored together."""
    space, missing = architecture.space, set(live_and_missing(architecture))
    for group in space.groups:
        own = [position for position in range(space.size)[space.slice(group)] if position in missing]
        if own:
            yield own, min(unit_step(group, align), len(own))


def assert_full(architectures, counts, cost, budget, align=None):
    """Check, by recounting all costs: within the budget, aligned, and no removed unit fits back in."""
    limit = Fraction(repr(budget)) * cost.dense_macs * sum(counts)
    total = sum(n * cost.macs(a) for n, a in zip(counts, architectures, strict=True))
    assert total <= limit
    for count, architecture in zip(counts, architectures, strict=True):
        before = cost.macs(architecture)
        for positions, step in missing_steps(architecture, align):
            for start in range(0, len(positions) - step + 1, step):
                more = flipped(architecture, *positions[start : start + step])
                assert total + count * (cost.macs(more) - before) > limit, positions
        for group in architecture.space.width_groups:
            kept = int(architecture[group.name].sum())
            assert kept == group.size or kept % unit_step(group, align) == 0
        if align is not None:
            for name, channels in unaligned(architecture, align).items():
                group = architecture.space.group(name)
                narrow = all(units * group.channels % align for units in range(1, group.size + 1))
                assert channels % align and (channels == group.size * group.channels or narrow)


@settings(max_examples=30, deadline=None)
@given(spaces, kinds, st.floats(0, 1), seeds, alignments)
def test_select_meets_the_budget_and_leaves_nothing_out(name, kind, share, seed, align):
    cost = cost_of(name)
    scores, budget = draw(cost, kind, seed)[0], a_budget(cost, share)
    architecture = select(scores, cost, budget, align)
    assert_full([architecture], [1], cost, budget, align)
    again = select(Scores(cost.space, scores.clone()), cost, budget, align)
    assert torch.equal(again.values, architecture.values)


@settings(max_examples=15, deadline=None)
@given(
    spaces,
    kinds,
    st.floats(0, 1),
    seeds,
    st.lists(st.integers(0, 5000), min_size=1, max_size=4).filter(any),
    alignments,
)
def test_mixture_meets_the_budget_and_leaves_nothing_out(name, kind, share, seed, counts, align):
    cost = cost_of(name)
    logits, budget = draw(cost, kind, seed, len(counts)), a_budget(cost, share)
    experts = select_mixture(logits, counts, cost, budget, align)
    used = [i for i, count in enumerate(counts) if count]
    assert_full([experts[i] for i in used], [counts[i] for i in used], cost, budget, align)
    for i, count in enumerate(counts):
        if not count:
            assert torch.equal(experts[i].values, select(logits[i], cost, budget, align).values)
    again = select_mixture(logits, torch.tensor(counts), cost, budget, align)
    assert all(torch.equal(a.values, b.values) for a, b in zip(experts, again, strict=True))


def rounded_down(architecture, scores, align):
    """Remove the lowest-scored units of groups that are neither complete nor aligned, until they are aligned."""
    space, values = architecture.space, architecture.values.clone()
    for group in space.width_groups:
        part = space.slice(group)
        kept = [(scores[unit].item(), unit) for unit in range(space.size)[part] if values[unit]]
        excess = len(kept) % unit_step(group, align) if len(kept) < group.size else 0
        values[[unit for _, unit in sorted(kept)[:excess]]] = False
    return Architecture(space, values)


def plain_mixture(logits, counts, cost, budget, align):
    """Apply the rule literally: bisect one threshold, round down, then repeatedly restore the best units that fit."""
    limit = Fraction(repr(budget)) * cost.dense_macs * sum(counts)

    def total(experts):
        return sum(n * cost.macs(a) for n, a in zip(counts, experts, strict=True))

    levels = [float("-inf"), *logits.flatten().sort().values.tolist()]
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        fits = total([Architecture(cost.space, row > levels[middle]) for row in logits]) <= limit
        low, high = (low, middle) if fits else (middle + 1, high)
    experts = [rounded_down(Architecture(cost.space, row > levels[low]), row, align) for row in logits]
    while True:
        steps = []
        for i, architecture in enumerate(experts):
            for positions, step in missing_steps(architecture, align):
                ranked = sorted((-logits[i, unit].item(), unit) for unit in positions)[:step]
                steps.append((*ranked[(step - 1) // 2], i, [unit for _, unit in ranked]))
        for _, _, i, units in sorted(steps):
            candidate = [*experts[:i], flipped(experts[i], *units), *experts[i + 1 :]]
            if total(candidate) <= limit:
                experts = candidate
                break
        else:
            return experts


@settings(max_examples=10, deadline=None)
@given(st.floats(0, 1), seeds, st.sampled_from([(1,), (3, 1), (2, 7)]), st.sampled_from([None, 8, 16]))
def test_is_the_rule_word_by_word(share, seed, counts, align):
    cost = cost_of("one-block")
    logits, budget = draw(cost, "normal", seed, len(counts)), a_budget(cost, share)
    experts = select_mixture(logits, counts, cost, budget, align)
    expected = plain_mixture(logits, counts, cost, budget, align)
    assert all(torch.equal(a.values, b.values) for a, b in zip(experts, expected, strict=True))


@settings(max_examples=15, deadline=None)
@given(spaces, st.floats(0, 1), st.floats(0, 1), seeds)
def test_what_ranks_above_the_threshold_stays_at_every_higher_budget(name, one, other, seed):
    cost = cost_of(name)
    scores = draw(cost, "normal", seed)[0]
    small, large = sorted((a_budget(cost, one), a_budget(cost, other)))
    order = scores.argsort()
    removals, values = 0, torch.ones(cost.space.size, dtype=torch.bool)
    running = cost.running(cost.space.full())
    while running.total > Fraction(repr(small)) * cost.dense_macs:
        running.flip(order[removals].item())
        values[order[removals]] = False
        removals += 1
    above = Architecture(cost.space, values)
    for budget in (small, large):
        assert not (above.values & ~select(scores, cost, budget).values).any()


def test_steps_of_stable_diffusions_widths():
    """Groups of 10, 20 and 40 channels, heads of 64; if no width is a multiple, the next lower power of two is used."""
    expected = {(10, 32): (4, 8, 16, 32), (20, 32): (2, 4, 8, 16), (40, 32): (1, 2, 4, 8), (64, 5): (1, 1, 1, 1)}
    for (channels, size), steps in expected.items():
        group = UnitGroup("resnet", "down_blocks.0.resnets.0", size, channels)
        assert tuple(unit_step(group, align) for align in ALIGNMENTS) == steps and unit_step(group, None) == 1
    narrow = UnitGroup("resnet", "down_blocks.0.resnets.0", 12, 10)  # 120 channels; 80 is the only multiple of 16
    assert unit_step(narrow, 64) == 8


def test_one_expert_is_select():
    cost = cost_of("sd2-blocks")
    scores = draw(cost, "normal", 0)
    assert select_mixture(scores, [17], cost, 0.6)[0] == select(scores[0], cost, 0.6)


def test_a_layer_comes_back_with_the_units_it_had():
    """Units inside a removed layer are not restored as long as the layer is removed."""
    cost = cost_of("sd1")
    space = cost.space
    layer = space.depth_groups[0]
    scores = torch.arange(space.size, dtype=torch.float64) + 10
    scores[space.slice(layer)] = 0
    position = space.slice(layer).start
    without = cost.macs(flipped(space.full(), position)) / cost.dense_macs
    architecture = select(scores, cost, round(without + 1e-6, 9))
    assert not architecture.values[position] and architecture.values.sum() == space.size - 1
    under = next(space.slice(group).start for group in space.width_groups if layer.removes(group.path))
    scores[under] = -1
    architecture = select(scores, cost, round(without + 1e-6, 9))
    assert not architecture.values[position] and not architecture.values[under]


def test_a_decimal_budget_is_exact():
    cost = cost_of("sd1")
    assert budget_limit(cost, 0.85) == cost.dense_macs * 85 // 100
    assert budget_limit(cost, 0.85, prompts=7) == cost.dense_macs * 85 * 7 // 100


def test_errors():
    cost, other = cost_of("sd1"), cost_of("sdxl")
    scores = draw(cost, "normal", 0)
    with pytest.raises(ValueError, match=r"still costs 0\.\d+ of the dense one.*at least 0\.\d+"):
        select(scores[0], cost, 0.001)
    lowest = select_error_floor(scores[0], cost)
    assert select(scores[0], cost, lowest).is_boolean
    for budget in (0, 1, -0.5, 85):
        with pytest.raises(ValueError, match="above 0 and below 1"):
            select(scores[0], cost, budget)
    with pytest.raises(ValueError, match="a different space"):
        select(Scores(other.space, draw(other, "normal", 0)[0]), cost, 0.8)
    with pytest.raises(ValueError, match="one value for each"):
        select(scores[0, :-1], cost, 0.8)
    with pytest.raises(ValueError, match=r"NaN.*resnet:down_blocks\.0\.resnets\.0"):
        Scores(cost.space, scores[0].index_fill(0, torch.tensor(0), float("nan")))
    with pytest.raises(ValueError, match="align=12: choose one of 8, 16, 32, 64"):
        select(scores[0], cost, 0.8, align=12)
    for counts in ([1, 2], [0], [0.5], [-1]):
        with pytest.raises(ValueError, match="whole number"):
            select_mixture(scores, counts, cost, 0.8)


def select_error_floor(scores, cost):
    with pytest.raises(ValueError) as error:
        select(scores, cost, 0.001)
    return float(str(error.value).rsplit("at least ", 1)[1].split(",")[0])


def test_infinite_scores_are_an_order_too():
    cost = cost_of("sd1")
    scores = draw(cost, "normal", 0)[0]
    scores[:3], scores[3:6] = float("inf"), float("-inf")
    values = select(scores, cost, 0.7).values
    assert values[:3].all() and not values[3:6].any()


def test_scores_round_trip(tmp_path):
    cost, other = cost_of("sd1"), cost_of("sdxl")
    scores = Scores(cost.space, draw(cost, "normal", 0)[0], {"method": "test", "order": 2})
    path = scores.save(tmp_path / "deep" / "scores.safetensors")
    loaded = Scores.load(path, cost.space)
    assert torch.equal(loaded.values, scores.values) and loaded.info == scores.info and loaded.space == cost.space
    with pytest.raises(ValueError, match="another space"):
        Scores.load(path, other.space)
    with pytest.raises(FileNotFoundError, match="no file of scores"):
        Scores.load(tmp_path / "none.safetensors")
