"""Methods by name: from the built-in table, the decorator, or another package's entry-point group `prunekit.methods`.

A method's module is imported when the method is first used, so listing methods imports neither torch nor diffusers.
"""

import ast
import importlib
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from prunekit.runtime.errors import UserError, nearest

if TYPE_CHECKING:
    from prunekit.methods.base import Method

GROUP = "prunekit.methods"
M = TypeVar("M", bound=type[Any])
BUILT_IN = {  # our methods: module in this package, and class
    "aptp": ("aptp.method", "APTP"),
    "bksdm": ("bksdm", "BKSDM"),
    "depth": ("depth", "Depth"),
    "norm": ("norm", "Norm"),
    "obs": ("obs", "OBS"),
    "one_mask": ("one_mask", "OneMask"),
    "random": ("random", "Random"),
    "taylor_sp": ("taylor_sp", "TaylorSP"),
    "timestep_experts": ("timestep_experts", "TimestepExperts"),
    "uniarch": ("uniarch", "UniArch"),
}

_methods: dict[str, Any] = {}


def register(name: str) -> Callable[[M], M]:
    """Return a class decorator that makes a method available as `name` to recipes and commands.

    Raises:
        ValueError: the name is taken by another class, or is not lower case letters, digits and underscores.

    """

    def add(method: M) -> M:
        if not name.isidentifier() or name != name.lower():
            raise UserError(f"a method's name is lower_case letters, digits and underscores; got {name!r}")
        taken = _methods.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (method.__module__, method.__qualname__):
            raise UserError(
                f"method {name!r} is already registered by {taken.__module__}.{taken.__qualname__}; "
                f"choose another name for {method.__module__}.{method.__qualname__}"
            )
        _methods[name] = method
        setattr(method, "name", name)  # noqa: B010 - a type variable is not known to have it
        return method

    return add


def get(name: str) -> type["Method"]:
    """Return the method class registered as `name`.

    Raises:
        ValueError: no such method (the message has the nearest names and all of them), a name that two packages
            claim, or another package's method that cannot be imported.

    """
    if name in _methods:
        return _methods[name]
    if name in BUILT_IN:
        module, class_name = BUILT_IN[name]
        return register(name)(getattr(importlib.import_module(f"{__package__}.{module}"), class_name))
    external = _entry_points()
    if name in external:
        return _load(external[name])
    available = names()
    hint = nearest(str(name).lower().replace("-", "_"), available, 3, 0.5) or "."
    raise UserError(f"unknown method {name!r}{hint} Available: {', '.join(available)}")


def names() -> list[str]:
    """Return all names that `get` knows, sorted; nothing is imported."""
    return sorted({*_methods, *BUILT_IN, *_entry_points()})


def describe() -> dict[str, str]:
    """Return one line per method, from its docstring; nothing is imported.

    For another package's method that was not used yet, the line says where the method comes from.
    """
    docs = {name: f"from {point.value}" for name, point in _entry_points().items()}
    docs |= {name: _docstring(*place) for name, place in BUILT_IN.items()}
    docs |= {name: method.__doc__ or "" for name, method in _methods.items()}
    return {name: doc.strip().split("\n")[0] for name, doc in sorted(docs.items())}


def _docstring(module: str, class_name: str) -> str:
    """Return the docstring of a built-in method's class, read from its file."""
    path = Path(__file__).parent.joinpath(*module.split(".")).with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    return ast.get_docstring(classes[class_name]) or ""


def _entry_points() -> dict[str, EntryPoint]:
    points: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        if points.setdefault(point.name, point).value != point.value:
            raise UserError(
                f"two packages register method {point.name!r} in the entry-point group {GROUP}: "
                f"{points[point.name].value} and {point.value}; uninstall or rename one of them"
            )
    return points


def _load(point: EntryPoint) -> type["Method"]:
    try:
        method = point.load()
    except Exception as error:
        raise UserError(
            f"method {point.name!r} comes from {point.value}, which cannot be imported: "
            f"{type(error).__name__}: {error}. Repair or uninstall that package"
        ) from error
    return register(point.name)(method)
