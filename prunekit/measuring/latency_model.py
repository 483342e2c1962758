"""A cost model whose budget is time: an Architecture's time is the sum of its layers' times and a constant rest.

A layer with more units can be faster: a kernel for an odd width may take twice as long as a kernel for the next even
width. So every number of units has two times. Predictions use the measured time of this number. The solver uses the
least time of this or any larger number, which never falls as units are added, so that it can meet a budget unit by
unit, as in MACs. When the solver ends, the two times agree, because units that cost nothing more are always put back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from diffusers import ModelMixin
from torch import Tensor

from prunekit.core.cost import CostModel, Polynomial
from prunekit.core.counting import LayerCost
from prunekit.core.space import Architecture, UnitGroup, UnitSpace
from prunekit.measuring.latency_table import LatencyTable
from prunekit.runtime.errors import UserError


class LatencyModel(CostModel):
    """A CostModel that budgets time in place of MACs: `total` is in nanoseconds.

    MACs, parameters and `ratio` are as in CostModel. A removed layer takes no time; the rest of a call, which belongs
    to no layer, is constant. `total` uses the solver's times. A group's soft gates count as the number of units that
    they add up to, interpolated linearly between whole numbers, so `expected_total` is differentiable and equals the
    integer where all gates are 0 or 1.

    cost: CostModel that gives the space, latent size, text length and convention.
    table: latency table of the same model; UserError if a layer is missing in it, or has another number of units there.
    step_of: step in units by which a group's width changes, if widths are aligned; only whole steps and the full width
        count.
    """

    unit = "time"

    def __init__(
        self,
        model: ModelMixin,
        cost: CostModel,
        table: LatencyTable,
        step_of: Callable[[UnitGroup], int] = lambda group: 1,
    ):
        super().__init__(model, cost.space, cost.sample_size, cost.text_length, cost.convention)
        self.table = table
        self._predicted = _Curves(cost.space, table)
        self._counted = _Curves(cost.space, table, step_of)
        self._dense = self._predicted.count(cost.space.full().values)

    @property
    def dense_total(self) -> int:
        """Nanoseconds of the dense model's call."""
        return self._dense

    @property
    def _budgeted(self) -> Polynomial:
        return self._counted

    def latency_ratio(self, architecture: Architecture) -> float:
        """Return the predicted time of a boolean Architecture as a fraction of the dense model's time."""
        return self._predicted.count(self._vector(architecture)) / self.dense_total


class _Curves(Polynomial):
    """A Polynomial in which a width group costs the time that the table's curve gives for its number of units.

    step_of: if given, the curve is the least time of this or a larger number of units, among whole steps.
    """

    def __init__(self, space: UnitSpace, table: LatencyTable, step_of: Callable[[UnitGroup], int] | None = None):
        groups = {group.path: group for group in space.width_groups}
        for path, group in groups.items():
            known = table.layers[path].units if path in table.layers else 0
            if known != group.size:
                raise UserError(
                    f"the latency table has {known} units at {path}, the model {group.size}: measure the table again"
                )
        curves = {path: layer.curve() for path, layer in table.layers.items()}
        fixed = [("", "rest", 0, LayerCost(always=table.rest))]
        for path, layer in table.layers.items():
            always = 0 if path in groups else curves[path][-1]
            fixed.append((path, layer.kind, layer.units, LayerCost(always=always)))
        super().__init__(space, fixed)
        self.curves = [curves[group.path] for group in space.width_groups]
        if step_of is not None:
            self.curves = [
                least_from(curve, step_of(group)) for curve, group in zip(self.curves, space.width_groups, strict=True)
            ]

    def width_cost(self, group: int, kept: int) -> int:
        return self.curves[group][kept]

    def inside(self, widths: Tensor, tables: dict[str, Tensor]) -> Tensor:
        kept = (widths @ tables["members"]).double()  # (B, G)
        low = kept.detach().long().clamp(max=tables["last"])  # (B, G)
        index = torch.arange(kept.shape[1], device=kept.device)
        before, after = tables["curves"][index, low], tables["curves"][index, low + 1]
        return (before + (kept - low) * (after - before)) @ tables["in_chain"]

    def extra_tables(self, in_chain: Tensor) -> dict[str, Tensor]:
        most = max(map(len, self.curves), default=1)
        padded = [curve + [curve[-1]] * (most - len(curve)) for curve in self.curves]
        return {
            "in_chain": in_chain,
            "curves": torch.tensor(padded, dtype=torch.float64).reshape(len(padded), most),
            "last": torch.tensor([len(curve) - 2 for curve in self.curves], dtype=torch.long),
        }


def least_from(curve: list[int], step: int) -> list[int]:
    """Return, for every number of units, the least time of this or a larger number, whole steps or full width only."""
    full = len(curve) - 1
    allowed = [value if kept % step == 0 or kept == full else curve[full] for kept, value in enumerate(curve)]
    return list(itertools.accumulate(reversed(allowed), min))[::-1]
