"""Sensitivity: change of the prediction if one layer's removable parts are removed, at each of a few timesteps."""

from typing import Any

from prunekit.report.source import MissingError, Section, Source
from prunekit.report.svg import inline_svg, new_figure, style
from prunekit.runtime.files import read_json

FILE = "sensitivity.json"
NOTE = (
    "The dense denoiser without one layer's removable parts (its inner width, and the whole layer where that can go), "
    "on the same {samples} noised pictures: mean squared change of the prediction, over the prediction's mean square. "
    "Bright: the layer matters at that time step. Small t is little noise."
)


def sensitivity(source: Source) -> Section:
    """Return the section. Raises MissingError if it was not measured."""
    path = source.directory / FILE
    if not path.is_file():
        raise MissingError("not measured; `prunekit report RUN --sensitivity` does, and keeps it in the run")
    content = read_json(path)
    note = NOTE.format(samples=content["samples"])
    return Section("sensitivity", "Sensitivity", {"figure": _picture(content), "note": note})


def _picture(content: dict[str, Any]) -> str:
    import numpy as np
    from matplotlib.colors import LogNorm

    layers, damage = list(content["damage"]), np.array(list(content["damage"].values()))
    positive = damage[damage > 0]
    floor = max(float(positive.min()), float(positive.max()) * 1e-5) if len(positive) else 1e-9
    with style():
        figure, panel = new_figure(7.6, 0.9 + 0.22 * len(layers), left=2.1)
        place = panel.get_position()
        panel.set_position((place.x0, place.y0, place.width - 0.17, place.height))
        panel.grid(visible=False)
        norm = LogNorm(floor, max(float(damage.max()), floor * 10))
        mesh = panel.pcolormesh(np.maximum(damage, floor), norm=norm, cmap="viridis", edgecolors="face", linewidth=0.2)
        panel.invert_yaxis()
        panel.set_yticks(np.arange(len(layers)) + 0.5, layers, fontsize=8)
        panel.set_xticks(np.arange(damage.shape[1]) + 0.5, [str(t) for t in content["timesteps"]])
        panel.set_xlabel("time step t (0: clean, high: noise)")
        panel.set_ylabel("layer, in the order of a forward pass")
        panel.set_title("What the prediction loses without a layer")
        beside = figure.add_axes((place.x1 - 0.145, place.y0, 0.025, place.height))
        bar = figure.colorbar(mesh, cax=beside)
        bar.set_label("change / mean square of the prediction (darkest: that or less)")
        return inline_svg(figure, "damage of every layer at every time step")
