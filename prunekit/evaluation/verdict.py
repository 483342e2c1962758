"""The result of a run in one sentence: which pruned model is closest to the dense one, and whether that is certain."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from prunekit.runtime.run_directory import DENSE

FIGURE = "agreement"
DEVIATIONS = 1.96  # standard errors on each side of a 95 % interval


def verdict(rows: Sequence[Mapping[str, Any]], errors: Mapping[str, Mapping[str, float]]) -> str:
    """Return a sentence on the agreement with the dense model; "" without a pruned row that has it.

    The interval of a difference takes the errors of both rows as independent. They share their samples, so it is wider
    than a paired one: what is called a difference here is one there too.

    Args:
        rows: of the table, the dense model's among them: name, macs_ratio, and the mean squared error `agreement`.
        errors: by a row's name, the standard errors of its figures over pictures and samples.

    """
    pruned = [row for row in rows if row["name"] != DENSE and isinstance(row.get(FIGURE), int | float)]
    if not pruned:
        return ""
    best, *others = sorted(pruned, key=lambda row: float(row[FIGURE]))
    first = f"{best['name']} at {100 * best['macs_ratio']:.1f} % of the dense model's MACs has an agreement MSE of "
    first += f"{best[FIGURE]:.4f}"
    if not others:
        return f"{first}."
    second = others[0]
    beside = f"{second['name']} at {100 * second['macs_ratio']:.1f} % has {second[FIGURE]:.4f}"
    spread = [errors.get(str(row["name"]), {}).get(FIGURE) for row in (best, second)]
    if any(error is None for error in spread):
        return f"{first}, the lowest; {beside}."
    noise = DEVIATIONS * math.hypot(*(error for error in spread if error is not None))
    if second[FIGURE] - best[FIGURE] > noise:
        return f"{first}, the lowest; {beside}, a difference beyond the noise of the samples (± {noise:.4f}, one seed)."
    return f"{first}; {beside}: the samples do not separate the two (± {noise:.4f}, one seed)."
