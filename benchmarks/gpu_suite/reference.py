"""The reference that every step is compared with, float32 on the CPU, and how far a result may lie from it."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_suite.record import Comparison
from prunekit.core.call import Call, predict
from prunekit.jobs.bench.modes import Mode, in_mode

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODES: tuple[Mode, ...] = ("eager", "compiled", "cuda_graph")
# Relative L2 error of one denoiser call. float32 is without TF32; a lower precision keeps 8 or 11 bits of a number and
# passes through some hundred layers. The small models' norm weights and biases are random, which is the hardest case.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
GRADIENT = (
    2  # times a call's tolerance, for a gradient, or what some steps make of one: a backward pass is as long again
)
GUIDANCE, TIMES = 2.0, (125.0, 500.0)  # of compared calls: exact in bfloat16 in thousandths and a thousandfold
SAMPLING = 5  # times a call's tolerance, for pictures: errors of several calls add up, and guidance multiplies them


def relative_error(found: Tensor, reference: Tensor) -> float:
    """Return the L2 error of a tensor over the reference's norm, in float64 on the CPU."""
    found, reference = (values.detach().to("cpu", torch.float64) for values in (found, reference))
    return float((found - reference).norm() / reference.norm().clamp_min(1e-300))


def compared(what: str, found: Tensor, reference: Tensor, tolerance: float) -> Comparison:
    """Return the comparison of a tensor with the reference's."""
    return Comparison(what, relative_error(found, reference), tolerance)


@contextmanager
def exact_float32() -> Iterator[None]:
    """A context in which float32 is float32 on a GPU: no TF32 in convolutions and products."""
    before = (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision())
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def rounded(model: nn.Module, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """Return a model in a dtype on a device, and the reference: the same rounded weights in float32 on the CPU."""
    low = nn.Module.to(copy.deepcopy(model), dtype)  # diffusers' own `to` warns of a dtype's change
    return nn.Module.to(copy.deepcopy(low), device), nn.Module.to(low, torch.float32)


@torch.no_grad()
def on_cpu(model: nn.Module, call: Call) -> Tensor:
    """Return a model's output by a float32 copy of it on the CPU."""
    copied = nn.Module.to(copy.deepcopy(model), CPU, torch.float32)
    return predict(copied, call.to(CPU, torch.float32))


def with_exact_guidance(call: Call) -> Call:
    """Return a call whose guidance, a thousandfold in FLUX.1's embedding, is exact in bfloat16.

    Else the rounding of the product changes the embedding, in the model itself, by more than all its layers do.
    """
    return call.replace(guidance=torch.full_like(call["guidance"], GUIDANCE)) if "guidance" in call else call


def precisions(mode: Mode, reduced: bool) -> tuple[str, ...]:
    """Return the precisions that a mode is tried in; reduced: one where compiling takes the time."""
    return ("bfloat16",) if reduced and mode == "compiled" else tuple(DTYPES)


def applies(mode: Mode, device: torch.device) -> str | None:
    """Return why a mode cannot be tried on a device; None where it can."""
    return "a CUDA graph needs a CUDA device" if mode == "cuda_graph" and device.type != "cuda" else None


@contextmanager
def running(models: Sequence[tuple[Any, Call]], mode: Mode, reduced: bool) -> Iterator[None]:
    """Run models in a mode, each for the shapes of its call; reduced: no kernels are made of what is compiled."""
    with ExitStack() as stack:
        for model, call in models:
            stack.enter_context(in_mode(model, mode, call, backend="eager" if reduced else "inductor"))
        yield


def free(device: torch.device) -> None:
    """Give back the memory of what is no longer used."""
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def out_of_memory(make: Callable[[], Any]) -> Any | None:
    """Return what a function returns; None where the GPU's memory is too small for it."""
    try:
        return make()
    except torch.cuda.OutOfMemoryError:
        return None
