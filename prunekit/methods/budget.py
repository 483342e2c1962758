"""Select Architectures from scores: the cost is within the budget, and no removed unit would still fit.

Units are removed in the order of their scores, lowest first, until the cost is at or below the budget. Then every
removed unit that still fits is put back, highest score first. All comparisons are between integers: MACs, or
nanoseconds if the budget is a latency.

The order is global: units of all layers compete by their scores, so that every method meets the same budget in the same
way. APTP's Norm row is global too. Diff-Pruning removes the same fraction of every layer's channels instead
(torch-pruning's MagnitudePruner with its default global_pruning=False). So Taylor-SP here can spare the layers that
matter, and the published method cannot.

A score is the importance of a whole unit and is not divided by the unit's cost. The resource loss has already weighed
APTP's logits against MACs. A method that needs importance per MAC must divide its scores itself.

A removed layer keeps the bits of the units under it, which are the units that it would come back with. Units under a
removed layer cost nothing and are not put back by themselves. They become candidates again once the layer is back.

With `align`, every width group is first reduced to an aligned number of channels. Units are then put back in steps: a
step is the best removed units of a group that make the next aligned number. The rank of a step is the score of its
middle unit, so that at a common threshold numbers are rounded to the nearest step. As without `align`, only the order
of scores matters. A group that keeps no unit or all units counts as aligned.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunekit.core.cost import CostModel
from prunekit.core.space import Architecture, UnitGroup, UnitSpace
from prunekit.runtime.errors import UserError
from prunekit.runtime.tensors import read_tensors, write_tensors

ALIGNMENTS = (8, 16, 32, 64)  # channels


@dataclass
class Scores:
    """The importance of every unit of a space, (D,); low scores are removed first. May hold +-inf, not NaN.

    info: JSON values that are saved with the scores, e.g. the method and its settings.
    """

    space: UnitSpace
    values: Tensor  # (D,)
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.values = self.values.detach().cpu()
        _check(self.values[None], self.space)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file with a tensor per group, by its name, and the space and `info` in the header."""
        tensors = {group.name: self.values[self.space.slice(group)].clone() for group in self.space.groups}
        return write_tensors(path, "scores", tensors, {"space": self.space.to_dict(), "info": self.info})

    @classmethod
    def load(cls, path: str | Path, space: UnitSpace | None = None) -> "Scores":
        """Read a file that `save` wrote; raise ValueError if `space` is given and the file has another space."""
        tensors, metadata = read_tensors(path, "scores")
        saved = UnitSpace.from_dict(metadata["space"])
        if space is not None and (difference := space.difference(saved)):
            raise UserError(f"{path} holds scores of another space: {difference}")
        return cls(saved, torch.cat([tensors[group.name] for group in saved.groups]), metadata["info"])


def select(scores: Scores | Tensor, cost: CostModel, budget: float, align: int | None = None) -> Architecture:
    """Return the Architecture of the highest scores within the budget.

    Args:
        scores: `Scores`, or a tensor (D,), over the cost model's space.
        cost: cost model of the MACs, at its resolution and by its convention; or a LatencyModel, for time.
        budget: share of the dense UNet's cost, above 0 and below 1.
        align: 8, 16, 32 or 64; every width group keeps a multiple of that many channels, or none, or all (see
            `unaligned` for what can remain). Unset: any number.

    Returns:
        A boolean Architecture whose cost is at most budget x dense, and to which no removed unit (with `align`, no
        step of units) can be added within the budget. Units with equal scores are removed in the order of the space.
        The same input gives the same output.

    Raises:
        ValueError: scores of another space or with NaN; a budget outside (0, 1), or below the cost with every unit
            removed (the message has that cost); another `align`.

    """
    if isinstance(scores, Scores):
        if difference := cost.space.difference(scores.space):
            raise UserError(f"the scores belong to a different space than the cost model: {difference}")
        scores = scores.values
    return _select(scores[None], [1], cost, budget, align)[0]


