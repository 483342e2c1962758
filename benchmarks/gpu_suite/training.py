"""Compare the steps per second and peak memory of search and fine-tuning with a plain implementation.

The model is Stable Diffusion 2.1 at 256 px with random weights. Measured are micro-batches of several sizes, with
activations kept and recomputed. The plain implementation is `benchmarks/peers/plain.py`: the same mathematics in
float32, with the encoders run at every step. Both implementations run in one process and share weights, so the
reported memory is the memory of a step beyond the memory that both hold.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import step as peers
import torch

from benchmarks.gpu_suite.record import Found, Piece, Settings
from benchmarks.gpu_suite.reference import CPU, TOLERANCES, compared, free, out_of_memory
from prunekit.measuring.clock import peak_memory
from prunekit.measuring.interleaved import WarmUp, measure

TITLE = "Search and fine-tuning steps at 256 px: steps per second and peak memory, beside the plain implementation"
SAMPLES = "denoising and distillation"
STAGES = {"search": peers.search, "fine-tuning": peers.fine_tuning}


@dataclass(frozen=True)
class Amount:
    """Size of the measurement. compared: samples of the step that the CPU also runs. pairs: timed samples per arm."""

    model: str
    batch: int
    micros: tuple[int, ...]
    compared: int
    pairs: int
    warm_up: WarmUp


FULL = Amount("sd-2.1", 32, (8, 32, 4, 16), 4, 5, WarmUp(max_rounds=6, max_seconds=20.0))
SMALL = Amount("emoji", 4, (2,), 2, 1, WarmUp(max_rounds=1))


def step(name: str, settings: Settings) -> tuple[str, list[Piece]]:
    """Return the step's title and its pieces.

    The first pieces compare loss terms; then there is one piece per micro-batch, memory mode and stage.
    """
    amount = SMALL if settings.reduced else FULL
    found = [Piece(f"{stage}: terms", partial(terms_of, settings, amount, stage)) for stage in STAGES]
    found += [
        Piece(
            f"{stage}, micro-batch {micro}, {'recomputed' if recomputed else 'kept'} activations",
            partial(speed_of, settings, amount, stage, micro, recomputed),
        )
        for micro in amount.micros
        for recomputed in (False, True)
        for stage in STAGES
    ]
    return TITLE, found


@cache
def world(model: str, batch: int, device: torch.device, precision: str) -> peers.World:
    """Return the pipeline and its data; the pieces of a process share them."""
    return peers.World(model, batch, batch, precision=precision, device=device)


def terms_of(settings: Settings, amount: Amount, stage: str) -> Found:
    """Compare the loss terms of one step in bfloat16 on the device with float32 on the CPU."""
    tolerance = TOLERANCES["bfloat16"]
    here = world(amount.model, amount.compared, settings.device, "bfloat16")
    there = world(amount.model, amount.compared, CPU, "float32")
    there.data = here.data  # encoded once, so that only the step is compared
    terms, expected = (first_terms(each, stage) for each in (here, there))
    free(settings.device)
    return Found(
        comparisons=[compared(f"{stage}: {name}", terms[name], expected[name], tolerance) for name in expected]
    )


def first_terms(own: peers.World, stage: str) -> dict[str, torch.Tensor]:
    """Return the loss terms of prunekit's first step, with denoising and distillation added into one.

    A search starts with open gates, so its distillation term is the difference of nearly equal outputs. Alone, this
    term is mostly rounding error.
    """
    with ExitStack() as stack:
        terms = STAGES[stage](own, stack)["prunekit"]()
    samples = torch.stack([terms.pop(name) for name in ("denoising", "distillation")]).sum()
    return {**terms, SAMPLES: samples}


def speed_of(settings: Settings, amount: Amount, stage: str, micro: int, recomputed: bool) -> Found:
    """Time the steps of both arms, and measure their memory; an arm that runs out of memory gets a row with a note."""
    own = world(amount.model, amount.batch, settings.device, "bfloat16")
    own.ours |= {"micro_batch": micro, "gradient_checkpointing": recomputed}
    common: dict[str, Any] = {"step": stage, "batch": amount.batch, "micro-batch": micro}
    common["activations"] = "recomputed" if recomputed else "kept"
    found = Found()
    with ExitStack() as stack:
        arms = STAGES[stage](own, stack)
        peaks = {}
        for name, arm in arms.items():
            out_of_memory(arm)  # the first step allocates the optimizer's moments, which stay allocated
            free(settings.device)
            peaks[name] = out_of_memory(partial(peak_memory, arm, settings.device))
            free(settings.device)
        fitting = {name: arm for name, arm in arms.items() if peaks[name] is not None or settings.device.type == "cpu"}
        measured = measure(fitting, amount.pairs, settings.device, amount.warm_up) if fitting else None
        for name in arms:
            row = {**common, "implementation": name}
            if measured is None or name not in fitting:
                found.rows.append({**row, "note": "out of memory"})
                continue
            peak = peaks[name]
            row |= {"steps per second": 1 / measured.arms[name].p50, "samples": measured.arms[name].count}
            row |= {"peak beyond held (GB)": None if peak is None else peak / 1e9}
            if name != measured.reference:
                row |= {"time of plain [95 %]": str(measured.ratio(name))}
            found.rows.append({**row, "noise floor": f"±{measured.noise.distance:.1%}"})
        del arms, fitting
    free(settings.device)
    return found
