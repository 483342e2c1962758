"""Draw docs/pictures/*.svg: `python docs/pictures.py`. Numbers come from the code; a test checks that they are current.

An SVG has its own background and follows the device's light or dark mode, so it is readable on any page.
"""

import ast
from collections import Counter
from html import escape
from pathlib import Path

import prunekit as pk

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "prunekit"
FOLDER = DOCS / "pictures"
STYLE = """<style>
  .card { fill: #ffffff; stroke: #d5dbe3; } text { fill: #1c2733; font: 14px sans-serif; }
  .small { font-size: 12px; fill: #55606c; } .code { font-family: monospace; font-size: 12px; fill: #1c2733; }
  .head { font-weight: bold; } .middle { text-anchor: middle; } .end { text-anchor: end; }
  .box { fill: #eef3fa; stroke: #5b7fb4; } .file { fill: #f4f4ef; stroke: #a9a48f; }
  .hot { fill: #ffe9cc; stroke: #d07c12; }
  .resnet { fill: #cfe3f7; stroke: #3f78b5; } .attention { fill: #d3efdc; stroke: #3a8f5c; }
  .feedforward { fill: #eadcf6; stroke: #8058ad; } .off { fill: none; stroke: #9aa4af; stroke-dasharray: 3 3; }
  .frame { fill: none; stroke: #d07c12; stroke-width: 2; } .line { stroke: #55606c; fill: none; stroke-width: 1.5; }
  .dash { stroke: #9aa4af; fill: none; stroke-dasharray: 4 4; } .arrow { fill: #55606c; } .bar { fill: #5b7fb4; }
  @media (prefers-color-scheme: dark) {
    .card { fill: #14181d; stroke: #2c343d; } text { fill: #e6edf5; } .small { fill: #a9b5c2; } .code { fill: #e6edf5; }
    .box { fill: #1e2a38; stroke: #6f95cf; } .file { fill: #26261f; stroke: #8b866f; }
    .hot { fill: #4a3313; stroke: #e09a3c; }
    .resnet { fill: #1d3852; stroke: #6aa3e0; } .attention { fill: #1c3f2b; stroke: #5fbd85; }
    .feedforward { fill: #38264c; stroke: #ab84d8; } .off { stroke: #77828e; } .frame { stroke: #e09a3c; }
    .line { stroke: #a9b5c2; } .dash { stroke: #77828e; } .arrow { fill: #a9b5c2; } .bar { fill: #6f95cf; }
  }
</style>"""
MARKER = (
    '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    '<path d="M0 0 L8 4 L0 8 Z" class="arrow"/></marker></defs>'
)
KINDS = {
    "resnet": "ResBlock: channel groups",
    "attention": "attention: heads",
    "feedforward": "feed-forward: channel groups",
}


class Drawing:
    """An SVG: boxes, texts and lines, in pixels from the upper left corner."""

    def __init__(self, width: int, height: int, title: str):
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
            f"<title>{escape(title)}</title>",
            STYLE,
            MARKER,
            f'<rect class="card" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, kind: str = "box", corner: int = 5) -> None:
        """Add a rectangle."""
        size = f'width="{width:g}" height="{height:g}" rx="{corner}"'
        self.parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" {size}/>')

    def text(self, x: float, y: float, text: str, kind: str = "middle") -> None:
        """Add a line of text; `kind` is one or more classes."""
        self.parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(text)}</text>')

    def line(self, points: list[tuple[float, float]], tip: bool = True, kind: str = "line") -> None:
        """Add a line through points, with an arrow's tip at its end."""
        path = " ".join(f"{'ML'[number > 0]}{x:g} {y:g}" for number, (x, y) in enumerate(points))
        self.parts.append(f'<path class="{kind}" d="{path}"' + (' marker-end="url(#tip)"/>' if tip else "/>"))

    def circle(self, x: float, y: float, text: str, kind: str = "hot") -> None:
        """Add a circle with a short text in it: a gate."""
        self.parts.append(f'<circle class="{kind}" cx="{x:g}" cy="{y:g}" r="14"/>')
        self.text(x, y + 4, text, "middle small")

    def svg(self) -> str:
        """Return the picture."""
        return "\n".join([*self.parts, "</svg>", ""])


def unit_rows(drawing: Drawing, x: float, y: float, counts: Counter[str], width: float) -> None:
    """Add one row for each kind of width unit: a swatch and how many units there are."""
    for row, kind in enumerate(kind for kind in KINDS if counts[kind]):
        drawing.box(x, y + 20 * row, 12, 12, kind, 2)
        drawing.text(x + 18, y + 20 * row + 11, {"attention": "heads"}.get(kind, "groups"), "small")
        drawing.text(x + width, y + 20 * row + 11, str(counts[kind]), "small end")


