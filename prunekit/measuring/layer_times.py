"""What every layer of a UNet takes at several widths, measured in place: inside whole calls, by hooks.

A layer alone, called again and again, finds its weights in the cache and looks faster than it is; inside a call it
finds what the call leaves it. So the UNet is sliced to several widths, all layers at once, and one call of such a UNet
times every layer at that width. Its calls take turns with the dense UNet's, by whose time theirs are divided, so that
drift from width to width cancels. A layer's time is a median, over the layers of the same shape too, so that on a busy
machine what interrupts now one layer, now another does not count.
"""

from __future__ import annotations

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

FEWEST, MOST = 3, 25  # rounds of one width
REST = ""  # in place of a path: what a call takes beside its layers
BEGIN, END = "begin", "end"

Marks = dict[tuple[str, str], Any]  # (path, BEGIN or END) -> an instant
Seconds = dict[str, float]  # of a layer by its path, and of the rest


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
    """Measure a UNet on its device, eager.

    Args:
        unet: with its weights, whose values do not matter; it may be pruned. It is left as it is.
        sample_size: (h, w) of the latent.
        text_length: tokens of the text.
        batch: of one UNet call; guidance doubles the images'.
        dtype: that the UNet runs in.
        widths: at how many numbers of kept units each width group is measured, besides none.
        seconds: for one width, where calls are short; where they are long, three rounds.
        progress: is told how many widths are done, of `widths` + 1.

    Raises:
        ValueError: a UNet on the meta device, or on one that cannot be timed.

    """
    device, space = unet.device, discover(unet, "none")
    if device.type == "meta":
        raise UserError("a latency table needs weights, and this UNet is on the meta device; load its weights")
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
        if layer.kind != "block"
    }
    return LatencyTable(conditions, max(0, round(1e9 * statistics.median(samples[REST][0]))), times_of)


def _timed(model: nn.Module) -> list[Layer]:
    """The layers of a model that are timed, and the blocks that they lie in, in the order of the forward pass."""
    return [layer for layer in denoiser_of(model).layers(model) if layer.path]


def _units(layer: Layer) -> int:
    return layer.group.size if layer.group else 0


def _shape(model: nn.Module, layer: Layer) -> Hashable:
    """What a layer's times depend on: layers that have it in common are samples of one another."""
    name = layer.path.rpartition(".")[2] if layer.kind == "attention" else ""  # self- and cross-attention
    parameters = model.get_submodule(layer.path).named_parameters()
    shapes = tuple((key, tuple(parameter.shape)) for key, parameter in parameters)
    return layer.kind, name, layer.stream, _units(layer), shapes


def _level(
    dense: ModelMixin, space: UnitSpace, kept: Mapping[str, int], inputs: Call, rounds: int
) -> tuple[float, dict[str, list[float]]]:
    """Return (the dense call's time beside, every layer's samples with `kept` units of each group, by path)."""
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
    """Return one call's time by the instants that layers are timed by."""
    start = _instant(device)
    call()
    return _elapsed(start, _instant(device))


@contextmanager
def in_place(unet: ModelMixin) -> Iterator[Marks]:
    """A context in which a call of the UNet marks where its layers begin and end; each call overwrites the marks.

    An attention or feed-forward begins with the norm that feeds it and ends where the next one, or the block, does.
    """
    marks: Marks = {}
    device = unet.device

    def begin(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            marks[path, BEGIN] = _instant(device)

        return hook

    def end(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            marks[path, END] = _instant(device)

        return hook

    with ExitStack() as stack:
        for layer in _timed(unet):
            if _is_part(layer):
                norm = unet.get_submodule(layer.feeds[0])
                stack.callback(norm.register_forward_pre_hook(begin(layer.path)).remove)
                continue
            module = unet.get_submodule(layer.path)
            if layer.kind != "block":
                stack.callback(module.register_forward_pre_hook(begin(layer.path)).remove)
            stack.callback(module.register_forward_hook(end(layer.path)).remove)
        yield marks


def layer_seconds(unet: ModelMixin, marks: Marks) -> Seconds:
    """Return what each layer took in the last call; a transformer layer without its blocks."""
    if unet.device.type == "cuda":
        torch.cuda.synchronize(unet.device)
    seconds: Seconds = {}
    parts: dict[str, list[str]] = {}  # of a block, in order
    containers = {}  # of a block, the layer in whose time it lies
    container = ""
    for layer in _timed(unet):
        if layer.kind == "block":
            parts[layer.path], containers[layer.path] = [], container
        elif _is_part(layer):
            parts[layer.path.rpartition(".")[0]].append(layer.path)
        else:
            container = layer.path
            seconds[layer.path] = _elapsed(marks[layer.path, BEGIN], marks[layer.path, END])
    for block, paths in parts.items():
        ends = [*(marks[path, BEGIN] for path in paths[1:]), marks[block, END]]
        for path, stop in zip(paths, ends, strict=True):
            seconds[path] = _elapsed(marks[path, BEGIN], stop)
            seconds[containers[block]] -= seconds[path]
    return seconds


def _is_part(layer: Layer) -> bool:
    """Whether a layer is a part of a block, which begins with what feeds it and ends where the next part begins."""
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
