"""From scores to Architectures that meet a budget exactly, and leave nothing out that would still fit.

Units go in the order of their scores, lowest first, until the cost is at or below the budget; then every removed
unit that still fits is put back, highest score first. All comparisons are between integers, in MACs.

A score is the importance of the whole unit, so it is not divided by what the unit costs: the methods whose published
results we reproduce rank this way (Norm and Taylor globally, APTP by one threshold on its logits, which its resource
loss has already weighed against MACs). A method that wants importance per MAC divides before it hands over.

A removed layer keeps the bits of what lies under it: they say with which units it would come back. Units under a
removed layer cost nothing and are not put back by themselves; they become candidates again once the layer is back.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunekit.cost import CostModel
from prunekit.methods.storage import read_tensors, write_tensors
from prunekit.units import Architecture, UnitSpace


@dataclass
class Scores:
    """The importance of every unit of a space, (D,): the higher, the longer it stays. May hold +-inf, not NaN.

    info: JSON values kept with them, e.g. the method and its settings.
    """

    space: UnitSpace
    values: Tensor  # (D,)
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.values = self.values.detach().cpu()
        _check(self.values[None], self.space)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file: a tensor per group, by its name; the space and `info` in its header."""
        tensors = {group.name: self.values[self.space.slice(group)].clone() for group in self.space.groups}
        return write_tensors(path, "scores", tensors, {"space": self.space.to_dict(), "info": self.info})

    @classmethod
    def load(cls, path: str | Path, space: UnitSpace | None = None) -> "Scores":
        """Read what `save` wrote; over `space`, where one is given, which must be the same (else a ValueError)."""
        tensors, metadata = read_tensors(path, "scores")
        own = UnitSpace.from_dict(metadata["space"])
        if space is not None and (difference := space.difference(own)):
            raise ValueError(f"{path} holds scores of another space: {difference}")
        return cls(own, torch.cat([tensors[group.name] for group in own.groups]), metadata["info"])


def select(scores: Scores | Tensor, cost: CostModel, budget: float) -> Architecture:
    """The Architecture of the highest scores within the budget.

    Args:
        scores: `Scores`, or a tensor (D,), over the cost model's space.
        cost: counts the MACs, at its resolution and by its convention.
        budget: share of the dense UNet's MACs, above 0 and below 1.

    Returns:
        A boolean Architecture whose cost is at most budget x dense, and to which no removed unit can be added
        without exceeding that. Equal scores go in the order of the space. The same input gives the same output.

    Raises:
        ValueError: scores of another space or with NaN; a budget outside (0, 1), or below what is left when every
            unit is removed (the message has that floor).

    """
    if isinstance(scores, Scores):
        if difference := cost.space.difference(scores.space):
            raise ValueError(f"the scores belong to another space than the cost model: {difference}")
        scores = scores.values
    return _select(scores[None], [1], cost, budget)[0]


def select_mixture(
    logits: Tensor, counts: Sequence[int] | Tensor, cost: CostModel, budget: float
) -> list[Architecture]:
    """The Architectures of N experts whose mean cost over the training prompts is within the budget.

    One threshold is common to all experts: the lowest at which sum_i counts_i x cost_i is at most
    budget x dense x sum_i counts_i. The cost falls with the threshold, so passing the logits in order, at O(1) each,
    finds exactly what a bisection would. Then units are put back, the highest logit of all experts first, until no
    removed unit of any expert fits. An expert to which no prompt is routed has no part in the mean:
    it meets the budget by itself, as in `select`.

    Args:
        logits: (N, D), the experts' codes.
        counts: (N,), how many training prompts inference routing sends to each expert.
        cost: counts the MACs.
        budget: share of the dense UNet's MACs, above 0 and below 1.

    Raises:
        ValueError: as in `select`; counts that are not N whole numbers, not negative, at least one above 0.

    """
    counts = counts.tolist() if isinstance(counts, Tensor) else list(counts)
    if len(counts) != len(logits) or any(n != int(n) or n < 0 for n in counts) or not any(counts):
        raise ValueError(
            f"counts must be one whole number of prompts per expert ({len(logits)} of them), not all 0; got {counts}"
        )
    used = [expert for expert, count in enumerate(counts) if count]
    chosen = _select(logits[used], [int(counts[expert]) for expert in used], cost, budget)
    mixture = dict(zip(used, chosen, strict=True))
    return [mixture.get(expert) or select(logits[expert], cost, budget) for expert in range(len(logits))]


