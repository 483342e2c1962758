"""Precision of forward passes: what `auto` means on a device, and the autocast context that follows from it.

A processor without bfloat16 instructions computes in bfloat16 and float16 about 20 times slower than in float32. With
small layers, some processors that have these instructions are also slower in bfloat16 (an Intel Xeon with AMX: 1.4
times). So `auto` depends on the hardware: bfloat16 where the device has instructions for it and, on a CPU, where a
measurement finds it about as fast as float32; float16 on older GPUs (training scales the loss); float32 elsewhere.
"""

import os
import platform
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from prunekit.runtime.errors import UserError

Precision = Literal["auto", "float32", "bfloat16", "float16"]
UnscaledPrecision = Literal["auto", "float32", "bfloat16"]  # for gradients without loss scaling; float16 needs it
LOWER = {"bfloat16": torch.bfloat16, "float16": torch.float16}
VARIABLE = "PRUNEKIT_PRECISION"  # environment variable that sets what `auto` means on any hardware
AUTO = "auto: bfloat16 if the device supports it and is not slower with it, float16 on older GPUs, else float32."
UNSCALED_AUTO = "auto: bfloat16 if the device supports it and is not slower with it, else float32."
CPU_INFO = Path("/proc/cpuinfo")
NATIVE_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # flags of /proc/cpuinfo: x86 has the first two, Arm the last
NO_SLOWER = 1.1  # `auto` takes bfloat16 on a CPU if it needs at most this multiple of float32's time
SLOW = 1.5  # a requested lower precision that needs more than this multiple of float32's time gets a warning
SIDE, CHANNELS = 16, 64  # image side and channels of the convolution that measures a precision's speed


def resolve_precision(
    precision: str, device: str | torch.device, scaled: bool = True, meaning: str | None = None
) -> str:
    """Return "float32", "bfloat16" or "float16": the given precision, or what `auto` means on a device.

    The environment variable PRUNEKIT_PRECISION, where it is set, decides what `auto` means.

    Args:
        precision: a `Precision`.
        device: the device that forward passes run on.
        scaled: whether gradients are scaled; without scaling, float16 underflows, and `auto` means float32 instead.
        meaning: what `auto` means, for a device that this machine does not have; None: PRUNEKIT_PRECISION or this
            machine's hardware decides.

    Raises:
        UserError: PRUNEKIT_PRECISION is not one of the three.

    """
    if precision != "auto":
        return precision
    forced = meaning or os.environ.get(VARIABLE)
    if forced and forced not in ("float32", *LOWER):
        raise UserError(f"{VARIABLE}={forced!r}: set it to float32, bfloat16 or float16, or unset it")
    auto_precision = forced or _native(torch.device(device).type)
    return auto_precision if scaled or auto_precision != "float16" else "float32"


def autocast(precision: str, device: str | torch.device) -> torch.autocast:
    """Return the autocast context for forward passes in a precision; for float32, the context does nothing."""
    dtype = LOWER.get(resolve_precision(precision, device))
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None)


def has_native_bfloat16(device_type: str = "cpu") -> bool:
    """Return whether a kind of device ("cpu", "cuda") has instructions for bfloat16 products."""
    if device_type == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return False
    if CPU_INFO.is_file():
        lines = CPU_INFO.read_text(errors="replace").splitlines()
        flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
        return bool(NATIVE_BFLOAT16 & set(flags.split()))
    capabilities: dict[str, Any] = getattr(
        torch.cpu, "get_capabilities", dict
    )()  # for Windows; on macOS, bfloat16 instructions are not detected
    return platform.system() == "Windows" and bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@lru_cache(maxsize=4)
def slowdown(precision: str, device_type: str = "cpu") -> float:
    """Return the time of a small convolution, forward and backward, in a precision, divided by its time in float32.

    The time is measured once per process, in less than a second. It is the shortest of five runs with one thread, so
    other work on the machine has little effect. On a GPU, nothing is measured and the result is 1.
    """
    if device_type != "cpu" or precision not in LOWER:
        return 1.0
    layer, image = torch.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), torch.ones(8, CHANNELS, SIDE, SIDE)
    seconds, threads = dict.fromkeys(("float32", precision), float("inf")), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(5):
            for tried in seconds:
                started = time.perf_counter()
                with autocast(tried, device_type):
                    output = layer(image)
                output.float().square().mean().backward()
                seconds[tried] = min(seconds[tried], time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return seconds[precision] / seconds["float32"]


def why(device: str | torch.device) -> str:
    """Return the reason for the precision that `auto` means on a device, in a few words."""
    kind = torch.device(device).type
    if os.environ.get(VARIABLE):
        return f"{VARIABLE} says so"
    if not has_native_bfloat16(kind):
        return f"this {'GPU' if kind == 'cuda' else 'CPU'} has no bfloat16 units"
    if kind == "cpu" and (factor := slowdown("bfloat16")) > NO_SLOWER:
        return f"this CPU has bfloat16 units, and takes {factor:.1f} times as long with them"
    return f"this {'GPU' if kind == 'cuda' else 'CPU'} has bfloat16 units"


def _native(device_type: str) -> str:
    if has_native_bfloat16(device_type) and (device_type != "cpu" or slowdown("bfloat16") <= NO_SLOWER):
        return "bfloat16"
    return "float16" if device_type == "cuda" else "float32"
