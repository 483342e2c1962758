"""WHICH parts to remove: the methods, by class and by name, and how scores become Architectures."""

from prunekit.methods.aptp.method import APTP
from prunekit.methods.base import Method, PruneResult, PruneSettings, ScoreMethod
from prunekit.methods.bksdm import BKSDM
from prunekit.methods.budget import Scores, select, select_mixture
from prunekit.methods.norm import Norm
from prunekit.methods.random import Random
from prunekit.methods.registry import describe, get, names, register
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
