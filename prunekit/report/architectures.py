"""The experts' architectures: a drawing of the share that is kept of every layer, and a table of kept units."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from prunekit.core.axes import Place
from prunekit.core.cost import CostModel
from prunekit.core.registry import denoiser_of
from prunekit.core.space import Architecture, UnitSpace
from prunekit.report.source import MissingError, Section, Source
from prunekit.report.svg import GRID, ink_on, inline_svg, style

MOST_DRAWINGS = 32
KINDS = {"resnet": "ResBlock groups", "attention": "heads", "feedforward": "feed-forward groups"}
HEADER = ["expert", "MACs", "parameters", "removable layers", *KINDS.values(), "removed"]
NOTE = (
    "Each box is a layer ({legend}), from the input down the left side, through the middle, and "
    "up the right side to the output. Its number is the share of the layer's removable MACs that stays, in %; × marks "
    "a layer that was removed. What cannot be removed (samplers, first and last convolution) is not drawn."
)


def architectures(source: Source) -> Section:
    """Return the section. Raises MissingError before a method has chosen, or if the model cannot be read here."""
    if not source.chosen:
        raise MissingError("this directory has no method's choice (result.json)")
    drawings: list[str] = []
    tables: list[dict[str, Any]] = []
    denoiser = denoiser_of(source.shape)
    places = denoiser.outline(source.shape)
    for name, result in source.chosen.items():
        info = result.info
        cost = CostModel(source.shape, result.space, info.sample_size, info.text_length or 77)
        members = [f"{name} · expert {i}" if len(result.architectures) > 1 else name for i in range(len(info.macs))]
        rows = [[str(index), *_counts(cost, architecture)] for index, architecture in enumerate(result.architectures)]
        tables.append({"title": name, "header": HEADER, "rows": rows})
        for title, architecture in zip(members, result.architectures, strict=True):
            if len(drawings) < MOST_DRAWINGS:
                drawings.append(drawing(title, retained(cost, architecture, places), cost.ratio(architecture), places))
    content = {"drawings": drawings, "tables": tables, "note": NOTE.format(legend=denoiser.legend)}
    return Section("architectures", "What stays of the denoiser", content)


def layers_of(space: UnitSpace, places: Mapping[str, Place]) -> dict[str, torch.Tensor]:
    """Return the layers of a space in the order of a forward pass, each with a mask of the layer's units, (D,) bool.

    places: the denoiser's layers by path, as `Denoiser.outline` returns them.
    """
    masks: dict[str, torch.Tensor] = {}
    for group in space.groups:
        layer = group.path
        while layer and layer not in places:
            layer = layer.rpartition(".")[0]
        if layer:  # empty for a stage, which is in no layer
            mask = masks.setdefault(layer, torch.zeros(space.size, dtype=torch.bool))
            mask[space.slice(group)] = True
    return masks


def retained(cost: CostModel, architecture: Architecture, places: Mapping[str, Place]) -> dict[str, float | None]:
    """Return, per layer of `places`, the share of its removable MACs that is kept; None for a removed layer."""
    space = cost.space
    shares: dict[str, float | None] = {}
    full, values = space.full().values, architecture.canonical
    dense, pruned = cost.macs(space.full()), cost.macs(architecture)
    gone = architecture.removed()
    for layer, mask in layers_of(space, places).items():
        removable = dense - cost.macs(Architecture(space, full & ~mask))
        stays = pruned - cost.macs(Architecture(space, values & ~mask))
        shares[layer] = None if any(group.removes(layer) for group in gone) else stays / removable
    return shares


def drawing(title: str, shares: Mapping[str, float | None], ratio: float, places: Mapping[str, Place]) -> str:
    """Return the denoiser as SVG: every layer of `shares` at its place."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    rows: dict[tuple[str, int], list[str]] = {}
    for layer, place in places.items():
        if layer in shares:
            rows.setdefault((place.side, place.row), []).append(layer)
    depth = max(row for _, row in rows)
    widest = max(map(len, rows.values()))
    with style():
        figure = Figure(figsize=(0.34 * (2 * widest) + 0.9, 0.5 * (depth + 1) + 0.55))
        panel = figure.add_axes((0, 0, 1, 1))
        right = 2 * widest + 1.4
        panel.set_xlim(-0.1, right + 0.1)
        panel.set_ylim(depth + 1.05, -0.95)
        panel.axis("off")
        panel.text(0, -0.45, f"{title}: {100 * ratio:.1f} % of the MACs", fontsize=9.5, weight="bold", va="center")
        for (side, row), layers in rows.items():
            start = {"left": 0.0, "right": right - len(layers), "middle": (right - len(layers)) / 2}[side]
            for column, layer in enumerate(layers):
                share, x, y = shares[layer], start + column, row + 0.08
                face = "none" if share is None else colormaps["viridis"](share)
                box = Rectangle((x + 0.03, y), 0.94, 0.84, facecolor=face, edgecolor=GRID, linewidth=0.8)
                panel.add_patch(box)
                text = "×" if share is None else f"{100 * share:.0f}"
                ink = "#000000" if share is None else ink_on(share)
                panel.text(x + 0.5, y + 0.26, places[layer].letter, fontsize=6, color=ink, ha="center", va="center")
                panel.text(x + 0.5, y + 0.58, text, fontsize=8, color=ink, ha="center", va="center")
        return inline_svg(figure, f"share of every layer's MACs that stays in {title}")


def _counts(cost: CostModel, architecture: Architecture) -> list[str]:
    """Return an expert's row: its costs, and for each kind of unit the number of kept units and of all units."""
    rows = architecture.describe()
    layers = [row for row in rows if row["kind"] in ("layer", "block", "stage")]
    gone = [group.path for group in architecture.removed()]
    cells = [f"{100 * cost.ratio(architecture):.1f} %", f"{cost.params(architecture) / 1e6:,.2f} M"]
    cells.append(f"{sum(bool(row['kept']) for row in layers)} of {len(layers)}")
    for kind in KINDS:
        units = [row for row in rows if row["kind"] == kind]
        cells.append(f"{sum(int(row['kept']) for row in units):,} of {sum(row['total'] for row in units):,}")
    return [*cells, _few(gone)]


def _few(paths: Sequence[str]) -> str:
    short = [path.replace("_blocks", "").replace("resnets", "R").replace("attentions", "A") for path in paths]
    return ", ".join(short) or "none"
