"""Terms of the search's loss over the steps, rows of a comparison in one figure: the paper's Figure 6.

Reads the directory's log.jsonl. Without options: the resource and the contrastive term of the ablation's rows with and
without optimal transport.
Run: python benchmarks/loss_curves.py runs/ablation_emoji [--rows aptp-contrastive aptp-transport]
[--terms resource contrastive] [--seed 0] [--output FILE.png]
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

from prunekit.report.svg import colour, style
from prunekit.report.training_curves import by_training

LINES = ("-", "--", ":", "-.")
SMOOTH = 2  # logged steps on either side


def main() -> None:
    """Write the picture; print each row's last values, the mean of the last tenth of the steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rows", nargs="+", default=["aptp-contrastive", "aptp-transport"])
    parser.add_argument("--terms", nargs="+", default=["resource", "contrastive"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("curves.png"))
    given = parser.parse_args()
    lines = (given.directory / "log.jsonl").read_text(encoding="utf-8").splitlines()
    trainings = by_training([json.loads(line) for line in lines])
    with style():
        figure = Figure(figsize=(4.2 * len(given.terms), 3.4), facecolor="white", layout="constrained")
        for position, term in enumerate(given.terms, start=1):
            panel = figure.add_subplot(1, len(given.terms), position)
            for index, row in enumerate(given.rows):
                steps, values = curve(trainings, row, given.seed, term)
                panel.plot(steps, values, LINES[index % len(LINES)], color=colour(index), label=row)
                last = values[-max(1, len(values) // 10) :]
                print(f"{row}, {term}: {sum(last) / len(last):.4f} over the last tenth of {steps[-1]} steps")
            panel.set(
                xlabel="step of the search", ylabel=f"{term} loss, with its weight", title=f"{term.capitalize()} loss"
            )
            panel.grid(color="#dddddd", linewidth=0.6)
            panel.legend()
        figure.savefig(given.output, dpi=140)


def curve(trainings: dict, row: str, seed: int, term: str) -> tuple[list[int], list[float]]:
    """Return a row's steps and values of a term, each the mean of the logged steps around it."""
    found = [
        rows for title, rows in trainings.items() if title.startswith(f"{row} ") and f"seed {seed} search" in title
    ]
    if not found:
        raise SystemExit(f"no search of {row!r}, seed {seed}, in this log; it has {', '.join(trainings)}")
    steps, values = [one["step"] for one in found[0]], [one[term] for one in found[0]]
    means = [values[max(0, at - SMOOTH) : at + SMOOTH + 1] for at in range(len(values))]
    return steps, [sum(near) / len(near) for near in means]


if __name__ == "__main__":
    main()
