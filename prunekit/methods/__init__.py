"""Pruning methods, by class and by name, and the selection of Architectures from scores.

A name is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from prunekit.methods.registry import describe, get, names, register

if TYPE_CHECKING:
    from prunekit.methods.aptp.method import APTP
    from prunekit.methods.base import Method, ScoreMethod, budget_cost, describe_result, space_of
    from prunekit.methods.bksdm import BKSDM
    from prunekit.methods.budget import Scores, select, select_mixture
    from prunekit.methods.depth import Depth
    from prunekit.methods.norm import Norm
    from prunekit.methods.obs import OBS
    from prunekit.methods.one_mask import OneMask
    from prunekit.methods.random import Random
    from prunekit.methods.result import PruneResult, ResultInfo
    from prunekit.methods.router import Router
    from prunekit.methods.settings import PruneSettings
    from prunekit.methods.taylor_sp import TaylorSP
    from prunekit.methods.timestep_experts import TimestepExperts
    from prunekit.methods.uniarch import UniArch
    from prunekit.methods.workload import Calibration, MethodWork, Search
    from prunekit.runtime.randomness import generator

__all__ = [
    "APTP",
    "BKSDM",
    "OBS",
    "Calibration",
    "Depth",
    "Method",
    "MethodWork",
    "Norm",
    "OneMask",
    "PruneResult",
    "PruneSettings",
    "Random",
    "ResultInfo",
    "Router",
    "ScoreMethod",
    "Scores",
    "Search",
    "TaylorSP",
    "TimestepExperts",
    "UniArch",
    "budget_cost",
    "describe",
    "describe_result",
    "generator",
    "get",
    "names",
    "register",
    "select",
    "select_mixture",
    "space_of",
]

_MODULES = {
    "methods.aptp.method": ["APTP"],
    "methods.base": ["Method", "ScoreMethod", "budget_cost", "describe_result", "space_of"],
    "methods.bksdm": ["BKSDM"],
    "methods.budget": ["Scores", "select", "select_mixture"],
    "methods.depth": ["Depth"],
    "methods.norm": ["Norm"],
    "methods.obs": ["OBS"],
    "methods.one_mask": ["OneMask"],
    "methods.random": ["Random"],
    "methods.result": ["PruneResult", "ResultInfo"],
    "methods.router": ["Router"],
    "methods.settings": ["PruneSettings"],
    "methods.taylor_sp": ["TaylorSP"],
    "methods.timestep_experts": ["TimestepExperts"],
    "methods.uniarch": ["UniArch"],
    "methods.workload": ["Calibration", "MethodWork", "Search"],
    "runtime.randomness": ["generator"],
}
_MODULE_OF = {name: module for module, names_in_it in _MODULES.items() for name in names_in_it}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'prunekit.methods' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"prunekit.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
