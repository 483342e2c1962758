"""Modes in which a denoiser is timed: eager, compiled by regions, or replayed as a CUDA graph."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from diffusers import ModelMixin
from torch import Tensor

from prunekit.core.call import Call, predict
from prunekit.core.registry import denoiser_of
from prunekit.runtime.errors import UserError

Mode = Literal["eager", "compiled", "cuda_graph"]
ISOLATED = "isolate_recompiles"  # option of newer torch.compile: no region searches another's graphs
LIMITS: dict[str, Any] = {
    "recompile_limit": 1024,
    "accumulated_recompile_limit": 8192,
}  # each block of a pruned denoiser may have its own shapes


@contextmanager
def in_mode(model: ModelMixin, mode: Mode, call: Call, backend: str = "inductor") -> Iterator[None]:
    """Run a model in a mode inside this context; restore the model on exit.

    Args:
        model: frozen model in evaluation mode.
        mode: "eager": unchanged. "compiled": each of `Denoiser.regions` is compiled alone, as one graph for its shapes;
            the different shapes of a pruned model's blocks cost compile time, but never a silent fallback to eager.
            "cuda_graph": the eager call is captured once and replayed.
        call: a call with the shapes of all calls in the context.
        backend: backend of torch.compile.

    Raises:
        ValueError: an unknown mode, or a CUDA graph on a device other than CUDA.

    """
    if mode == "eager":
        yield
    elif mode == "compiled":
        with _compiled(model, backend):
            yield
    elif mode == "cuda_graph":
        with _graphed(model, call):
            yield
    else:
        raise UserError(f"mode={mode!r}: choose eager, compiled or cuda_graph")


@contextmanager
def _compiled(model: ModelMixin, backend: str) -> Iterator[None]:
    import torch._dynamo

    known = inspect.signature(torch.compile).parameters
    extra = {ISOLATED: True} if ISOLATED in known else {}
    with ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(**LIMITS))
        for module in denoiser_of(model).regions(model):
            stack.callback(setattr, module, "_compiled_call_impl", module._compiled_call_impl)
            module.compile(fullgraph=True, dynamic=False, backend=backend, **extra)
        yield


@contextmanager
def _graphed(model: ModelMixin, call: Call) -> Iterator[None]:
    if model.device.type != "cuda":
        raise UserError(f"mode=cuda_graph needs a CUDA device; this model is on {model.device.type}")
    static = call.map(Tensor.clone)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):  # the setup of a first call must not be captured
        for _ in range(3):
            predict(model, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output = model(**static, return_dict=False)[0]  # raw output, which `predict` completes
    signature, before = inspect.signature(model.forward), vars(model).get("forward")

    def replay(*positional: Any, **named: Any) -> tuple[Tensor]:
        refill(static, signature.bind(*positional, **named).arguments)
        graph.replay()
        return (output.clone(),)

    model.forward = replay
    try:
        yield
    finally:
        if before is None:
            del model.forward
        else:  # the model runs under gates, which wrap it
            model.forward = before


def refill(static: Call, arguments: Mapping[str, Any]) -> None:
    """Copy a forward pass's arguments into the tensors of a call, which has the same names and shapes."""
    given = Call({name: arguments[name] for name in static}, shared=static.shared)
    for target, value in zip(static.tensors(), given.tensors(), strict=True):
        target.copy_(value)