def select_mixture(
    logits: Tensor, counts: Sequence[int] | Tensor, cost: CostModel, budget: float, align: int | None = None
) -> list[Architecture]:
    """Return the Architectures of N experts whose mean cost over the training prompts is within the budget.

    All experts share one threshold: the lowest at which sum_i counts_i x cost_i is at most
    budget x dense x sum_i counts_i. A higher threshold costs less, so one pass over the sorted logits, at O(1) each,
    finds the same threshold as a bisection. Then units are put back, the highest logit of all experts first, until no
    removed unit of any expert fits. An expert without prompts does not count in the mean; it meets the budget by
    itself, as in `select`.

    Args:
        logits: (N, D), scores of the units per expert, such as the experts' codes.
        counts: (N,), the number of training prompts that inference routing sends to each expert.
        cost: as in `select`.
        budget: share of the dense UNet's cost, above 0 and below 1.
        align: as in `select`.

    Raises:
        ValueError: as in `select`; counts that are not N whole numbers of 0 or more, with at least one above 0.

    """
    counts = counts.tolist() if isinstance(counts, Tensor) else list(counts)
    if len(counts) != len(logits) or any(n != int(n) or n < 0 for n in counts) or not any(counts):
        raise UserError(
            f"counts must be one whole number of prompts per expert ({len(logits)} of them), not all of them 0; "
            f"got {counts}"
        )
    used = [expert for expert, count in enumerate(counts) if count]
    chosen = _select(logits[used], [int(counts[expert]) for expert in used], cost, budget, align)
    mixture = dict(zip(used, chosen, strict=True))
    return [mixture.get(expert) or select(logits[expert], cost, budget, align) for expert in range(len(logits))]


def budget_limit(cost: CostModel, budget: float, prompts: int = 1) -> int:
    """Return the largest total cost of `prompts` prompts within the budget, in MACs or nanoseconds as `cost.total`.

    The budget is read as the exact decimal of the setting.

    Raises:
        ValueError: a budget outside (0, 1), or below the smallest cost in the space.

    """
    if not 0 < budget < 1:
        raise UserError(f"budget={budget}: must be above 0 and below 1, as a fraction of the dense cost")
    dense = cost.dense_total
    limit = math.floor(Fraction(repr(float(budget))) * dense * prompts)
    floor = cost.total(Architecture(cost.space, torch.zeros(cost.space.size, dtype=torch.bool)))
    if floor * prompts > limit:
        lowest = math.ceil(10_000 * Fraction(floor, dense)) / 10_000
        raise UserError(
            f"budget {budget} cannot be met: with every unit removed this UNet still costs {lowest} of the "
            f"dense one. Choose a budget of at least {lowest}, or a space with more units (depth='all', fewer "
            "excludes)"
        )
    return limit


