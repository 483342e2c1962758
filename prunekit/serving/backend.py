"""The protocol of backends, which draw images for the HTTP API, and the data that the API and backends exchange.

`InProcessBackend` draws in this process. A backend on several machines takes the same jobs: all data can be pickled,
and a job that is no longer needed is cancelled like any asyncio task.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from prunekit.serving.drawer import Picture

READY, DRAINING = "ready", "draining"  # states
DRAINING_RETRY = 5  # seconds after which a client may try again; another server may run by then


class Refused(Exception):  # noqa: N818 - it is an answer, not a fault
    """A job that was not accepted, and will not be drawn.

    retry_after: seconds after which a client may try again.
    """

    def __init__(self, message: str, retry_after: int):
        super().__init__(message, retry_after)
        self.message, self.retry_after = message, retry_after


class DrawingError(Exception):
    """A job failed for a reason that is not in its request; the log has the reason."""


@dataclass(frozen=True)
class Job:
    """Images to draw of one prompt, one per seed; fields that a request left out have their defaults.

    size: pixels (height, width).
    negative_prompt: None: the stock pipeline's default, which may differ from the empty text.
    expert: index of the expert that draws the images; None: the router chooses.
    """

    prompt: str
    seeds: tuple[int, ...]
    steps: int
    guidance: float
    size: tuple[int, int]
    negative_prompt: str | None = None
    expert: int | None = None


@dataclass(frozen=True)
class Drawn:
    """A job's images in the order of its seeds, and the expert that the router chose for its prompt."""

    expert: int
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Served:
    """The model that a backend draws with.

    name: name of the model in the API. size: default size of an image in pixels, (height, width).
    multiple: an image's sides must be multiples of this number of pixels. guidance: default guidance scale.
    """

    name: str
    num_experts: int
    size: tuple[int, int]
    multiple: int
    guidance: float


@dataclass(frozen=True)
class Running:
    """A batch that is being drawn: its expert, its number of images, the steps done and the steps in total."""

    expert: int
    images: int
    step: int
    steps: int


@dataclass(frozen=True)
class Load:
    """How busy a backend is: images that wait, and the batches that are being drawn."""

    waiting: int
    running: tuple[Running, ...]


class Admission:
    """Counts a backend's jobs under way and, once draining begins, refuses new ones; belongs to one event loop."""

    def __init__(self) -> None:
        self.draining = False
        self.images = 0  # number of images in the jobs under way
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def job(self, job: Job) -> Iterator[None]:
        """Count a job as under way within the context; raise Refused once draining has begun."""
        if self.draining:
            raise Refused("the server is about to end", DRAINING_RETRY)
        self.images += len(job.seeds)
        self._idle.clear()
        try:
            yield
        finally:
            self.images -= len(job.seeds)
            if not self.images:
                self._idle.set()

    async def drain(self) -> None:
        """Refuse new jobs, and wait until none is under way."""
        self.draining = True
        await self._idle.wait()


class Backend(Protocol):
    """An object that draws images for the HTTP API; its methods are called from one event loop."""

    @property
    def served(self) -> Served:
        """The model that the backend draws with."""
        ...

    async def start(self) -> None:
        """Start the backend; from now on it accepts jobs, which wait until it is ready."""
        ...

    def ready(self) -> bool:
        """Return whether the backend is ready to draw jobs."""
        ...

    def state(self) -> str:
        """Return "ready", or in a few words why the backend is not ready."""
        ...

    def load(self) -> Load:
        """Return the current load of the backend."""
        ...

    async def draw(self, job: Job) -> Drawn:
        """Draw a job. Cancelling drops the job's waiting images, and stops a batch that no other job waits for.

        Raises:
            Refused: there is no room for the job, or the backend is draining.
            UserError: the model cannot draw the job.
            DrawingError: drawing failed.

        """
        ...

    async def drain(self) -> None:
        """Refuse new jobs, answer the accepted ones, and end."""
        ...
