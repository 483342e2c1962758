"""Imports go down only: a module may import from its own package and from lower layers."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "prunekit"
LAYERS = (  # lowest first; names of one layer do not import each other, except where ORDER allows it
    {"errors"},
    {"files", "shipped", "threads", "precision", "markdown"},  # which import nothing heavy, or torch alone
    {"core"},
    {"denoisers"},
    {"slicing"},
    {"models", "sampling", "randomness", "crosscheck", "timing", "latency"},
    {"yaml_files"},  # of data, benchmarks and recipes
    {"run_directory"},
    {"data", "training"},
    {"methods"},
    {"evaluation", "serving", "export", "benchmark"},
    {
        *("report", "demo", "run", "pretrain", "plan", "check", "recipe", "stages", "recovery", "compare"),
        "importing",
        *("companions", "process_count"),
    },
    {"cli"},
    {"__main__"},
)
WITHIN = {  # what may be imported within a layer
    "shipped": {"files"},
    "latency": {"timing"},
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
    "process_count": {"recipe", "companions"},
}
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "assets" not in path.parts)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(path: Path, package: tuple[str, ...] = ()) -> list[list[str]]:
    """Return the dotted names, in parts, that a file of a package imports, wherever in the file the import stands."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names += [[*base, alias.name] for alias in node.names]
    return names


def imported_parts(path: Path) -> set[str]:
    """Return the parts of prunekit that a file imports."""
    names = imported_names(path, ("prunekit", *path.relative_to(PACKAGE).parent.parts))
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
        if LEVEL.get(part_of(path), 9) <= LEVEL["models"]:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
                assert not heavy & {name.split(".")[0] for name in names}, path


def test_what_all_methods_share_knows_no_method():
    """APTP is one of the methods: only it, the lists of names and the import of its files know it."""
    allowed = ("methods/__init__.py", "methods/registry.py", "methods/aptp/", "importing/")
    for path in FILES:
        if str(path.relative_to(PACKAGE)).startswith(allowed):
            continue
        for name in imported_names(path, ("prunekit", *path.relative_to(PACKAGE).parent.parts)):
            assert name[:3] != ["prunekit", "methods", "aptp"], f"{path.relative_to(PACKAGE)} imports {'.'.join(name)}"


def test_relative_imports_are_resolved():
    assert "core" in imported_parts(PACKAGE / "denoisers" / "unet" / "structure.py")
    assert {"core", "errors"} <= imported_parts(PACKAGE / "models" / "loading.py")


def test_no_file_imports_a_test_file():
    """What several test files use stands in a helper module: a test file that is imported brings its fixtures along."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    tests = {path.stem for path in files if path.stem.startswith("test_")}
    assert len(tests) > 50
    for path in files:
        imported = {part for name in imported_names(path) for part in name}
        assert not imported & tests, f"{path.name} imports {sorted(imported & tests)}: move what it needs to a helper"