def budget_of(total: int, dense_total: int) -> float:
    """Return the smallest budget with 14 decimals whose `budget_limit` allows a total cost."""
    scale = 10**14
    return float(Fraction(-(-total * scale // dense_total), scale))


def unit_step(group: UnitGroup, align: int | None) -> int:
    """Return the step of a width group's size, in units: the fewest units with a multiple of `align` channels.

    If the group has too few units for a step, `align` is halved until it has enough.
    """
    if align is None or group.is_depth:
        return 1
    while (step := align // math.gcd(align, group.channels)) > group.size:
        align //= 2
    return step


def unaligned(architecture: Architecture, align: int) -> dict[str, int]:
    """Return, by name, the number of kept channels of the width groups that do not keep a multiple of `align`.

    After `select` with the same `align`, these groups are either kept whole and unaligned in the dense UNet already, or
    too narrow for `align`. Groups under a removed layer are not included.
    """
    kept = {
        group.name: len(architecture.kept(group.name)) * group.channels for group in architecture.space.width_groups
    }
    return {name: channels for name, channels in kept.items() if channels % align}


def _check(scores: Tensor, space: UnitSpace) -> None:
    if scores.ndim != 2 or scores.shape[1] != space.size:
        raise UserError(f"scores must have one value for each of {space.size} units; got {tuple(scores.shape)}")
    if scores.isnan().any():
        names = sorted({group.name for group in space.groups if scores[:, space.slice(group)].isnan().any()})
        raise UserError(f"scores must not be NaN; they are in {', '.join(names[:3])} ({len(names)} groups)")


def _select(scores: Tensor, counts: list[int], cost: CostModel, budget: float, align: int | None) -> list[Architecture]:
    """Return the Architectures of `select_mixture` for scores (N, D) of experts that all have prompts."""
    space, scores = cost.space, scores.detach().cpu()
    _check(scores, space)
    if align is not None and align not in ALIGNMENTS:
        raise UserError(f"align={align!r}: choose one of {', '.join(map(str, ALIGNMENTS))}, or leave it unset")
    mixture = _Mixture(scores, counts, cost, budget_limit(cost, budget, sum(counts)), align)
    for position in scores.T.flatten().argsort(stable=True).tolist():  # ties: by unit, then by expert
        if mixture.total <= mixture.limit:
            break
        unit, expert = divmod(position, len(counts))
        mixture.flip(expert, unit)
    mixture.round_down()
    mixture.put_back()
    return [Architecture(space, torch.tensor(running.bits)) for running in mixture.running]


class _Mixture:
    """N architectures, which start with all units, and their total cost over all prompts."""

    def __init__(self, scores: Tensor, counts: list[int], cost: CostModel, limit: int, align: int | None):
        self.space, self.counts, self.limit = cost.space, counts, limit
        self.scores: list[list[float]] = scores.tolist()  # (N, D)
        self.running = [cost.running(cost.space.full()) for _ in counts]
        self.total = sum(counts) * cost.dense_total
        self.steps = [unit_step(group, align) for group in self.space.groups]

    @cached_property
    def over(self) -> list[list[int]]:
        """For each group, the positions of the depth units whose removal also removes the group."""
        depths = (self.space.depth_units_over(group.path, group.kind) for group in self.space.groups)
        return [[self.space.num_width + depth for depth in above] for above in depths]

    def flip(self, expert: int, unit: int) -> None:
        self.total += self.counts[expert] * self.running[expert].flip(unit)

    def round_down(self) -> None:
        """Remove the units with the lowest scores until every width group has whole steps; a complete group stays."""
        for expert, scores in enumerate(self.scores):
            for group, step in zip(self.space.groups, self.steps, strict=True):
                kept = [unit for unit in self._units(group) if self.running[expert].bits[unit]]
                excess = len(kept) % step if len(kept) < group.size else 0
                for unit in sorted(kept, key=lambda unit: (scores[unit], unit))[:excess]:
                    self.flip(expert, unit)

    def put_back(self) -> None:
        """Put back every removed step of units that fits, highest score first.

        A step that does not fit never fits later, because adding units does not lower the cost of a group. The later
        steps of its group are dropped with it, because they can only follow it.
        """
        candidates = [entry for expert in range(len(self.counts)) for entry in self._missing(expert)]
        heapq.heapify(candidates)
        while candidates:
            _, _, expert, group, units = heapq.heappop(candidates)
            for unit in units:
                self.flip(expert, unit)
            if self.total > self.limit:
                for unit in units:
                    self.flip(expert, unit)
                continue
            if (entry := self._next_step(expert, group)) is not None:
                heapq.heappush(candidates, entry)
            if self.space.groups[group].is_depth:  # a layer is back: the missing units under it are candidates again
                for entry in self._missing(expert, under=units[0]):
                    heapq.heappush(candidates, entry)

    def _missing(self, expert: int, under: int | None = None) -> list["_Step"]:
        bits = self.running[expert].bits
        steps = [
            self._next_step(expert, group)
            for group, over in enumerate(self.over)
            if (under is None or under in over) and all(bits[depth] for depth in over)
        ]
        return [step for step in steps if step is not None]

    def _next_step(self, expert: int, index: int) -> "_Step | None":
        """Return the step of units that `put_back` tries next in a group; None if the group is complete."""
        bits, scores = self.running[expert].bits, self.scores[expert]
        missing = [unit for unit in self._units(self.space.groups[index]) if not bits[unit]]
        if not missing:
            return None
        missing.sort(key=lambda unit: (-scores[unit], unit))
        units = missing[: self.steps[index]]
        middle = units[(len(units) - 1) // 2]
        return -scores[middle], middle, expert, index, units

    def _units(self, group: UnitGroup) -> range:
        return range(self.space.size)[self.space.slice(group)]


_Step = tuple[float, int, int, int, list[int]]  # (minus the score, unit of this score, expert, group, units)
