"""How a UNet is run while it is timed: eager, compiled by regions, or replayed as a CUDA graph."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from prunekit.errors import UserError

Mode = Literal["eager", "compiled", "cuda_graph"]
REGIONS = (ResnetBlock2D, BasicTransformerBlock)
ISOLATED = "isolate_recompiles"  # of torch.compile where it has it: no region looks through another's graphs
LIMITS: dict[str, Any] = {
    "recompile_limit": 1024,
    "accumulated_recompile_limit": 8192,
}  # a pruned UNet has a shape per block


@contextmanager
def in_mode(
    unet: UNet2DConditionModel, mode: Mode, inputs: Mapping[str, Any], backend: str = "inductor"
) -> Iterator[None]:
    """Run a UNet in a mode inside this context; it is as before on exit.

    Args:
        unet: frozen, in evaluation mode.
        mode: "eager": as it is. "compiled": every ResBlock and transformer block is compiled by itself, as one graph
            for its shapes; that every block of a pruned UNet has shapes of its own costs compile time, never a silent
            return to eager. "cuda_graph": one capture of the eager call, replayed.
        inputs: keyword arguments of a call, of the only shapes that are then run.
        backend: of torch.compile.

    Raises:
        ValueError: an unknown mode, or a CUDA graph elsewhere than on CUDA.

    """
    if mode == "eager":
        yield
    elif mode == "compiled":
        with _compiled(unet, backend):
            yield
    elif mode == "cuda_graph":
        with _graphed(unet, inputs):
            yield
    else:
        raise UserError(f"mode={mode!r}: choose eager, compiled or cuda_graph")


def regions(unet: UNet2DConditionModel) -> list[nn.Module]:
    """Return what is compiled: live ResBlocks and transformer blocks."""
    return [module for module in unet.modules() if isinstance(module, REGIONS)]


@contextmanager
def _compiled(unet: UNet2DConditionModel, backend: str) -> Iterator[None]:
    import torch._dynamo

    known = inspect.signature(torch.compile).parameters
    extra = {ISOLATED: True} if ISOLATED in known else {}
    with ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(**LIMITS))
        for module in regions(unet):
            stack.callback(setattr, module, "_compiled_call_impl", module._compiled_call_impl)
            module.compile(fullgraph=True, dynamic=False, backend=backend, **extra)
        yield


@contextmanager
def _graphed(unet: UNet2DConditionModel, inputs: Mapping[str, Any]) -> Iterator[None]:
    if unet.device.type != "cuda":
        raise UserError(f"mode=cuda_graph needs a CUDA device; this UNet is on {unet.device.type}")
    static = {name: _copy(value) for name, value in inputs.items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):  # what a first call sets up must not be captured
        for _ in range(3):
            unet(**static, return_dict=False)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output = unet(**static, return_dict=False)[0]

    def replay(sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **others: Any) -> tuple[Tensor]:
        given = {"sample": sample, "timestep": timestep, "encoder_hidden_states": encoder_hidden_states}
        conditions = others.get("added_cond_kwargs") or {}
        for name, value in (*given.items(), *conditions.items()):
            target = static["added_cond_kwargs"][name] if name in conditions else static[name]
            target.copy_(value)
        graph.replay()
        return (output.clone(),)

    unet.forward = replay
    try:
        yield
    finally:
        del unet.forward


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return {name: _copy(part) for name, part in value.items()} if isinstance(value, Mapping) else value
