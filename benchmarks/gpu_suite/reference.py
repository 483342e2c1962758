"""Compute the reference of every step (float32 on the CPU), and define the largest allowed errors."""

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
# Largest relative L2 error of one denoiser call. float32 is without TF32. bfloat16 keeps 8 bits of a number's
# precision and float16 keeps 11, and a call passes through some hundred layers. The small models' norm weights and
# biases are random, which is the hardest case.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
GRADIENT = (
    2  # factor on a call's tolerance for gradients and results of several steps: a backward pass doubles the layers
)
GUIDANCE, TIMES = 2.0, (125.0, 500.0)  # inputs of compared calls; exact in bfloat16, also divided or multiplied by 1000
SAMPLING = 5  # factor on a call's tolerance for pictures: errors of several calls add up, and guidance multiplies them


def relative_error(found: Tensor, reference: Tensor) -> float:
    """Return the L2 norm of `found - reference` divided by the norm of `reference`, in float64 on the CPU."""
    found, reference = (values.detach().to("cpu", torch.float64) for values in (found, reference))
    return float((found - reference).norm() / reference.norm().clamp_min(1e-300))


def compared(what: str, found: Tensor, reference: Tensor, tolerance: float) -> Comparison:
    """Return the comparison of a tensor with the reference."""
    return Comparison(what, relative_error(found, reference), tolerance)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Turn off TF32 in convolutions and matrix products within the context."""
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
    low = nn.Module.to(copy.deepcopy(model), dtype)  # the `to` of diffusers warns when the dtype changes
    return nn.Module.to(copy.deepcopy(low), device), nn.Module.to(low, torch.float32)


@torch.no_grad()
def on_cpu(model: nn.Module, call: Call) -> Tensor:
    """Return the output of a float32 copy of a model on the CPU."""
    copied = nn.Module.to(copy.deepcopy(model), CPU, torch.float32)
    return predict(copied, call.to(CPU, torch.float32))


def with_exact_guidance(call: Call) -> Call:
    """Return a call whose guidance is exact in bfloat16 after FLUX.1's embedding multiplies it by 1000.

    Otherwise the model rounds the product, which changes its embedding by more than all its layers do.
    """
    return call.replace(guidance=torch.full_like(call["guidance"], GUIDANCE)) if "guidance" in call else call


def precisions(mode: Mode, reduced: bool) -> tuple[str, ...]:
    """Return the precisions in which a mode is tested; if reduced, only bfloat16 for the slow mode "compiled"."""
    return ("bfloat16",) if reduced and mode == "compiled" else tuple(DTYPES)


def applies(mode: Mode, device: torch.device) -> str | None:
    """Return why a mode cannot run on a device, or None if it can."""
    return "a CUDA graph needs a CUDA device" if mode == "cuda_graph" and device.type != "cuda" else None


@contextmanager
def running(models: Sequence[tuple[Any, Call]], mode: Mode, reduced: bool) -> Iterator[None]:
    """Put models into a mode, each for the shapes of its call; if reduced, "compiled" generates no kernels."""
    with ExitStack() as stack:
        for model, call in models:
            stack.enter_context(in_mode(model, mode, call, backend="eager" if reduced else "inductor"))
        yield


def free(device: torch.device) -> None:
    """Free unused memory, also of torch's CUDA cache."""
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def out_of_memory(make: Callable[[], Any]) -> Any | None:
    """Return the function's result, or None if the GPU runs out of memory."""
    try:
        return make()
    except torch.cuda.OutOfMemoryError:
        return None
