"""The default backend: one process, one thread and one copy of the model per device, one queue for all."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from prunekit.runtime.errors import UserError
from prunekit.serving.backend import (
    DRAINING,
    READY,
    Admission,
    DrawingError,
    Drawn,
    Job,
    Load,
    Refused,
    Running,
    Served,
)
from prunekit.serving.batching import Batcher, QueueFullError
from prunekit.serving.drawer import WARM_UP_STEPS, Drawer, Picture, open_pipeline
from prunekit.serving.limits import ServerSettings

WARMING = "warming up"  # a state
FAILING = "failing"  # a state
WARM_UP = "warm up"  # a prompt
FAILURES = 3  # batches in a row after which a device counts as faulty
SETTLE = 0.05  # share of a batch's time that the next batch waits for new requests of clients just answered
MOST_RETRY = 60  # most seconds that a refused client is asked to wait

log = logging.getLogger(__name__)


class _AbandonedError(Exception):
    """Nobody waits for the batch any more."""


@dataclass(frozen=True)
class Key:
    """What the images of one batch have in common."""

    expert: int
    steps: int
    guidance: float
    size: tuple[int, int]
    has_negative: bool


@dataclass(eq=False)
class _Task:
    """A job under way; `pictures` and `answer` belong to the event loop's thread."""

    job: Job
    key: Key
    answer: asyncio.Future[None]
    gone: bool = False  # nobody waits for it any more
    pictures: dict[int, Picture] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Image:
    """One image of a task, as an item of the queue."""

    task: _Task
    index: int

    @property
    def seed(self) -> int:
        return self.task.job.seeds[self.index]


