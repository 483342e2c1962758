"""The speed of a device in MACs per second: stated by the user, or measured on this machine."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import ModelMixin

from prunekit.core.call import predict
from prunekit.jobs.plan.rehearsal import zero_call

MOST_RUN_PARAMS = 50_000_000  # up to this size the denoiser itself is timed; for a larger one, a matrix product
BATCH, SIDE = 8, 1024  # samples of a timed denoiser call; rows and columns of a timed matrix product


@dataclass(frozen=True)
class Speed:
    """MACs per second of a device, and where the figure comes from."""

    macs_per_second: float
    source: str


def measure_speed(
    model: ModelMixin,
    macs: int,
    latent: tuple[int, int],
    text_length: int,
    precision: str,
    seconds: float = 1.0,
) -> Speed:
    """Measure this machine's speed for about `seconds`: time the denoiser if it is small, else a matrix product.

    model: denoiser on the meta device; a small one is built with zero weights.
    macs: MACs of one sample at the latent size `latent` (h, w).
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    dtype = getattr(torch, precision)
    if sum(p.numel() for p in model.parameters()) <= MOST_RUN_PARAMS:
        with torch.device(device):
            timed_model = type(model).from_config(model.config).eval()
        with torch.no_grad(), torch.autocast(device, dtype, enabled=precision != "float32"):
            for tensor in (*timed_model.parameters(), *timed_model.buffers()):
                tensor.zero_()
            call = zero_call(timed_model, latent, text_length, BATCH, device)
            fastest = _time(lambda: predict(timed_model, call), device, seconds)
        what = f"this denoiser's forward pass in {precision} with zeros for weights, batch {BATCH}"
        return Speed(BATCH * macs / fastest, f"measured on {name} for {seconds:g} s: {what}")
    a, b = (torch.ones(SIDE, SIDE, device=device, dtype=dtype) for _ in range(2))
    fastest = _time(lambda: a @ b, device, seconds)
    what = f"a {SIDE} x {SIDE} matrix product in {precision}, which no denoiser reaches: times are lower bounds"
    return Speed(SIDE**3 / fastest, f"measured on {name} for {seconds:g} s: {what}")


def _time(function: Callable[[], object], device: str, seconds: float) -> float:
    """Call a function for `seconds` in total; return the median seconds of a call, without the first call."""
    times: list[float] = []
    while len(times) < 2 or sum(times) < seconds:
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[len(times[1:]) // 2]
