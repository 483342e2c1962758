"""Measure a routed pipeline's pictures per second by batch size and clients, and compare its pictures with the CPU."""

import threading
import time
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import prunekit as pk
from benchmarks.gpu_suite.record import Found, Piece, Settings
from benchmarks.gpu_suite.reference import CPU, DTYPES, SAMPLING, TOLERANCES, compared, exact_float32
from benchmarks.gpu_suite.routed import folder, mixture
from prunekit.data.config import DataConfig, load_data
from prunekit.jobs.bench.bench_models import random_pipeline, random_unet
from prunekit.models import load_pipeline

TITLE = "Serving: pictures per second over batch sizes and clients"
BATCHES, CLIENTS = (1, 4, 16), (1, 4)
DTYPE = "bfloat16"


@dataclass(frozen=True)
class Load:
    """What to generate. model: "emoji", "small" (a small pipeline), or a known model's name, with random weights."""

    model: str
    pictures: int
    steps: int


FULL = (Load("emoji", 256, 25), Load("sd-2.1", 32, 10))
SMALL = (Load("small", 8, 1),)


def step(name: str, settings: Settings) -> tuple[str, list[Piece]]:
    """Return the step's title and its pieces.

    The first piece compares pictures; then there is one piece per model, batch size and number of clients.
    """
    loads = SMALL if settings.reduced else FULL
    found = [Piece("pictures", partial(pictures_of, settings))]
    found += [
        Piece(
            f"{load.model}, batches of {batch}, {clients} clients", partial(throughput, settings, load, batch, clients)
        )
        for load in loads
        for batch in (BATCHES if not settings.reduced else BATCHES[:2])
        for clients in (CLIENTS if not settings.reduced else (2,))
    ]
    return TITLE, found


@cache
def pipeline_of(model: str, device: torch.device, dtype: str) -> pk.PromptRoutedPipeline:
    """Return a routed pipeline of two experts of a model."""
    if model in ("emoji", "small"):
        dense = load_pipeline(folder() if model == "small" else model)
    else:
        dense = random_pipeline(random_unet(model, device, DTYPES[dtype], 0), 0)
    return mixture(dense).to(device, DTYPES[dtype])


def prompts(count: int) -> list[str]:
    """Return `count` names of the embedded data's pictures; they repeat if there are too few."""
    names = load_data(DataConfig(kind="emoji"), 0).names
    return [names[index % len(names)] for index in range(count)]


def drawn(
    pipeline: pk.PromptRoutedPipeline, texts: list[str], batch: int, clients: int, steps: int, output: str = "np"
) -> tuple[list[Any], float]:
    """Generate pictures of texts with several concurrent clients; return the pictures in order, and the seconds.

    All requests for pictures go through this function, so change it to measure another way of serving.
    """
    images: list[Any] = [None] * len(texts)
    errors: list[BaseException] = []

    def ask(rows: range) -> None:
        try:
            options = {"num_inference_steps": steps, "batch_size": batch, "output_type": output}
            found = pipeline([texts[row] for row in rows], seeds=list(rows), **options).images
            for row, image in zip(rows, found, strict=True):
                images[row] = image
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(range(first, len(texts), clients),)) for first in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    if errors:
        raise errors[0]
    return images, seconds


def pictures_of(settings: Settings) -> Found:
    """Compare the small pipeline's pictures (two clients, batches of 4) with the CPU's (one by one)."""
    texts, found = prompts(8), Found()
    with exact_float32():
        expected, _ = drawn(pipeline_of("small", CPU, "float32"), texts, 1, 1, 2, "pt")
        for dtype in DTYPES:
            images, _ = drawn(pipeline_of("small", settings.device, dtype), texts, 4, 2, 2, "pt")
            tolerance = SAMPLING * TOLERANCES[dtype]
            found.comparisons.append(
                compared(f"{dtype}: two clients, batches of 4", _stacked(images), _stacked(expected), tolerance)
            )
    return found


def throughput(settings: Settings, load: Load, batch: int, clients: int) -> Found:
    """Return the pictures per second of one load, after a warm-up call."""
    pipeline = pipeline_of(load.model, settings.device, "float32" if settings.reduced else DTYPE)
    drawn(pipeline, prompts(2 * batch), batch, 1, 1)
    images, seconds = drawn(pipeline, prompts(load.pictures), batch, clients, load.steps)
    row = {"model": load.model, "steps": load.steps, "batch size": batch, "clients": clients, "pictures": len(images)}
    return Found(rows=[{**row, "pictures per second": len(images) / seconds}])


def _stacked(images: list[Any]) -> Tensor:
    return torch.stack([image.float().cpu() for image in images])
