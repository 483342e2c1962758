"""Which units a search sees as cheap: at 256 against 768 pixels, by the exact count and by the one of APTP's paper.

A unit's price is what the dense UNet's MACs fall by when it alone is removed. The table gives each kind's share of all
prices, and the rank correlation (Spearman) of the units' prices with those of the first row; then the groups whose
share of the prices in the last row differs most from that in the first. Shapes alone: no weights, no UNet call.
Run: python benchmarks/cheap_units.py [--model sd-2.1] [--top 8]
"""

import argparse

import torch
from scipy.stats import spearmanr

import prunekit as pk
from prunekit.models import load_shape

ROWS = {  # what a search may count with: convention, pixels
    "exact, 768 px": ("exact", 768),
    "exact, 256 px": ("exact", 256),
    "paper's count, 768 px": ("aptp", 768),
    "paper's count, 256 px": ("aptp", 256),
}


def prices(unet, space: pk.UnitSpace, convention: str, pixels: int) -> torch.Tensor:
    """Return each unit's share of the sum of all prices, (D,)."""
    cost = pk.CostModel(unet, space, pixels // 8, convention=convention)
    own = -cost.marginal(space.full()).double()
    return own / own.sum()


def part_of(space: pk.UnitSpace, group) -> str:
    """Return what a group is called in the table: self- and cross-attention apart."""
    if group.kind != "attention":
        return f"whole {group.kind}s" if group.is_depth else group.kind
    return "self-attention" if group.path.endswith("attn1") else "cross-attention"


def main() -> None:
    """Print both tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sd-2.1")
    parser.add_argument("--top", type=int, default=8, help="groups whose price differs most")
    given = parser.parse_args()
    unet = load_shape(given.model).denoiser
    space = pk.discover(unet, depth="aptp")
    found = {name: prices(unet, space, *row) for name, row in ROWS.items()}
    first, *_, last = found.values()
    parts = list(dict.fromkeys(part_of(space, group) for group in space.groups))
    print(f"| {given.model} | " + " | ".join(f"{part} (%)" for part in parts) + " | rank correlation |")
    print("|---|" + "---:|" * (len(parts) + 1))
    for name, own in found.items():
        shares = dict.fromkeys(parts, 0.0)
        for group in space.groups:
            shares[part_of(space, group)] += float(own[space.slice(group)].sum())
        cells = " | ".join(f"{100 * shares[part]:.1f}" for part in parts)
        print(f"| {name} | {cells} | {spearmanr(first, own).statistic:.3f} |")
    ratios = {
        group.name: float(last[space.slice(group)].sum() / first[space.slice(group)].sum()) for group in space.groups
    }
    ranked = sorted(ratios, key=ratios.get)
    print("\n| group | price in the last row over that in the first |\n|---|---:|")
    for name in [*ranked[: given.top // 2], *ranked[len(ranked) - given.top // 2 :]]:
        print(f"| {name} | {ratios[name]:.2f} |")


if __name__ == "__main__":
    main()
