"""Timing a callable with the clock for its device, and measuring the peak memory of a call."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunekit.core.call import Call, normal, predict
from prunekit.core.registry import denoiser_of
from prunekit.runtime.errors import UserError

if TYPE_CHECKING:
    from diffusers import ModelMixin

TimeOf = Callable[[Callable[[], Any], int], float]  # (function, number of calls) -> seconds per call
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def clock(device: str | torch.device) -> TimeOf:
    """Return the function that times a callable on a device, "cpu" or "cuda"; raise UserError for another device."""
    device = torch.device(device)
    if device.type == "cpu":
        return _monotonic
    if device.type == "cuda":
        return _events(device)
    raise UserError(f"timing on {device.type!r} is not supported; choose cpu or cuda")


def _monotonic(function: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(calls):
        function()
    return (time.perf_counter_ns() - start) * 1e-9 / calls


def _events(device: torch.device) -> TimeOf:
    """Return a timer by CUDA events; before each call, it flushes the L2 cache by a write of twice its size."""
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(max(size, 1 << 20), dtype=torch.int8, device=device)

    def time_of(function: Callable[[], Any], calls: int) -> float:
        total = 0.0
        for _ in range(calls):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda.synchronize(device)  # the function's own launches are part of its time
            start.record()
            function()
            end.record()
            torch.cuda.synchronize(device)
            total += start.elapsed_time(end) * 1e-3
        return total / calls

    return time_of


def peak_memory(function: Callable[[], Any], device: str | torch.device) -> int | None:
    """Return the peak memory of one call, in bytes above the memory held before it; None if the system does not tell.

    CUDA: exact, from the allocator. CPU: from the process's peak resident size (Linux), except for memory that malloc
    kept. An error of the call itself is raised.
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held
    try:
        _trim()
        RESET.write_text("5")  # reset the peak
        held = _resident("VmRSS")
    except OSError:
        return None
    function()
    try:
        return max(0, _resident("VmHWM") - held)
    except OSError:
        return None


def _resident(field: str) -> int:
    """Return a size of the process in bytes; raise OSError if the system does not tell it."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"{STATUS} has no {field}")


def _trim() -> None:
    """Release the free memory that malloc keeps, so that it does not hide a new allocation; only glibc can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def timed_inputs(model: ModelMixin, batch: int, latent: int | tuple[int, int], text_length: int, seed: int = 0) -> Call:
    """Return a call with Gaussian latents and texts for `batch` samples, on a model's device and in its dtype.

    The timestep is a scalar, as in a pipeline; its value does not change the time.
    """
    sides = (latent, latent) if isinstance(latent, int) else latent
    fill = normal(torch.Generator().manual_seed(seed))
    return denoiser_of(model).example(model, batch, sides, text_length, fill).to(model)


def timed_call(model: ModelMixin, call: Call) -> Callable[[], Tensor]:
    """Return a function that runs the model on the call."""
    return lambda: predict(model, call)
