"""Run every public operation on the device: three precisions; eager, compiled by regions, and as a CUDA graph."""

import subprocess
import sys
from functools import cache, partial
from typing import Any

import small_transformers
import torch
import unets
from torch import Tensor

import prunekit as pk
from benchmarks.gpu_suite import ROOT, routed, training_terms
from benchmarks.gpu_suite.record import Found, Piece, Settings
from benchmarks.gpu_suite.reference import (
    DTYPES,
    MODES,
    TIMES,
    TOLERANCES,
    applies,
    compared,
    exact_float32,
    precisions,
    rounded,
    running,
    with_exact_guidance,
)
from prunekit.core.call import Call, normal, predict
from prunekit.core.registry import denoiser_of
from prunekit.jobs.bench.modes import Mode

TITLE = "Smoke: every public operation, equal to the CPU"
FAMILIES = ("sd1", "sd2", "sdxl", "pixart", "sd3", "sd35", "flux", "qwen_image")
COMPILED = ("sd35", "flux", "sd2")  # one family per kind of block, as compiling is slow; the smallest first
GPU_TESTS = ROOT / "tests" / "jobs" / "test_benchmark.py"
LATENT, TOKENS, KEEP = (8, 6), 5, 0.6


def step(name: str, settings: Settings) -> tuple[str, list[Piece]]:
    """Return the step's title and its pieces: calls, then training steps, then pictures."""
    found = [
        Piece(f"calls, {dtype}, {mode}", partial(calls, settings, dtype, mode))
        for mode in MODES
        for dtype in precisions(mode, settings.reduced)
    ]
    found += training_terms.pieces(settings) + routed.pieces(settings)
    if not settings.reduced:
        found.append(Piece("the project's tests that need a GPU", tests))
    return TITLE, found


def tests() -> Found:
    """Run the tests that are skipped on machines without a GPU.

    Raises:
        RuntimeError: A test failed.

    """
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "-k", "cuda", str(GPU_TESTS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout[-400:])
    return Found(rows=[{"tests": line} for line in done.stdout.splitlines() if line.startswith(("PASSED", "SKIPPED"))])


@cache
def model_of(family: str) -> Any:
    """Return a small denoiser of a family with random weights; a UNet has one layer per block."""
    made = unets.build(family, layers_per_block=1) if family in unets.SHAPES else small_transformers.build(family)
    return made.requires_grad_(False)


def call_of(model: Any, batch: int = 2) -> Call:
    """Return a call with random inputs and a separate timestep for each sample."""
    denoiser, times = denoiser_of(model), torch.tensor(TIMES[:batch])
    fill = normal(torch.Generator().manual_seed(1))
    return with_exact_guidance(denoiser.example(model, batch, LATENT, TOKENS, fill, times))


def calls(settings: Settings, dtype: str, mode: Mode) -> Found:
    """Compare calls of the dense model (in eager mode), the sliced model and the model under gates with the CPU's.

    The model under gates is compared with the CPU's sliced model (law 1).
    """
    if reason := applies(mode, settings.device):
        return Found(left_out=[f"{mode}: {reason}"])
    found, tolerance = Found(), TOLERANCES[dtype]
    families = FAMILIES if mode != "compiled" else COMPILED[:1] if settings.reduced else COMPILED
    for family in families:
        with exact_float32(), torch.no_grad():
            model, reference = rounded(model_of(family), DTYPES[dtype], settings.device)
            space = pk.discover(model)
            architecture = space.random(KEEP, seed=1)
            call = call_of(reference)
            here = call.to(model)
            sliced = pk.slice_model(model, architecture)
            with running([(sliced, here)], mode, settings.reduced):
                cut = predict(sliced, here)
            if mode == "eager":
                found.comparisons.append(
                    compared(f"{family}: dense", predict(model, here), predict(reference, call), tolerance)
                )
            expected = predict(pk.slice_model(reference, architecture), call)
            found.comparisons.append(compared(f"{family}: sliced", cut, expected, tolerance))
            masked = under_gates(model, architecture, here, mode, settings.reduced)
            found.comparisons.append(compared(f"{family}: under gates", masked, expected, tolerance))
    return found


def under_gates(model: Any, architecture: pk.Architecture, call: Call, mode: Mode, reduced: bool) -> Tensor:
    """Return the output of a model whose gates are set to an architecture."""
    with pk.gated(model, architecture.space) as gates:
        gates.set(architecture)
        with running([(model, call)], mode, reduced):
            return predict(model, call)
