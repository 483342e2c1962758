"""The result of a run in one sentence: which pruned model is closest to the dense one, and whether that is certain."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from prunekit.runtime.run_directory import DENSE

FIGURE = "agreement"
DEVIATIONS = 1.96  # standard errors on each side of a 95 % interval


def verdict(rows: Sequence[Mapping[str, Any]], errors: Mapping[str, Mapping[str, float]]) -> str:
    """Return a sentence on the agreement with the dense model; "" if no pruned row has this figure.

    The interval of a difference treats the errors of both rows as independent. The rows share their samples, so this
    interval is wider than a paired one: a difference that is reported here is also one under a paired interval.

    Args:
        rows: the table's rows, with the keys name, macs_ratio and agreement (a mean squared error).
        errors: {row's name: {figure: its standard error over pictures and samples}}.

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
