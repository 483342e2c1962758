"""Compare the prices of units in a search: at 256 and 768 pixels, by the exact count and by the APTP paper's count.

A unit's price is the decrease of the dense UNet's MACs when only this unit is removed. The first table gives each
kind's share of all prices, and the rank correlation (Spearman) of the units' prices with the first row's prices. The
second table gives the groups whose share of the prices differs most between the last and the first row. Only shapes are
used: no weights are loaded and no UNet is called.
Run: python benchmarks/cheap_units.py [--model sd-2.1] [--top 8]
"""

import argparse

import torch
from scipy.stats import spearmanr

import prunekit as pk
from prunekit.models import load_shape

ROWS = {  # ways to count MACs in a search: (convention, pixels)
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
    """Return a group's column in the table; self-attention and cross-attention have separate columns."""
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