def legend(drawing: Drawing, y: float, kinds: list[str]) -> None:
    """Add what the colors mean."""
    for column, kind in enumerate(kinds):
        drawing.box(40 + 210 * column, y - 11, 12, 12, kind, 2)
        drawing.text(58 + 210 * column, y, KINDS[kind], "small")


def unet() -> str:
    """Draw the units of Stable Diffusion 2.1: its blocks as a U, each with its numbers of units."""
    model = pk.load_shape("sd-2.1").denoiser
    space = pk.discover(model, depth="aptp")
    blocks: dict[str, Counter[str]] = {}
    for group in space.groups:
        path = group.path.split(".")
        blocks.setdefault("mid" if path[0] == "mid_block" else ".".join(path[:2]), Counter())[group.kind] += group.size
    drawing = Drawing(760, 610, "The units of the UNet of Stable Diffusion 2.1, block by block")
    drawing.text(
        380,
        30,
        f"Stable Diffusion 2.1: {space.num_width:,} width units and {space.num_depth} whole layers",
        "middle head",
    )
    levels, width, height = 4, 186, 92
    places = {f"down_blocks.{level}": (40 + 45 * level, 52 + 106 * level) for level in range(levels)}
    places |= {f"up_blocks.{3 - level}": (760 - 40 - width - 45 * level, 52 + 106 * level) for level in range(levels)}
    places["mid"] = (380 - width / 2, 470)
    for name, (x, y) in places.items():
        counts = blocks[name]
        title = {"mid": "middle block"}.get(name, name.replace("_blocks.", " block "))
        tall = height if counts["attention"] else 52
        if name == "mid":
            first, last = places["down_blocks.3"][0] + 40, places["up_blocks.0"][0] + width - 40
            drawing.line([(first, 422), (first, y + 46), (x - 2, y + 46)])
            drawing.line([(x + width, y + 46), (last, y + 46), (last, 424)])
        drawing.box(x, y, width, tall)
        drawing.text(x + 10, y + 19, title, "head")
        if counts["layer"]:
            drawing.text(x + width - 10, y + 19, f"{counts['layer']} layer{'s' * (counts['layer'] > 1)}", "small end")
        unit_rows(drawing, x + 10, y + 28, counts, width - 20)
    for level in range(levels):
        (left, y), (right, _) = places[f"down_blocks.{level}"], places[f"up_blocks.{3 - level}"]
        drawing.line([(left + width + 4, y + 26), (right - 6, y + 26)], kind="dash")
        if level:
            drawing.line([(left + 20, y - 14), (left + 20, y - 2)])
            drawing.line([(right + width - 20, y - 1), (right + width - 20, y - 13)])
    drawing.text(380, 70, "skip connections", "middle small")
    legend(drawing, 592, list(KINDS))
    return drawing.svg()


def transformer() -> str:
    """Draw the units of FLUX.1: one joint block, one single block, and how many there are of each."""
    model = pk.load_shape("flux.1-dev").denoiser
    space = pk.discover(model, depth="all")
    sizes = {(group.kind, ".".join(group.path.split(".")[:2])): 0 for group in space.groups}
    for group in space.groups:
        sizes[group.kind, ".".join(group.path.split(".")[:2])] += group.size
    joint, single = (
        sum(group.kind == "block" and group.path.startswith(name) for group in space.groups)
        for name in ("transformer", "single")
    )
    heads = sizes["attention", "transformer_blocks.0"]
    inner = sizes["feedforward", "transformer_blocks.0"] // 2
    alone = sizes["feedforward", "single_transformer_blocks.0"]
    drawing = Drawing(760, 400, "The units of the transformer FLUX.1: heads, feed-forward groups and whole blocks")
    drawing.text(380, 30, f"FLUX.1: {space.num_width:,} width units and {space.num_depth} whole blocks", "middle head")

    def strip(x: float, y: float, count: int, kind: str, width: float, height: float = 20) -> None:
        step = width / count
        for number in range(count):
            drawing.box(x + step * number, y, step - 2, height, kind, 2)

    drawing.box(30, 48, 420, 300, "frame", 8)
    drawing.text(45, 70, f"joint block, {joint} of them", "head")
    drawing.text(45, 98, "image tokens", "small")
    drawing.line([(128, 94), (438, 94)])
    drawing.text(45, 306, "text tokens", "small")
    drawing.line([(120, 302), (438, 302)])
    strip(45, 112, heads, "attention", 180, 172)
    drawing.box(52, 182, 164, 32, "card", 3)
    drawing.text(134, 203, f"{heads} heads, both streams", "middle small")
    strip(245, 112, inner, "feedforward", 192, 34)
    drawing.text(341, 164, f"{inner} feed-forward groups, image", "middle small")
    strip(245, 250, inner, "feedforward", 192, 34)
    drawing.text(341, 242, f"{inner} feed-forward groups, text", "middle small")
    drawing.text(240, 334, "orange frame: the whole block is one unit (depth: all)", "middle small")
    drawing.box(480, 48, 250, 300, "frame", 8)
    drawing.text(495, 70, f"single block, {single} of them", "head")
    drawing.text(495, 96, "text and image tokens", "small")
    drawing.line([(630, 92), (718, 92)])
    strip(500, 112, heads, "attention", 215, 64)
    drawing.text(605, 196, f"{heads} heads", "middle small")
    strip(500, 216, alone, "feedforward", 215, 34)
    drawing.text(605, 268, f"{alone} feed-forward groups", "middle small")
    drawing.text(605, 306, "one output layer reads both", "middle small")
    legend(drawing, 380, ["attention", "feedforward"])
    return drawing.svg()


