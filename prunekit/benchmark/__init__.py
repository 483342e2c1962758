"""Latency: what a model's call, sampling and image take, interleaved with the dense model, with the noise floor."""

from prunekit.benchmark.config import BenchRecipe, load_bench_recipe, reduced
from prunekit.benchmark.modes import in_mode
from prunekit.timing import (
    Measurement,
    Ratio,
    Timing,
    WarmUp,
    environment,
    measure,
    paired_ratio,
    peak_memory,
)

__all__ = [
    "BenchRecipe",
    "Measurement",
    "Ratio",
    "Timing",
    "WarmUp",
    "environment",
    "in_mode",
    "load_bench_recipe",
    "measure",
    "paired_ratio",
    "peak_memory",
    "reduced",
]
