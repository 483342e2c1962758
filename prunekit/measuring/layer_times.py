"""What every layer of a denoiser takes at several widths, measured in place: inside whole calls, by hooks.

A layer alone, called again and again, finds its weights in the cache and looks faster than it is; inside a call it
finds what the call leaves it. So the model is sliced to several widths, all layers at once, and one call of such a
model times every layer at that width. Its calls take turns with the dense model's, by whose time theirs are divided, so
that drift from width to width cancels. A layer's time is a median, over the layers of the same shape too, so that on a
busy machine what interrupts now one layer, now another does not count.

In a UNet, blocks lie inside a layer, and its time is without them. In a transformer they lie in none. A block is then
timed itself, without its layers: its norms and modulations, which are removed with it.
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

FEWEST, MOST = 3, 25  # rounds of one width
REST = ""  # in place of a path: what a call takes beside its layers
BEGIN, END = "begin", "end"

Marks = dict[tuple[str, str], list[Any]]  # (path, BEGIN or END) -> instants in one call
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
    """Measure a denoiser on its device, eager.

    Args:
        unet: a UNet or transformer with its weights, whose values do not matter; it may be pruned. It is left as it is.
        sample_size: (h, w) of the latent.
        text_length: tokens of the text.
        batch: of one call; guidance doubles the images'.
        dtype: of the timed model.
        widths: at how many numbers of kept units each width group is measured, besides none.
        seconds: for one width, where calls are short; where they are long, three rounds.
        progress: is told how many widths are done, of `widths` + 1.

    Raises:
        ValueError: a model on the meta device, or on one that cannot be timed, or that `check_timed` refuses.

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
    """UserError for a model with heads and feed-forward units in one layer, as in FLUX's single blocks.

    They run in common products, whose time is not the sum of the two.
    """
    for first, second in itertools.pairwise(layer for layer in _timed(model) if layer.group is not None):
        if first.path == second.path:
            raise UserError(
                f"latency budgets need layers that can be timed one by one, and {first.path} of this "
                f"{type(model).__name__} computes {first.kind} and {second.kind} together: give the budget in MACs"
            )


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
    """A context in which a call of the model marks where its layers begin and end; each call overwrites the marks.

    Where a block lies inside a layer, its attentions and feed-forwards begin with the norm that feeds them and end
    where the next one, or the block, does. A layer may run several times in a call.
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
    """Return what each layer took in the last call, without the blocks or layers inside it."""
    if unet.device.type == "cuda":
        torch.cuda.synchronize(unet.device)
    seconds: Seconds = {}
    parts: dict[str, list[str]] = {}  # of a block inside a layer, in order
    containers = {}  # of such a block, the layer
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
    """Yield each timed layer, and the layer in which it, or the block that it is part of, lies; "" for none."""
    container = ""
    for layer in _timed(model):
        inside = container if layer.path.startswith(f"{container}.") else ""
        yield layer, inside
        if not inside and layer.kind != "block" and not _is_part(layer):
            container = layer.path


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
