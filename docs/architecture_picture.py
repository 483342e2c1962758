"""Draw docs/architecture.svg: the packages of prunekit, lowest at the bottom, and which ones each imports.

    python docs/architecture_picture.py

The rows are read from the imports, so the picture is never older than the code.
"""

import ast
from html import escape
from pathlib import Path

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "prunekit"
WIDTH, HEIGHT, GAP, COLUMNS = 150, 44, 14, 5
STYLE = """
<style>
  rect { fill: #eef3fa; stroke: #5b7fb4; } text { fill: #1c2733; font: 14px sans-serif; text-anchor: middle; }
  .small { font-size: 11px; fill: #55606c; }
  @media (prefers-color-scheme: dark) {
    rect { fill: #1e2a38; stroke: #6f95cf; } text { fill: #e6edf5; } .small { fill: #a9b5c2; }
  }
</style>
"""


def packages() -> list[str]:
    """Return the names of the packages."""
    return sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def imported(name: str) -> set[str]:
    """The other packages that a package's files import."""
    found = set()
    for path in (PACKAGE / name).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("prunekit."):
                found.add(node.module.split(".")[1])
    return found & set(packages()) - {name}


def rows() -> list[list[str]]:
    """The packages by height: a package stands above all that it imports."""
    below = {name: imported(name) for name in packages()}
    height: dict[str, int] = {}
    while len(height) < len(below):
        ready = {name for name in below if name not in height and below[name] <= set(height)}
        assert ready, "the packages import each other in a circle"
        height |= {name: 1 + max((height[other] for other in below[name]), default=-1) for name in ready}
    return [[name for name in below if height[name] == level] for level in range(max(height.values()) + 1)]


def picture() -> str:
    """Return the picture as SVG."""
    levels = rows()[::-1]
    total = COLUMNS * WIDTH + (COLUMNS + 1) * GAP
    tall = len(levels) * (HEIGHT + GAP) + GAP
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {tall}" role="img">', STYLE]
    parts.append("<title>The packages of prunekit; each imports only packages below it</title>")
    for row, names in enumerate(levels):
        y = GAP + row * (HEIGHT + GAP)
        left = (total - len(names) * WIDTH - (len(names) - 1) * GAP) / 2
        for column, name in enumerate(names):
            x = left + column * (WIDTH + GAP)
            files = len([path for path in (PACKAGE / name).rglob("*.py") if path.name != "__init__.py"])
            parts.append(f'<rect x="{x:g}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>')
            parts.append(f'<text x="{x + WIDTH / 2:g}" y="{y + 20}">{escape(name)}</text>')
            parts.append(f'<text class="small" x="{x + WIDTH / 2:g}" y="{y + 36}">{files} files</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    (DOCS / "architecture.svg").write_text(picture(), encoding="utf-8")
