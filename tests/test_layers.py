"""Module structure: folders ("rooms") in a fixed order, imports only downwards, no cycles, unique module names."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "prunekit"
ROOMS = (  # folders of the package, lowest first; a room may import itself and the rooms before it
    "runtime",
    "core",
    "denoisers",
    "slicing",  # a module, not a folder: saved pipelines refer to it for the classes of pruned models
    "models",
    "data",
    "measuring",
    "training",
    "methods",
    "recovery",
    "evaluation",
    "export",
    "serving",
    "report",
    "embedded",
    "jobs",
    "demo",
    "cli",
)
DOORS = {  # top-level modules and their purposes
    "__init__": "public names, which are imported when they are first used",
    "__main__": "`python -m prunekit`",
}
INTERFACES = {  # file names that occur in several rooms or families, because the files implement one interface
    "registry": "classes by name, with what other packages add",
    "denoiser": "the protocol, and its implementation in each family",
    "family": "the protocol, and its implementation in each family",
}
SHORT = 40  # smallest number of lines of a module that does not implement an interface
HEAVY = {"accelerate", "datasets", "omegaconf", "pydantic", "sentence_transformers", "typer", "matplotlib"}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "assets" not in path.parts)


def name_of(path: Path) -> str:
    """Return the dotted name of a module; a package's `__init__` has the package's name."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imported_names(path: Path, package: tuple[str, ...] = ()) -> Iterator[list[str]]:
    """Yield the dotted names, split into parts, that a file of a package imports anywhere in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            yield from ([*base, alias.name] for alias in node.names)


def imported_modules(path: Path) -> set[str]:
    """Return the modules of prunekit that a file imports."""
    package = path.relative_to(PACKAGE.parent).parent.parts
    found = set()
    for parts in imported_names(path, package):
        while parts and ".".join(parts) not in MODULES:
            parts = parts[:-1]
        found |= {".".join(parts)} if parts else set()
    return found - {name_of(path)}


def room_of(module: str) -> str:
    """Return the room of a module; a module at the top level is its own room."""
    return module.split(".")[1] if "." in module else "__init__"


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the sets of nodes that reach each other."""
    reached = {node: set(others) for node, others in graph.items()}
    for middle in graph:
        for others in reached.values():
            if middle in others:
                others |= reached[middle]
    found = {frozenset(b for b in reached[a] if a in reached.get(b, ())) for a in graph if a in reached[a]}
    return sorted(map(sorted, found))


GRAPH = {name: imported_modules(path) for name, path in MODULES.items()}


def test_every_room_has_its_place():
    known = {*ROOMS, *DOORS}
    found = set(map(room_of, MODULES))
    assert found <= known, f"{sorted(found - known)}: add them to ROOMS, lowest first"


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down(room):
    own = ROOMS.index(room)
    for name in (name for name in MODULES if room_of(name) == room):
        for other in GRAPH[name] - {PACKAGE.name}:
            assert room_of(other) in ROOMS[: own + 1], f"{name} imports {other}, which is not below it"


def test_no_circle():
    graph = {name: others - {PACKAGE.name} for name, others in GRAPH.items() if name != PACKAGE.name}
    assert not circles(graph)


def test_no_two_modules_have_one_name():
    within = [path for path in FILES if path.parent != PACKAGE and not is_family(path)]
    counts = Counter(path.stem for path in within)
    del counts["__init__"]
    names = {name for name, count in counts.items() if count > 1} - INTERFACES.keys()
    assert not names, "give them names that tell them apart, or list the interface that they implement"
    rooms = {path.parent.name for path in FILES if path.name == "__init__.py"}
    assert not rooms & counts.keys(), "a module has the name of a package"


def test_no_file_is_a_splinter():
    for path in FILES:
        place = path.relative_to(PACKAGE).as_posix()
        text = path.read_text(encoding="utf-8")
        allowed = path.parent == PACKAGE or path.stem in ("__init__", *INTERFACES) or is_family(path)
        allowed = allowed or "\n@register(" in text
        lines = len(text.splitlines())
        assert allowed or lines >= SHORT, f"{place} has {lines} lines: merge it with the module that it serves"


def is_family(path: Path) -> bool:
    """Return whether a file belongs to a denoiser family; families have files of the same names."""
    return path.relative_to(PACKAGE).parts[0] == "denoisers"


def test_the_core_is_a_library_of_its_own():
    for path in FILES:
        if room_of(name_of(path)) in ("core", "denoisers"):
            assert not HEAVY & {parts[0] for parts in imported_names(path)}, path
            below = {room_of(name) for name in GRAPH[name_of(path)]}
            assert below <= {"core", "denoisers", "runtime"}, path


def test_what_all_methods_share_knows_no_method():
    """Only APTP's modules, the lists of names and the import of its releases may import APTP's modules."""
    allowed = ("methods/__init__.py", "methods/registry.py", "methods/aptp/", "jobs/import_aptp.py")
    for path in FILES:
        if not path.relative_to(PACKAGE).as_posix().startswith(allowed):
            others = {name for name in GRAPH[name_of(path)] if name.startswith("prunekit.methods.aptp")}
            assert not others, f"{path.relative_to(PACKAGE)} imports {sorted(others)}"


def test_relative_imports_and_circles_are_found():
    assert any(name.startswith("prunekit.runtime.") for name in GRAPH["prunekit.core.slicing"])
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_tests_mirror_the_package():
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders <= {*ROOMS, "helpers"}, "a folder of tests has the name of a room"
    assert not [path.name for path in TESTS.glob("*.py") if not path.name.startswith(("test_", "conftest"))]


def test_no_file_imports_a_test_file():
    """Shared code belongs in a helper module, because importing a test file also imports its fixtures."""
    files = sorted(TESTS.rglob("*.py"))
    tests = {path.stem for path in files if path.stem.startswith("test_")}
    assert len(tests) > 50 and len(tests) == sum(path.stem.startswith("test_") for path in files)
    for path in files:
        imported = {part for name in imported_names(path) for part in name}
        assert not imported & tests, f"{path.name} imports {sorted(imported & tests)}: move what it needs to a helper"