def gate() -> str:
    """Draw what a width gate and a depth gate do, and what is left after the cut."""
    drawing = Drawing(760, 400, "What a gate does: 1 keeps a unit, 0 removes it, a value between scales it")
    drawing.text(40, 34, "A width gate multiplies one unit", "head")
    values = ("1", "1", "0", "0.4")
    for row, value in enumerate(values):
        y = 52 + 40 * row
        drawing.line([(60, y + 14), (92, y + 14)])
        drawing.box(94, y, 86, 28, "off" if value == "0" else "attention")
        drawing.text(137, y + 18, f"head {row}", "middle small")
        drawing.line([(180, y + 14), (206, y + 14)])
        drawing.circle(222, y + 14, value)
        drawing.line([(236, y + 14), (268, y + 14)], kind="dash" if value == "0" else "line", tip=value != "0")
    drawing.box(270, 52, 80, 148)
    drawing.text(310, 122, "output", "middle small")
    drawing.text(310, 138, "layer", "middle small")
    drawing.line([(350, 126), (378, 126)])
    drawing.text(40, 232, "During a search, gates are between 0 and 1 and have gradients.", "small")
    drawing.text(420, 34, "After the decision, the cut model has no gates", "head")
    for row, head in enumerate((0, 1)):
        y = 72 + 46 * row
        drawing.line([(440, y + 14), (472, y + 14)])
        drawing.box(474, y, 86, 28, "attention")
        drawing.text(517, y + 18, f"head {head}", "middle small")
        drawing.line([(560, y + 14), (598, y + 14)])
    drawing.box(600, 62, 80, 94)
    drawing.text(640, 106, "output layer,", "middle small")
    drawing.text(640, 122, "half the inputs", "middle small")
    drawing.line([(680, 109), (708, 109)])
    drawing.text(420, 192, "Gates 1, 1, 0, 0 and the cut model give the same output", "small")
    drawing.text(420, 210, "(to 1e-5 in float32).", "small")
    drawing.line([(40, 252), (720, 252)], tip=False, kind="dash")
    drawing.text(40, 282, "A depth gate mixes a whole layer with its input", "head")
    drawing.text(52, 334, "input", "small")
    drawing.line([(88, 330), (138, 330)])
    drawing.box(140, 310, 130, 40, "resnet")
    drawing.text(205, 334, "whole layer", "middle small")
    drawing.line([(270, 330), (306, 330)])
    drawing.circle(322, 330, "g")
    drawing.line([(336, 330), (374, 330)])
    drawing.circle(390, 330, "+", "box")
    drawing.line([(110, 330), (110, 376), (308, 376)])
    drawing.circle(322, 376, "1−g")
    drawing.line([(336, 376), (390, 376), (390, 346)])
    drawing.line([(404, 330), (440, 330)])
    drawing.text(456, 326, "g = 1: the layer", "small")
    drawing.text(456, 344, "g = 0: the input, as if the layer were removed", "small")
    return drawing.svg()


