"""Measuring the time of every layer of a denoiser at several widths, inside whole calls, by hooks.

A layer that is called alone, again and again, finds its weights in the cache and looks faster than it is; so layers are
timed inside whole calls. The model is sliced to several widths, all layers at once, and one call of a sliced model
times every layer at that width. Calls of the sliced and of the dense model alternate, and the sliced model's times are
divided by the dense model's, so that drift from width to width cancels. A layer's time is a median over rounds and over
layers of the same shape, so that a busy machine's interruptions of single layers do not count.

In a UNet, blocks lie inside a layer, whose time is measured without them. In a transformer, blocks lie in no layer.
There, a block itself is timed, without its layers: its norms and modulations, which are removed with it.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from prunekit.core.axes import Layer
from prunekit.core.call import Call
from prunekit.core.discovery import discover
from prunekit.core.registry import denoiser_of
from prunekit.core.slicing import slice_model
from prunekit.core.space import Architecture, UnitSpace
from prunekit.measuring.clock import timed_call, timed_inputs
from prunekit.measuring.interleaved import WarmUp, measure
from prunekit.measuring.latency_table import DEFAULT_WIDTHS, LatencyTable, LayerTimes, conditions_of
from prunekit.runtime.errors import UserError

FEWEST, MOST = 3, 25  # limits on the rounds per width
REST = ""  # in place of a path: the time of a call outside of its layers
BEGIN, END = "begin", "end"

Marks = dict[tuple[str, str], list[Any]]  # (path, BEGIN or END) -> instants in one call
Seconds = dict[str, float]  # by path of a layer


def measure_table(
    unet: ModelMixin,
    sample_size: tuple[int, int],
    text_length: int = 77,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    widths: int = DEFAULT_WIDTHS,
    seconds: float = 3.0,
    progress: Callable[[int], Any] = lambda done: None,
) -> LatencyTable:
    """Measure the latency table of a denoiser on its device, in eager mode.

    Args:
        unet: a UNet or transformer with its weights, whose values do not matter; it may be pruned. It is not changed.
        sample_size: (h, w) of the latent.
        text_length: number of text tokens.
        batch: samples per call; guidance doubles the number of images.
        dtype: dtype of the timed model.
        widths: how many numbers of kept units are measured per width group, besides 0.
        seconds: target seconds per width; at least 3 and at most 25 rounds are run.
        progress: is called with the number of finished widths, of `widths` + 1.

    Raises:
        UserError: a model on the meta device or on a device that cannot be timed, or a model that `check_timed`
            refuses.

    """
    device, space = unet.device, discover(unet, "none")
    if device.type == "meta":
        raise UserError("a latency table needs weights, and this model is on the meta device; load its weights")
    check_timed(unet)
    conditions = conditions_of(unet, sample_size, text_length, batch, dtype)
    dense = nn.Module.to(slice_model(unet, space.full()), dtype).eval()  # diffusers' own `to` warns
    inputs = timed_inputs(dense, batch, sample_size, text_length)
    layers = _timed(dense)
    shapes: dict[str, Hashable] = {layer.path: _shape(dense, layer) for layer in layers}
    samples: dict[Hashable, dict[int, list[float]]] = {}  # by shape, then by the number of kept units
    with torch.no_grad():
        warm_up = WarmUp(max_seconds=10 * seconds)
        call = measure({"dense": timed_call(dense, inputs)}, FEWEST, device, warm_up).arms["dense"].p50
        rounds = round(min(MOST, max(FEWEST, seconds / (2 * call))))
        reference = None
        for level in range(widths, -1, -1):
            kept = {group.path: round(group.size * level / widths) for group in space.width_groups}
            beside, times = _level(dense, space, kept, inputs, rounds)
            reference = reference or beside
            for path, layer_seconds in times.items():
                scaled = [second * reference / beside for second in layer_seconds]
                samples.setdefault(shapes.get(path, REST), {}).setdefault(kept.get(path, 0), []).extend(scaled)
            progress(widths + 1 - level)
    times_of = {
        layer.path: LayerTimes.fitted(layer.kind, _units(layer), samples[shapes[layer.path]])
        for layer in layers
        if shapes[layer.path] in samples  # not a block inside a layer
    }
    return LatencyTable(conditions, max(0, round(1e9 * statistics.median(samples[REST][0]))), times_of)


def check_timed(model: ModelMixin) -> None:
    """Raise UserError for a model with heads and feed-forward units in one layer, as in FLUX's single blocks.

    Both are computed in the same matrix products, so neither can be timed alone.
    """
    for first, second in itertools.pairwise(layer for layer in _timed(model) if layer.group is not None):
        if first.path == second.path:
            raise UserError(
                f"latency budgets need layers that can be timed one by one, and {first.path} of this "
                f"{type(model).__name__} computes {first.kind} and {second.kind} together: give the budget in MACs"
            )


def _timed(model: nn.Module) -> list[Layer]:
    """Return the timed layers of a model and the blocks that they lie in, in the order of the forward pass."""
    return [layer for layer in denoiser_of(model).layers(model) if layer.path]


def _units(layer: Layer) -> int:
    return layer.group.size if layer.group else 0


def _shape(model: nn.Module, layer: Layer) -> Hashable:
    """Return everything that a layer's times depend on; layers with an equal result share their samples."""
    name = layer.path.rpartition(".")[2] if layer.kind == "attention" else ""  # tells self- from cross-attention
    parameters = model.get_submodule(layer.path).named_parameters()
    shapes = tuple((key, tuple(parameter.shape)) for key, parameter in parameters)
    return layer.kind, name, layer.stream, _units(layer), shapes


