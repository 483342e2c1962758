"""WHICH parts to remove: the methods, by class and by name, and how scores become Architectures.

Names are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from prunekit.methods.registry import describe, get, names, register

if TYPE_CHECKING:
    from prunekit.methods.aptp.method import APTP
    from prunekit.methods.base import Method, PruneResult, PruneSettings, ScoreMethod
    from prunekit.methods.bksdm import BKSDM
    from prunekit.methods.budget import Scores, select, select_mixture
    from prunekit.methods.norm import Norm
    from prunekit.methods.random import Random
    from prunekit.methods.taylor_sp import TaylorSP
    from prunekit.methods.uniarch import UniArch

__all__ = [
    "APTP",
    "BKSDM",
    "Method",
    "Norm",
    "PruneResult",
    "PruneSettings",
    "Random",
    "ScoreMethod",
    "Scores",
    "TaylorSP",
    "UniArch",
    "describe",
    "get",
    "names",
    "register",
    "select",
    "select_mixture",
]

_MODULE_OF = {
    "APTP": "aptp.method",
    "BKSDM": "bksdm",
    "Norm": "norm",
    "Random": "random",
    "TaylorSP": "taylor_sp",
    "UniArch": "uniarch",
    **dict.fromkeys(("Method", "PruneResult", "PruneSettings", "ScoreMethod"), "base"),
    **dict.fromkeys(("Scores", "select", "select_mixture"), "budget"),
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'prunekit.methods' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"prunekit.methods.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
