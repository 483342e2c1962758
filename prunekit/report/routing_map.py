"""Routing: each expert's share of prompts, the router against its controls, and a map of the prompts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prunekit.evaluation.routing import WORDS
from prunekit.report.source import MissingError, Section, Source
from prunekit.report.svg import color, inline_svg, legend_below, new_figure, style
from prunekit.runtime.randomness import generator

MOST_POINTS = 600
MAP_SIDE, MAP_HEIGHT, MARGIN = 640, 420, 14  # width, height and margin of the map's drawing
SHAPES = (  # SVG paths around (0, 0), so that experts differ not only in color
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0",
    "M-3.6 -3.6h7.2v7.2h-7.2z",
    "M0 -4.8L4.6 3.4H-4.6z",
    "M0 -5.2L4.2 0L0 5.2L-4.2 0z",
    "M0 4.8L4.6 -3.4H-4.6z",
    "M-4.8 -1.5h3.3v-3.3h3v3.3h3.3v3h-3.3v3.3h-3v-3.3h-3.3z",
)
NO_MAP = (
    "No map: the run recorded none. `prunekit report RUN --sensitivity` records it where the model and data are here."
)
NO_MAP_OF_COMPARISON = "A comparison records no map of its prompts; a run of one of its methods does."
NO_ASSIGNMENT = "Prompts before balancing, with and without transport, are not drawn: the run recorded none."


def routing(source: Source) -> Section:
    """Return the section. Raises MissingError if nothing routes."""
    if source.is_comparison:
        cells = [cell for cell in source.cells if cell["experts"]]
        if not cells:
            raise MissingError("no method of the comparison routes prompts")
        cell = cells[0]["cell"]
        title = f"{cell['method']}, budget {cell['budget']}, seed {cell['seed']}"
        mixture = {**_mixture(title, cells[0]["experts"], {}, None, None), "no_map": NO_MAP_OF_COMPARISON}
        return Section("routing", "Routing", {"mixtures": [mixture]})
    experts = source.results.get("experts")
    if not experts:
        raise MissingError("no method of this run routes prompts: each has one model for all")
    mixtures = []
    for name, table in experts.items():
        result = source.chosen.get(name.partition("@")[0])
        assignment = result.info.assignment if result is not None else None
        report = source.results.get("routing", {}).get(name, {})
        mixtures.append(_mixture(name, table["rows"], report, assignment, source.metrics(name, "map")))
    return Section("routing", "Routing", {"mixtures": mixtures})


def mapped_rows(count: int, seed: int = 0) -> Tensor:
    """Return the indices of the prompts on the map, drawn by `seed` from `count`: ascending, at most MOST_POINTS."""
    return torch.randperm(count, generator=generator(seed, "prompt map"))[:MOST_POINTS].sort().values


def prompt_map(embeddings: Tensor, captions: Sequence[str], experts: Tensor, of: int) -> dict[str, Any]:
    """Return a two-dimensional map of prompts as JSON values: the first two principal components.

    embeddings: (n, Z) of the prompts on the map; experts: (n,). of: number of prompts that these were drawn from.
    """
    centered = embeddings.double()
    centered = centered - centered.mean(dim=0)
    _, values, axes = torch.linalg.svd(centered, full_matrices=False)
    axes = axes[:2] * axes[:2].gather(1, axes[:2].abs().argmax(dim=1, keepdim=True)).sign()  # the same in every run
    places = centered @ axes.T  # (n, 2)
    places = torch.nn.functional.pad(places, (0, 2 - places.shape[1]))
    variance = values.square() / values.square().sum().clamp_min(1e-12)
    return {
        "captions": list(captions),
        "experts": experts.tolist(),
        "places": [[round(x, 5) for x in place] for place in places.tolist()],
        "variance": [round(share, 5) for share in variance[:2].tolist()],
        "of": of,
    }


def _mixture(
    name: str,
    rows: Sequence[dict[str, Any]],
    report: dict[str, Any],
    assignment: dict[str, list[int]] | None,
    recorded: dict[str, Any] | None,
) -> dict[str, Any]:
    words = report.get("words") or [row["examples"].split(", ") for row in rows]
    return {
        "name": name,
        "shares": _shares(name, rows),
        "assignment": _assignment(name, rows, assignment) if assignment else None,
        "no_assignment": NO_ASSIGNMENT,
        "words": [
            {"expert": index, "words": ", ".join(expert_words[:WORDS])} for index, expert_words in enumerate(words)
        ],
        "controls": _controls(report) if report else None,
        "map": _map(recorded) if recorded else None,
        "no_map": NO_MAP,
    }


def _shares(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """Return a bar chart of every expert's share of prompts and MACs (Figure 8 of the APTP paper)."""
    import numpy as np

    places = np.arange(len(rows))
    with style():
        figure, panel = new_figure(max(4.6, 0.6 * len(rows) + 1.6), 3.1)
        for offset, key, label, bar_color in (
            (-0.2, "training_share", "training prompts", color(5)),
            (0.2, "macs_ratio", "MACs, % of dense", color(1)),
        ):
            values = [100 * row[key] for row in rows]
            bars = panel.bar(places + offset, values, 0.38, color=bar_color, label=label)
            panel.bar_label(bars, fmt="%.0f", fontsize=8)
        panel.set_xticks(places, [str(row["expert"]) for row in rows])
        panel.set_xlabel("expert")
        panel.set_ylabel("share (%)")
        panel.set_title("Share and budget of each expert")
        panel.margins(y=0.12)
        legend_below(figure, panel, 2)
        return inline_svg(figure, f"share of prompts and MACs of each expert of {name}")