def _level(
    dense: ModelMixin, space: UnitSpace, kept: Mapping[str, int], inputs: Call, rounds: int
) -> tuple[float, dict[str, list[float]]]:
    """Time a model with `kept` units of each group, beside the dense model.

    Returns:
        Median seconds of the dense model's calls; samples of each layer, and of the rest, in seconds by path.

    """
    is_full = all(kept[group.path] == group.size for group in space.width_groups)
    values = [unit < kept[group.path] for group in space.groups for unit in range(group.size)]
    pruned = dense if is_full else slice_model(dense, Architecture(space, torch.tensor(values, dtype=torch.bool)))
    samples: dict[str, list[float]] = {}
    beside: list[float] = []
    whole = timed_call(dense, inputs)
    with in_place(pruned) as marks:
        call = timed_call(pruned, inputs)
        call()
        for _ in range(rounds):
            beside.append(_seconds_of(whole, dense.device))
            took = _seconds_of(call, dense.device)
            seconds = layer_seconds(pruned, marks)
            for path, second in (*seconds.items(), (REST, took - sum(seconds.values()))):
                samples.setdefault(path, []).append(second)
    return statistics.median(beside), samples


def _seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Return the time of one call, by the same clock as the layers' times."""
    start = _instant(device)
    call()
    return _elapsed(start, _instant(device))


@contextmanager
def in_place(unet: ModelMixin) -> Iterator[Marks]:
    """Open a context in which a call of the model marks where its layers begin and end; each call overwrites the marks.

    In a block that lies inside a layer, attentions and feed-forwards begin with the norm that feeds them, and end where
    the next one begins or the block ends. A layer may run several times in a call.
    """
    marks: Marks = {}
    device = unet.device

    def begin(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            marks.setdefault((path, BEGIN), []).append(_instant(device))

        return hook

    def end(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            marks.setdefault((path, END), []).append(_instant(device))

        return hook

    with ExitStack() as stack:
        stack.callback(unet.register_forward_pre_hook(lambda *_: marks.clear()).remove)
        for layer, container in _contained(unet):
            if container and _is_part(layer):
                norm = unet.get_submodule(layer.feeds[0])
                stack.callback(norm.register_forward_pre_hook(begin(layer.path)).remove)
                continue
            module = unet.get_submodule(layer.path)
            if not container or layer.kind != "block":
                stack.callback(module.register_forward_pre_hook(begin(layer.path)).remove)
            stack.callback(module.register_forward_hook(end(layer.path)).remove)
        yield marks


def layer_seconds(unet: ModelMixin, marks: Marks) -> Seconds:
    """Return the time of each layer in the last call, without the blocks or layers inside it."""
    if unet.device.type == "cuda":
        torch.cuda.synchronize(unet.device)
    seconds: Seconds = {}
    parts: dict[str, list[str]] = {}  # by block inside a layer: its parts, in order
    containers = {}  # by such a block: the layer that contains it
    block = ""
    for layer, container in _contained(unet):
        if container and layer.kind == "block":
            parts[layer.path], containers[layer.path] = [], container
        elif container and _is_part(layer):
            parts[layer.path.rpartition(".")[0]].append(layer.path)
        else:
            spans = zip(marks[layer.path, BEGIN], marks[layer.path, END], strict=True)
            seconds[layer.path] = sum(_elapsed(begin, end) for begin, end in spans)
            if layer.kind == "block":
                block = layer.path
            elif block and layer.path.startswith(f"{block}."):
                seconds[block] -= seconds[layer.path]
    for inside, paths in parts.items():
        ends = [*(marks[path, BEGIN][-1] for path in paths[1:]), marks[inside, END][-1]]
        for path, stop in zip(paths, ends, strict=True):
            seconds[path] = _elapsed(marks[path, BEGIN][-1], stop)
            seconds[containers[inside]] -= seconds[path]
    return seconds


def _contained(model: nn.Module) -> Iterator[tuple[Layer, str]]:
    """Yield each timed layer, and the path of the layer that contains it, or its block; "" for none."""
    container = ""
    for layer in _timed(model):
        inside = container if layer.path.startswith(f"{container}.") else ""
        yield layer, inside
        if not inside and layer.kind != "block" and not _is_part(layer):
            container = layer.path


def _is_part(layer: Layer) -> bool:
    """Return whether a layer is a part of a block: it begins with its feeds and ends where the next part begins."""
    return any(not path.startswith(f"{layer.path}.") for path in layer.feeds)


def _instant(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _elapsed(start: Any, stop: Any) -> float:
    if isinstance(start, float):
        return stop - start
    stop.synchronize()
    return 1e-3 * start.elapsed_time(stop)
