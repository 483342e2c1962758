"""Fairness of a comparison (law 7): rows may differ only in declared axes, or the table is refused."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from prunekit.jobs.compare.cell_runner import DISTILLATION
from prunekit.jobs.recipe import with_added
from prunekit.report.comparison_table import EQUAL_COMPUTE, EQUAL_TOTAL, Result
from prunekit.runtime.errors import UserError

DISTILLED = tuple(f"fine_tune.{name}" for name in DISTILLATION)
WEIGHTS = ("fine_tune.snr_gamma", "fine_tune.snr_form")  # weights of the denoising error; a method may have its own
AXES = {"seed"}


def refuse_unfair(cells: Sequence[Result]) -> None:
    """Raise ValueError with the field's name if two cells differ in a field that is not an axis of the comparison.

    Axes are the method with its own settings, the budget, the seed, distillation and the protocol. All else must be
    equal: model, data, resolution, convention, fine-tuning and evaluation.
    """
    seen: dict[tuple[str, Hashable], tuple[Any, Result]] = {}
    for cell in cells:
        for field, value in with_added(cell["fields"]).items():
            group = _group(field, cell)
            if group is None:
                continue
            earlier, other = seen.setdefault((field, group), (value, cell))
            if earlier != value:
                raise UserError(
                    f"{title(other)} and {title(cell)} cannot share a table: {field} is {earlier!r} there and "
                    f"{value!r} here; run one of them again with equal settings, or make the setting an axis"
                )


def title(cell: Result) -> str:
    """Return the name of a cell in messages."""
    return " ".join(str(part) for part in cell["cell"].values() if part != "")


def _group(field: str, cell: Result) -> Hashable | None:
    """Return the set of cells among which `field` must be equal; None if it may differ."""
    axes = cell["cell"]
    if field in AXES:
        return None
    if field.startswith(("method.", "recover.", "fine_tune.lora", "fine_tune.deltas")):
        return axes["method"]
    rules: dict[str, Callable[[], Hashable | None]] = {
        "prune.budget": lambda: axes["budget"],
        "prune.depth": lambda: None if cell["variant"] is not None else "",  # a family has its own unit space
        "fine_tune.shared_backbone": lambda: axes["method"],
        "fine_tune.experts_per_step": lambda: axes["method"],
        "fine_tune.steps": lambda: {EQUAL_COMPUTE: cell["models"], EQUAL_TOTAL: None}.get(axes["protocol"], ""),
        "fine_tune.warmup_steps": lambda: None if axes["protocol"] == EQUAL_TOTAL else "",
    }
    if field in rules:
        return rules[field]()
    if field in DISTILLED:
        return None if cell["distillation"] == "own" else cell["distillation"]
    if field in WEIGHTS:
        return None if cell["distillation"] == "own" else ""
    return ""
