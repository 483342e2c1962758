"""Draw for the page: matplotlib figures as inline SVG that takes the page's font and its light or dark colors."""

import io
import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8B4513")  # Okabe-Ito first
ABOVE, BELOW, LEGEND_LINE = 0.34, 0.5, 0.2  # inches above and below a figure's panel, and of a line of its legend
TEXT, GRID = "#000000", "#dddddd"  # `inline_svg` replaces them by the page's colors
_numbers = itertools.count()
STYLE: Any = {  # matplotlib's own type names every setting
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
    "svg.hashsalt": "prunekit",
    "font.size": 10,
    "axes.edgecolor": TEXT,
    "axes.labelcolor": TEXT,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}


def color(index: int) -> str:
    """Return the color of line, expert or method `index`; colors repeat after eight."""
    return COLORS[index % len(COLORS)]


@contextmanager
def style() -> Iterator[None]:
    """Draw in the page's style within the context."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def new_figure(width: float, height: float, left: float = 0.9) -> tuple[Any, Any]:
    """Return a figure of `width` x `height` inches and its one panel, with a light grid; use within `style`.

    left: inches to the left of the panel. Margins are fixed, as computing them takes longer than drawing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    panel = figure.add_axes(
        (left / width, BELOW / height, 1 - (left + 0.12) / width, 1 - (BELOW + ABOVE) / height)  # x, y, width, height
    )
    panel.grid(color=GRID, linewidth=0.6)
    panel.set_axisbelow(True)
    return figure, panel


def legend_below(figure: Any, panel: Any, columns: int) -> None:
    """Put the panel's legend, with each label once, under the panel; the figure grows by the legend's height."""
    handles, labels = panel.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    more = LEGEND_LINE * -(-len(unique) // columns)
    width, height = figure.get_size_inches()
    place = panel.get_position()
    figure.set_size_inches(width, height + more)
    bottom, tall = place.y0 * height + more, place.height * height
    panel.set_position((place.x0, bottom / (height + more), place.width, tall / (height + more)))
    figure.legend(unique.values(), unique.keys(), loc="lower center", ncols=columns, fontsize=9, borderaxespad=0.2)


def plain_log_axis(panel: Any) -> None:
    """Make the y axis logarithmic, with plain numbers at the powers of ten."""
    from matplotlib.ticker import LogLocator, NullLocator

    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(numticks=7))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter("{x:g}")


def inline_svg(figure: Any, label: str) -> str:
    """Return a figure as SVG for use within HTML; `label` describes it for screen readers.

    Ids inside are made unique in the page; black becomes the text's color, and light gray the grid's. Use within
    `style`.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    figure.patch.set_alpha(0)
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # HTML needs none
    prefix = f"f{next(_numbers)}-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}", svg)
    svg = re.sub(r'(?:xlink:)?href="#', f'href="#{prefix}', svg)
    svg = re.sub(r'<svg ([^>]*?)width="([\d.]+)pt" height="[\d.]+pt"', r'<svg \1style="width:\2pt"', svg, count=1)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{_quoted(label)}" ', 1)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)  # the page's own font
    svg = re.sub(r"(font-size: [\d.]+px[^\"]*?); font-family: [^;\"]*", r"\1", svg)
    return svg.replace(TEXT, "currentColor").replace(GRID, "var(--grid)").rstrip()


def ink_on(value: float) -> str:
    """Return a text color that is readable on the viridis color of `value`, from 0 to 1."""
    return "#fffffe" if value < 0.55 else "#010101"


def _quoted(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
