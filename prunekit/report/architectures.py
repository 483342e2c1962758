"""The experts' architectures: what stays of every block of the UNet, drawn as the UNet is, and each expert's counts."""

from collections.abc import Mapping, Sequence

import torch

from prunekit.cost import CostModel
from prunekit.report.figures import GRID, ink_on, inline_svg, style
from prunekit.report.source import MissingError, Section, Source
from prunekit.units import Architecture, UnitSpace

MOST_DRAWINGS = 32
KINDS = {"resnet": "ResBlock groups", "attention": "heads", "feedforward": "feed-forward groups"}
HEADER = ["expert", "MACs", "parameters", "removable layers", *KINDS.values(), "removed"]
NOTE = (
    "Each box is a layer (R: ResBlock, A: attention layer), from the input down the left side, through the middle, and "
    "up the right side to the output. Its number is the share of the layer's removable MACs that stays, in %; × marks "
    "a layer that was removed. What cannot be removed (samplers, first and last convolution) is not drawn."
)


def architectures(source: Source) -> Section:
    """Return the section. Raises MissingError before a method has chosen, or where the model is not here."""
    if not source.chosen:
        raise MissingError("no method's choice lies in this directory (result.json)")
    drawings, tables = [], []
    for name, result in source.chosen.items():
        info = result.info
        cost = CostModel(source.shape, result.space, info.sample_size, info.text_length)
        members = [f"{name} · expert {i}" if len(result.architectures) > 1 else name for i in range(len(info.macs))]
        rows = [[str(index), *_counts(cost, own)] for index, own in enumerate(result.architectures)]
        tables.append({"title": name, "header": HEADER, "rows": rows})
        for title, own in zip(members, result.architectures, strict=True):
            if len(drawings) < MOST_DRAWINGS:
                drawings.append(drawing(title, retained(cost, own), cost.ratio(own)))
    return Section("architectures", "What stays of the UNet", {"drawings": drawings, "tables": tables, "note": NOTE})


def layer_of(path: str) -> str:
    """Return the layer in which a module lies: `down_blocks.0.attentions.1` of one of its feed-forwards."""
    parts = path.split(".")
    return ".".join(parts[: 3 if parts[0] == "mid_block" else 4])


def layers_of(space: UnitSpace) -> dict[str, torch.Tensor]:
    """Return the layers of a space in the order of a forward pass, and which of its units are theirs, (D,) bool."""
    found: dict[str, torch.Tensor] = {}
    for group in space.groups:
        if group.kind != "stage":
            layer = layer_of(group.path)
            mask = found.setdefault(layer, torch.zeros(space.size, dtype=torch.bool))
            mask[space.slice(group)] = True
    return found


def retained(cost: CostModel, architecture: Architecture) -> dict[str, float | None]:
    """Return, per layer, the share of its removable MACs that stays; None where the layer was removed as a whole."""
    space, shares = cost.space, {}
    full, values = space.full().values, architecture.canonical
    dense, own = cost.macs(full), cost.macs(values)
    gone = architecture.removed()
    for layer, mask in layers_of(space).items():
        removable = dense - cost.macs(full & ~mask)
        stays = own - cost.macs(values & ~mask)
        shares[layer] = None if any(group.removes(layer) for group in gone) else stays / removable
    return shares


def drawing(title: str, shares: Mapping[str, float | None], ratio: float) -> str:
    """Return the UNet as SVG: down blocks left, the middle below, up blocks right, each level under the one before."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    blocks = _blocks(shares)
    depth = max((int(name.split(".")[1]) for name in blocks if name.startswith("down")), default=0)
    widest = max(len(own) for own in blocks.values())
    ups = [name for name in blocks if name.startswith("up")]
    last = max((int(name.split(".")[1]) for name in ups), default=0)
    with style():
        figure = Figure(figsize=(0.34 * (2 * widest) + 0.9, 0.5 * (depth + 2) + 0.55))
        panel = figure.add_axes((0, 0, 1, 1))
        right = 2 * widest + 1.4
        panel.set_xlim(-0.1, right + 0.1)
        panel.set_ylim(depth + 2.05, -0.95)
        panel.axis("off")
        panel.text(0, -0.45, f"{title}: {100 * ratio:.1f} % of the MACs", fontsize=9.5, weight="bold", va="center")
        for name, layers in blocks.items():
            if name.startswith("down"):
                row, start = int(name.split(".")[1]), 0.0
            elif name.startswith("up"):
                row, start = last - int(name.split(".")[1]), right - len(layers)
            else:
                row, start = depth + 1, (right - len(layers)) / 2
            for column, (layer, share) in enumerate(layers):
                x, y = start + column, row + 0.08
                kind = "R" if ".resnets." in layer else "A"
                face = "none" if share is None else colormaps["viridis"](share)
                box = Rectangle((x + 0.03, y), 0.94, 0.84, facecolor=face, edgecolor=GRID, linewidth=0.8)
                panel.add_patch(box)
                text = "×" if share is None else f"{100 * share:.0f}"
                ink = "#000000" if share is None else ink_on(share)
                panel.text(x + 0.5, y + 0.26, kind, fontsize=6, color=ink, ha="center", va="center")
                panel.text(x + 0.5, y + 0.58, text, fontsize=8, color=ink, ha="center", va="center")
        return inline_svg(figure, f"share of every layer's MACs that stays in {title}")


def _blocks(shares: Mapping[str, float | None]) -> dict[str, list[tuple[str, float | None]]]:
    """Return the layers by block, in a block in the order in which they run: R A R A."""
    blocks: dict[str, list[tuple[str, float | None]]] = {}
    for layer, share in shares.items():
        blocks.setdefault(layer.rpartition(".")[0].rpartition(".")[0], []).append((layer, share))
    for own in blocks.values():
        own.sort(key=lambda item: (int(item[0].rpartition(".")[2]), ".attentions." in item[0]))
    return blocks


def _counts(cost: CostModel, architecture: Architecture) -> list[str]:
    """Return an expert's row: its costs, and of each kind of unit what stays of all there are."""
    rows = architecture.describe()
    layers = [row for row in rows if row["kind"] in ("layer", "block", "stage")]
    gone = [group.path for group in architecture.removed()]
    cells = [f"{100 * cost.ratio(architecture):.1f} %", f"{cost.params(architecture) / 1e6:,.2f} M"]
    cells.append(f"{sum(bool(row['kept']) for row in layers)} of {len(layers)}")
    for kind in KINDS:
        own = [row for row in rows if row["kind"] == kind]
        cells.append(f"{sum(int(row['kept']) for row in own):,} of {sum(row['total'] for row in own):,}")
    return [*cells, _few(gone)]


def _few(paths: Sequence[str]) -> str:
    short = [path.replace("_blocks", "").replace("resnets", "R").replace("attentions", "A") for path in paths]
    return ", ".join(short) or "none"
