"""Imports go down only: a module may import from its own package and from lower layers."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "prunekit"
LAYERS = (  # lowest first; names of one layer do not import each other, except where ORDER allows it
    {"errors"},
    {"shipped", "threads", "precision"},  # which import nothing heavy, or torch alone
    {
        "units",
        "cost",
        "gates",
        "attaching",
        "slicing",
        "stock",
        "models",
        "sampling",
        "randomness",
        "crosscheck",
        "timing",
        "latency",
    },
    {"yaml_files"},  # of data, benchmarks and recipes
    {"data", "training"},
    {"methods"},
    {"evaluation", "serving", "export", "benchmark"},
    {"report", "demo", "run", "pretrain", "plan", "check", "recipe", "stages", "recovery", "compare", "importing"},
    {"cli"},
    {"__main__"},
)
WITHIN = {  # what may be imported within a layer
    "cost": {"units"},
    "gates": {"units"},
    "attaching": {"units"},
    "slicing": {"units", "attaching"},
    "stock": {"units", "slicing"},
    "models": {"units", "slicing"},
    "crosscheck": {"units", "cost"},
    "latency": {"units", "cost", "slicing", "timing"},
    "data": {"training"},
    "training": {"data"},
    "serving": {"export"},
    "stages": {"recipe"},
    "recovery": {"stages"},
    "run": {"recipe", "pretrain", "report", "stages", "recovery"},
    "compare": {"recipe", "stages", "recovery", "report", "run"},
    "pretrain": {"recipe"},
    "plan": {"recipe", "compare"},
    "check": {"recipe", "stages", "recovery", "plan"},
    "report": {"recipe", "stages", "compare"},
    "importing": {"recipe"},
    "demo": {"report"},
}
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "assets" not in path.parts)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """Return the parts of prunekit that a file imports, wherever in the file the import stands."""
    package = ("prunekit", *path.relative_to(PACKAGE).parent.parts)
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names += [[*base, alias.name] for alias in node.names]
    return {name[1] for name in names if name[0] == "prunekit" and len(name) > 1}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    part = part_of(path)
    if part == "__init__":
        return
    assert part in LEVEL, f"{part} is in no layer: add it to LAYERS"
    for other in imported_parts(path) - {part}:
        assert other in LEVEL, f"{path.name} imports prunekit.{other}, which is no part of a layer"
        lower = LEVEL[other] < LEVEL[part] or other in WITHIN.get(part, ())
        assert lower, f"{path.relative_to(PACKAGE)} imports prunekit.{other}, which is not below it"


def test_the_lowest_layer_is_a_library_of_its_own():
    heavy = {"accelerate", "datasets", "omegaconf", "pydantic", "sentence_transformers", "typer", "matplotlib"}
    for path in FILES:
        if LEVEL.get(part_of(path), 9) <= LEVEL["units"]:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
                assert not heavy & {name.split(".")[0] for name in names}, path


def test_relative_imports_are_resolved():
    assert "units" in imported_parts(PACKAGE / "cost.py")
    assert {"units", "slicing"} <= imported_parts(PACKAGE / "models" / "shapes.py")
