"""WHICH parts to remove: the methods, by class and by name, and how scores become Architectures."""

from prunekit.methods.aptp.method import APTP
from prunekit.methods.base import Method, PruneResult, PruneSettings, ScoreMethod
from prunekit.methods.budget import Scores, select, select_mixture
from prunekit.methods.norm import Norm
from prunekit.methods.registry import describe, get, names, register

__all__ = [
    "APTP",
    "Method",
    "Norm",
    "PruneResult",
    "PruneSettings",
    "ScoreMethod",
    "Scores",
    "describe",
    "get",
    "names",
    "register",
    "select",
    "select_mixture",
]