def run() -> str:
    """Draw the stages of a run, and the files that each of them writes."""
    stages = [
        ("1 encode", "pictures and texts,", "once", "cache/"),
        ("2 choose", "units to keep,", "by a method", "methods/NAME/ result.json"),
        ("3 cut", "a smaller model", "per expert", ""),
        ("4 recover", "refit, fine-tune", "with the teacher", "methods/NAME/ experts/N/"),
        ("5 evaluate", "pictures, metrics,", "intervals", "table.md samples/"),
        ("6 report", "one page", "about the run", "report.html"),
    ]
    drawing = Drawing(900, 216, "The stages of a run, and the files that each stage writes")
    for column, (stage, first, second, file) in enumerate(stages):
        x = 20 + 146 * column
        drawing.box(x, 24, 124, 78)
        drawing.text(x + 62, 48, stage, "middle head")
        drawing.text(x + 62, 70, first, "middle small")
        drawing.text(x + 62, 87, second, "middle small")
        if column:
            drawing.line([(x - 22, 63), (x - 2, 63)])
        if file:
            names = file.split(" ")
            drawing.line([(x + 62, 102), (x + 62, 126)])
            drawing.box(x, 128, 124, 12 + 18 * len(names), "file", 3)
            for row, name in enumerate(names):
                drawing.text(x + 62, 146 + 18 * row, name, "middle code")
    drawing.text(450, 200, "A stopped run resumes at the stage, and within it at the last checkpoint.", "middle small")
    return drawing.svg()


def routing() -> str:
    """Draw how a prompt comes to its expert. The bars are an example; the paper's Equation 22 computes them."""
    drawing = Drawing(
        860, 260, "How a prompt is routed: it is embedded, compared with every expert's code, and drawn by one expert"
    )
    drawing.box(20, 100, 110, 46, "file")
    drawing.text(75, 128, "“red apple”", "middle")
    drawing.line([(130, 123), (158, 123)])
    drawing.box(160, 94, 120, 58)
    drawing.text(220, 118, "prompt encoder", "middle small")
    drawing.text(220, 136, "(frozen)", "middle small")
    drawing.line([(280, 123), (308, 123)])
    drawing.box(310, 94, 110, 58)
    drawing.text(365, 118, "router", "middle small")
    drawing.text(365, 136, "(one linear layer)", "middle small")
    drawing.text(528, 32, "similarity with each code", "middle small")
    for row, share in enumerate((0.35, 0.9, 0.5, 0.2)):
        y, chosen = 46 + 48 * row, row == 1
        drawing.line([(420, 123), (446, y + 16)], kind="line" if chosen else "dash", tip=chosen)
        drawing.parts.append(f'<rect class="bar" x="450" y="{y + 8}" width="{150 * share:g}" height="16" rx="3"/>')
        drawing.box(628, y, 110, 32, "hot" if chosen else "off")
        drawing.text(683, y + 20, f"expert {row}", "middle small")
        if chosen:
            drawing.line([(606, y + 16), (626, y + 16)])
            drawing.line([(738, y + 16), (766, y + 16)])
            drawing.box(768, y - 8, 76, 48, "file")
            drawing.text(806, y + 20, "picture", "middle small")
    drawing.text(
        430,
        246,
        "One prompt runs one expert. The choice depends on the prompt alone, not on other prompts of a batch.",
        "middle small",
    )
    return drawing.svg()


def packages() -> list[str]:
    """Return the names of the packages."""
    return sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def imported(name: str) -> set[str]:
    """Return the other packages that a package's files import."""
    found = set()
    for path in (PACKAGE / name).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("prunekit."):
                found.add(node.module.split(".")[1])
    return found & set(packages()) - {name}


def rows() -> list[list[str]]:
    """Return the packages by height: a package is above all packages that it imports."""
    below = {name: imported(name) for name in packages()}
    height: dict[str, int] = {}
    while len(height) < len(below):
        ready = {name for name in below if name not in height and below[name] <= set(height)}
        assert ready, "the packages import each other in a circle"
        height |= {name: 1 + max((height[other] for other in below[name]), default=-1) for name in ready}
    return [[name for name in below if height[name] == level] for level in range(max(height.values()) + 1)]


def architecture() -> str:
    """Draw the packages of prunekit; each one imports only packages below it."""
    levels, width, height, gap = rows()[::-1], 150, 34, 14
    most = max(map(len, levels))
    total = most * width + (most + 1) * gap
    drawing = Drawing(
        total, len(levels) * (height + gap) + gap, "The packages of prunekit; each imports only packages below it"
    )
    for row, names in enumerate(levels):
        y = gap + row * (height + gap)
        left = (total - len(names) * width - (len(names) - 1) * gap) / 2
        for column, name in enumerate(names):
            x = left + column * (width + gap)
            drawing.box(x, y, width, height)
            drawing.text(x + width / 2, y + 22, name)
    return drawing.svg()


PICTURES = {
    "units_unet": unet,
    "units_transformer": transformer,
    "gate": gate,
    "run": run,
    "routing": routing,
    "architecture": architecture,
}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")
