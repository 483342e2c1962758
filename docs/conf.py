"""The documentation as a site: `make docs` builds it into docs/_build/html, and a warning is an error."""

import os
import re
from typing import Any

import latex2mathml.converter
from docutils import nodes

os.environ.setdefault("HF_HUB_OFFLINE", "1")

project = "prunekit"
copyright = "the prunekit authors"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "results/*/table.md"]
html_math_renderer = "mathml"
html_theme = "furo"
html_title = "prunekit"
html_static_path = ["_static"]
html_css_files = ["site.css"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["misc.highlighting_failure"]
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
default_role = "code"
SECTION = re.compile(r"^(Args|Returns|Raises|Yields):$")


def as_paragraphs(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text in which `name: what it is` lines may go on, indented; give each a paragraph."""
    found: list[str] = []
    for position, line in enumerate(lines):
        if SECTION.match(line.strip()):
            found += ["", *lines[position:]]
            break
        indent, above = len(line) - len(line.lstrip()), found[-1] if found else ""
        deeper = bool(above.strip()) and indent > len(above) - len(above.lstrip())
        if line.strip() and deeper and not above.endswith(":"):
            found[-1] += " " + line.strip()
        else:
            named = re.match(r"^\s*(\*\*)?[\w\", ]+: \S", line)
            found += [""] if line.strip() and above.strip() and (deeper or named or _less(line, above)) else []
            found.append(line)
    lines[:] = [line.replace("|", "\\|").replace("**", "\\*\\*") for line in found]


def _less(line: str, above: str) -> bool:
    return len(line) - len(line.lstrip()) < len(above) - len(above.lstrip())


def mathml(translator: Any, node: Any) -> None:
    """Write a formula as MathML: browsers draw it without a script from elsewhere."""
    text = node.astext()
    tag = re.search(r"\\tag\{([^}]*)\}", text)
    block = isinstance(node, nodes.math_block)
    formula = latex2mathml.converter.convert(text.replace(tag[0], "") if tag else text, "block" if block else "inline")
    number = f"<span>({tag[1]})</span>" if tag else ""
    translator.body.append(f'<div class="formula">{formula}{number}</div>' if block else formula)
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Register the docstrings' reader before napoleon's, and how formulas are written."""
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
    app.connect("autodoc-process-docstring", as_paragraphs, priority=400)