class InProcessBackend:
    """Backend that draws with the experts of one model on one or several devices of this machine.

    Args:
        drawers: one drawer per device.
        name: name of the model in the API.
        max_batch: largest number of images per call of the stock pipeline.
        max_queued: largest number of waiting images.

    """

    def __init__(self, drawers: Sequence[Drawer], name: str, max_batch: int = 8, max_queued: int = 64):
        first = drawers[0]
        mixture = first.pipeline.mixture
        self.served = Served(name, first.pipeline.num_experts, first.size, first.multiple, mixture.guidance)
        self._drawers = list(drawers)
        self._queue: Batcher[Key, _Image] = Batcher(max_batch, max_queued)
        self._router = ThreadPoolExecutor(1, "router")
        self._running: dict[int, Running] = {}  # by device
        self._failures = [0] * len(drawers)  # failed batches in a row, of each device
        self._cold = set(range(len(drawers)))  # devices whose experts have not drawn yet
        self._admission = Admission()
        self._seconds = 0.0  # time per image in the last batch
        self._threads: list[threading.Thread] = []

    @classmethod
    def open(cls, directory: Path, settings: ServerSettings) -> InProcessBackend:
        """Open a run, an export or any diffusers pipeline on every device of the settings; errors as `open_pipeline`.

        This call reads the model without its experts; `start` reads the experts.
        """
        devices: Sequence[str | None] = settings.devices or (None,)
        pipelines = [open_pipeline(directory, settings.method, name, settings.max_resident) for name in devices]
        name = settings.name or directory.resolve().name
        return cls([Drawer(pipeline) for pipeline in pipelines], name, settings.batch, settings.max_queued)

    async def start(self) -> None:
        """Start the devices; each one first draws a picture of few steps with every expert, to warm up."""
        self._loop = asyncio.get_running_loop()
        for device in range(len(self._drawers)):
            thread = threading.Thread(target=self._work, args=(device,), name=f"device {device}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def ready(self) -> bool:
        """Return whether the backend is ready to draw jobs."""
        return self.state() == READY

    def state(self) -> str:
        """Return "ready", "warming up", "failing" where every device failed lately, or "draining"."""
        if self._admission.draining:
            return DRAINING
        if self._cold:
            return WARMING
        return FAILING if min(self._failures) >= FAILURES else READY

    def resident(self) -> set[int]:
        """Return the indices of the experts that are in the memory of any device."""
        return {expert for drawer in self._drawers for expert in drawer.pipeline.mixture.experts.resident}

    def load(self) -> Load:
        """Return the current load of the backend."""
        return Load(len(self._queue), tuple(self._running.copy().values()))

    async def draw(self, job: Job) -> Drawn:
        """Draw a job, as `Backend.draw` says."""
        with self._admission.job(job):
            if not self._queue.has_room(len(job.seeds)):  # before the prompt is embedded
                raise self._full()
            return await self._draw(job)

    async def drain(self) -> None:
        """Refuse new jobs, answer the accepted ones, and end."""
        await self._admission.drain()
        self._queue.close()
        self._router.shutdown()
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

    async def _draw(self, job: Job) -> Drawn:
        expert = job.expert
        if expert is None:
            expert = await self._loop.run_in_executor(self._router, self._expert_of, job.prompt)
        key = Key(expert, job.steps, job.guidance, job.size, job.negative_prompt is not None)
        task = _Task(job, key, self._loop.create_future())
        images = [_Image(task, index) for index in range(len(job.seeds))]
        try:
            self._queue.put(key, images)
        except QueueFullError:
            raise self._full() from None
        try:
            await task.answer
        except BaseException:
            task.gone = True
            self._queue.remove(images)
            raise
        return Drawn(expert, tuple(task.pictures[index] for index in range(len(images))))

    def _expert_of(self, prompt: str) -> int:
        return int(self._drawers[0].pipeline.route([prompt])[0])

    def _full(self) -> Refused:
        """Return the error for a job that the full queue cannot take, with the seconds after which to try again."""
        waiting = len(self._queue)
        seconds = math.ceil(waiting * self._seconds / len(self._drawers))
        text = f"{waiting} images wait, and at most {self._queue.max_waiting} may"
        return Refused(text, min(max(1, seconds), MOST_RETRY))

    def _work(self, device: int) -> None:
        """Warm up a device, then draw batches until the queue is closed and empty; runs in the device's thread."""
        self._warm_up(device)
        settle = 0.0
        while (batch := self._queue.take(settle)) is not None:
            began = time.monotonic()
            self._draw_batch(device, batch)
            settle = SETTLE * (time.monotonic() - began)

    def _warm_up(self, device: int) -> None:
        """Draw a picture of few steps with every expert, so that the first request does not wait for loading."""
        for expert in range(self.served.num_experts):
            if self._admission.draining:
                break
            try:
                self._drawers[device].draw([WARM_UP], [0], expert, WARM_UP_STEPS, self.served.guidance)
            except Exception:
                self._failed(device)
        self._cold.discard(device)

    def _draw_batch(self, device: int, images: Sequence[_Image]) -> None:
        """Draw a batch and answer its jobs; if it fails, draw each image alone, so that only faulty images fail."""
        batch = [image for image in images if not image.task.gone]
        if not batch:
            return
        key, task, answer = batch[0].task.key, batch[0].task, None
        self._running[device] = Running(key.expert, len(batch), 0, key.steps)
        try:
            pictures = self._pictures(device, batch)
            self._failures[device], self._seconds = 0, pictures[0].seconds / len(batch)
            answer = partial(_answer, batch, pictures)
        except _AbandonedError:
            batch = []
        except UserError as error:
            answer = partial(_fail, task, error) if len(batch) == 1 else None
        except Exception:
            if len(batch) == 1:
                self._failed(device)
                answer = partial(_fail, task, DrawingError("drawing failed"))
        del self._running[device]
        if answer is not None:
            with contextlib.suppress(RuntimeError):  # the event loop has ended, so nobody waits
                self._loop.call_soon_threadsafe(answer)
            return
        for image in batch:  # here the error is gone, which would keep the batch's tensors in memory
            self._draw_batch(device, [image])

    def _pictures(self, device: int, batch: Sequence[_Image]) -> list[Picture]:
        """Draw images of one key; raise _AbandonedError after a step if nobody waits for any of the images."""
        key, jobs = batch[0].task.key, [image.task.job for image in batch]

        def on_step(step: int, steps: int) -> None:
            self._running[device] = Running(key.expert, len(batch), step, steps)
            if all(image.task.gone for image in batch):
                raise _AbandonedError

        return self._drawers[device].draw(
            [job.prompt for job in jobs],
            [image.seed for image in batch],
            key.expert,
            key.steps,
            key.guidance,
            [job.negative_prompt or "" for job in jobs] if key.has_negative else None,
            key.size,
            on_step,
        )

    def _failed(self, device: int) -> None:
        self._failures[device] += 1
        log.exception("drawing failed on device %s", device)


def _answer(batch: Sequence[_Image], pictures: Sequence[Picture]) -> None:
    """Hand pictures to their tasks; runs in the event loop."""
    for image, picture in zip(batch, pictures, strict=True):
        task = image.task
        task.pictures[image.index] = picture
        if len(task.pictures) == len(task.job.seeds) and not task.answer.done():
            task.answer.set_result(None)


def _fail(task: _Task, error: Exception) -> None:
    """Hand an error to a task; runs in the event loop."""
    if not task.answer.done():
        task.answer.set_exception(error)
