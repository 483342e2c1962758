"""WHICH parts to remove: the methods, by class and by name, and how scores become Architectures.

Names are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from prunekit.methods.registry import describe, get, names, register

if TYPE_CHECKING:
    from prunekit.methods.aptp.method import APTP
    from prunekit.methods.base import Method, ScoreMethod
    from prunekit.methods.bksdm import BKSDM
    from prunekit.methods.budget import Scores, select, select_mixture
    from prunekit.methods.norm import Norm
    from prunekit.methods.random import Random
    from prunekit.methods.result import PruneResult, ResultInfo
    from prunekit.methods.settings import PruneSettings
    from prunekit.methods.taylor_sp import TaylorSP
    from prunekit.methods.uniarch import UniArch
    from prunekit.methods.workload import Calibration, MethodWork, Search

__all__ = [
    "APTP",
    "BKSDM",
    "Calibration",
    "Method",
    "MethodWork",
    "Norm",
    "PruneResult",
    "PruneSettings",
    "Random",
    "ResultInfo",
    "ScoreMethod",
    "Scores",
    "Search",
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
    "PruneSettings": "settings",
    **dict.fromkeys(("Method", "ScoreMethod"), "base"),
    **dict.fromkeys(("PruneResult", "ResultInfo"), "result"),
    **dict.fromkeys(("Calibration", "MethodWork", "Search"), "work"),
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