def _assignment(name: str, rows: Sequence[dict[str, Any]], counts: dict[str, list[int]]) -> str:
    """Return a bar chart of each expert's training prompts with and without transport (Figure 7 of the APTP paper)."""
    import numpy as np

    places = np.arange(len(rows))
    series = [
        ("nearest code", counts["nearest"]),
        ("with transport", counts["transport"]),
        ("at inference", [row["training_share"] for row in rows]),
    ]
    with style():
        figure, panel = new_figure(max(4.6, 0.6 * len(rows) + 1.6), 3.1)
        for index, (label, values) in enumerate(series):
            shares = 100 * np.array(values, dtype=float) / max(sum(values), 1e-12)
            bar_color = color((6, 0, 4)[index])
            panel.bar(places + 0.27 * (index - 1), shares, 0.25, color=bar_color, label=label)
        panel.axhline(100 / len(rows), color="#000000", linewidth=1.2, linestyle=":")
        panel.set_xticks(places, [str(row["expert"]) for row in rows])
        panel.set_xlabel("expert (dotted: an even share)")
        panel.set_ylabel("training prompts (%)")
        panel.set_title("Prompts with and without transport")
        legend_below(figure, panel, 3)
        return inline_svg(figure, f"prompts of each expert of {name} with and without transport")


def _controls(report: dict[str, Any]) -> dict[str, Any]:
    """Return the errors of the router and its controls as rows, and the other figures of routing as sentences."""
    controls, alike, hard = report["controls"], report["paraphrases"], report["difficulty"]
    low, high = (100 * bound for bound in controls["gain_interval"])
    best = f"all to expert {controls['best_single_expert']}, the best for all "
    best += f"({100 * controls['best_single_macs_over_mean']:.0f} % of the mean MACs)"
    rows = [
        ("where the router sends them", controls["routed"]),
        ("to an expert at random, with the same shares", controls["random"]),
        (best, controls["best_single"]),
        ("each to its best (no router can do better)", controls["oracle"]),
    ]
    lines = [
        f"Routing saves {100 * controls['gain']:.1f} % of the error of random routing, 95 % interval [{low:.1f}, "
        f"{high:.1f}], {report['samples']} samples"
        + (": no difference that these samples show." if low <= 0 <= high else "."),
        f"Entropy of the shares: {report['entropy']:.3f} of even; the largest is {report['largest_over_even']:.2f} "
        "times an even one.",
    ]
    if hard["correlation"] is not None:
        lines += [f"Hard prompts and large experts: rank correlation {hard['correlation']:+.2f} (p = {hard['p']:.2g})."]
    if alike["agree"] is not None:
        lines += [
            f"Two captions of one picture go to the same expert in {100 * alike['agree']:.0f} % of {alike['pairs']:,} "
            f"pairs; by chance in {100 * alike['chance']:.0f} %."
        ]
    return {"rows": [(what, f"{error:.5f}") for what, error in rows], "lines": lines}


def _map(recorded: dict[str, Any]) -> dict[str, Any]:
    """Return the map's points in the coordinates of the drawing, with the experts' shapes, colors and counts."""
    places = torch.tensor(recorded["places"], dtype=torch.float64)
    low, high = places.amin(0), places.amax(0)
    unit = (places - low) / (high - low).clamp_min(1e-12)
    x = MARGIN + unit[:, 0] * (MAP_SIDE - 2 * MARGIN)
    y = MAP_HEIGHT - MARGIN - unit[:, 1] * (MAP_HEIGHT - 2 * MARGIN)
    points = [
        {"x": round(px, 1), "y": round(py, 1), "expert": expert, "caption": caption}
        for px, py, expert, caption in zip(
            x.tolist(), y.tolist(), recorded["experts"], recorded["captions"], strict=True
        )
    ]
    experts = sorted(set(recorded["experts"]))
    kinds = [{"expert": e, "shape": SHAPES[e % len(SHAPES)], "color": color(e)} for e in experts]
    counts = {e: recorded["experts"].count(e) for e in experts}
    return {
        "width": MAP_SIDE,
        "height": MAP_HEIGHT,
        "points": points,
        "kinds": kinds,
        "counts": counts,
        "variance": [f"{100 * share:.0f}" for share in recorded["variance"]],
        "of": recorded["of"],
    }