def budget_macs(cost: CostModel, budget: float, prompts: int = 1) -> int:
    """The most MACs that `prompts` prompts may cost together. The budget is read as the decimal that was written.

    Raises:
        ValueError: a budget outside (0, 1), or below the floor of the space.

    """
    if not 0 < budget < 1:
        raise ValueError(f"a budget is a share of the dense cost, above 0 and below 1; got {budget}")
    dense = cost.dense_macs
    limit = math.floor(Fraction(repr(float(budget))) * dense * prompts)
    floor = cost.macs(Architecture(cost.space, torch.zeros(cost.space.size, dtype=torch.bool)))
    if floor * prompts > limit:
        lowest = math.ceil(10_000 * Fraction(floor, dense)) / 10_000
        raise ValueError(
            f"budget {budget} cannot be met: with every unit removed this UNet still costs {lowest} of the dense one. "
            f"Choose a budget of at least {lowest}, or a space with more units (depth='all', fewer excludes)"
        )
    return limit


def budget_of(macs: int, dense_macs: int) -> float:
    """The smallest budget of 14 decimals under which an architecture of that many MACs fits, by `budget_macs`."""
    scale = 10**14
    return float(Fraction(-(-macs * scale // dense_macs), scale))


def _check(scores: Tensor, space: UnitSpace) -> None:
    if scores.ndim != 2 or scores.shape[1] != space.size:
        raise ValueError(f"scores must have one value for each of {space.size} units; got {tuple(scores.shape)}")
    if scores.isnan().any():
        names = sorted({group.name for group in space.groups if scores[:, space.slice(group)].isnan().any()})
        raise ValueError(f"scores must not be NaN; they are in {', '.join(names[:3])} ({len(names)} groups)")


def _select(scores: Tensor, counts: list[int], cost: CostModel, budget: float) -> list[Architecture]:
    """`select_mixture` for experts (N, D) that all have prompts."""
    space, scores = cost.space, scores.detach().cpu()
    _check(scores, space)
    mixture = _Mixture(scores, counts, cost, budget_macs(cost, budget, sum(counts)))
    for position in scores.T.flatten().argsort(stable=True).tolist():  # of equal ones by unit, then by expert
        if mixture.total <= mixture.limit:
            break
        unit, expert = divmod(position, len(counts))
        mixture.flip(expert, unit)
    mixture.put_back()
    return [Architecture(space, torch.tensor(running.bits)) for running in mixture.running]


class _Mixture:
    """N architectures, all complete at first, and the MACs that they take for all prompts together."""

    def __init__(self, scores: Tensor, counts: list[int], cost: CostModel, limit: int):
        self.space, self.counts, self.limit = cost.space, counts, limit
        self.scores: list[list[float]] = scores.tolist()  # (N, D)
        self.running = [cost.running(cost.space.full()) for _ in counts]
        self.total = sum(counts) * cost.dense_macs
        self.over: list[list[int]] = []  # per unit, the depth units whose removal removes it
        for group in self.space.groups:
            depths = self.space.depth_units_over(group.path, group.kind)
            self.over += [[self.space.num_width + depth for depth in depths]] * group.size

    def flip(self, expert: int, unit: int) -> None:
        self.total += self.counts[expert] * self.running[expert].flip(unit)

    def put_back(self) -> None:
        """Put back every removed unit that fits, highest score first. One that does not fit once never will."""
        candidates = [entry for expert in range(len(self.counts)) for entry in self._missing(expert)]
        heapq.heapify(candidates)
        while candidates:
            _, unit, expert = heapq.heappop(candidates)
            added = self.counts[expert] * self.running[expert].change(unit)
            if self.total + added <= self.limit:
                self.flip(expert, unit)
                if unit >= self.space.num_width:  # a layer is back: so may be what is missing under it
                    for entry in self._missing(expert, under=unit):
                        heapq.heappush(candidates, entry)

    def _missing(self, expert: int, under: int | None = None) -> list[tuple[float, int, int]]:
        bits, scores = self.running[expert].bits, self.scores[expert]
        return [
            (-scores[unit], unit, expert)
            for unit, over in enumerate(self.over)
            if not bits[unit] and (under is None or under in over) and all(bits[depth] for depth in over)
        ]
