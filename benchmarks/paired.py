"""Print differences between rows of a comparison, paired by seed, as rows of one seed share noise and prompts.

Each figure is the value of --row minus the other row's: the mean over the seeds, with its 95 % interval (Student's t).
Run: python benchmarks/paired.py DIRECTORY --row aptp --protocol equal_steps [--budget 0.5]
"""

import argparse
import json
import statistics
from pathlib import Path

from scipy.stats import t as student

FIGURES = {
    "cmmd": ("CMMD", 1),
    "kid": ("KID x1000", 1000),
    "clip_score": ("CLIP score", 1),
    "agreement": ("agreement", 1),
}


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="comparison's folder, which contains cells/")
    parser.add_argument("--row", default="aptp")
    parser.add_argument("--protocol", default="equal_steps", help="protocol of the rows that have several protocols")
    parser.add_argument("--budget", default="0.5")
    given = parser.parse_args()
    rows: dict[str, dict[int, dict]] = {}
    for path in sorted((given.directory / "cells").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        cell = content["cell"]
        if cell["budget"] == given.budget and cell["protocol"] in (given.protocol, "static"):
            rows.setdefault(cell["method"], {})[cell["seed"]] = content["figures"]
    own = rows.pop(given.row)
    print(
        f"| {given.row} minus | "
        + " | ".join(name for name, _ in FIGURES.values())
        + " |\n|---|"
        + "---:|" * len(FIGURES)
    )
    for name, other in rows.items():
        seeds = sorted(own.keys() & other.keys())
        if len(seeds) > 1:
            pairs = [(own[seed], other[seed]) for seed in seeds]
            cells = [interval([size * (a[key] - b[key]) for a, b in pairs]) for key, (_, size) in FIGURES.items()]
            print(f"| {name} | " + " | ".join(cells) + " |")


def interval(differences: list[float]) -> str:
    """Return a mean and its 95 % interval."""
    count, mean = len(differences), statistics.mean(differences)
    half = float(student.ppf(0.975, count - 1)) * statistics.stdev(differences) / count**0.5
    return f"{mean:+.3g} [{mean - half:+.3g}, {mean + half:+.3g}]"


if __name__ == "__main__":
    main()
