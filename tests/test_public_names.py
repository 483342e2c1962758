"""README and documentation import only public names: names in `__all__` of a public package."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PUBLIC = ("prunekit", "prunekit.methods", "prunekit.export", "prunekit.serving", "prunekit.demo")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
IMPORT = re.compile(r"^\s*from (prunekit[\w.]*) import (\([^)]*\)|[^\n]+)", re.MULTILINE)


def imported(text):
    """Yield (module, name) of each name that a page imports from prunekit."""
    for module, names in IMPORT.findall(text):
        for name in names.strip("()").replace("\n", " ").split(","):
            if name.strip():
                yield module, name.strip().partition(" as ")[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_import_public_names(page):
    for module, name in imported(page.read_text(encoding="utf-8")):
        assert module in PUBLIC, f"{module} is internal: offer {name} in one of {', '.join(PUBLIC)}"
        assert name in importlib.import_module(module).__all__, f"{module}.{name} is not public"


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_there(module):
    package = importlib.import_module(module)
    assert all(getattr(package, name) is not None for name in package.__all__)


def test_imports_are_found():
    assert list(imported("from prunekit.methods import (\n  A,\n  B as C,\n)\n")) == [
        ("prunekit.methods", "A"),
        ("prunekit.methods", "B"),
    ]
