"""What the HTTP API needs of whatever draws: one protocol, and the plain data that cross it.

`InProcessBackend` draws in this process. A backend on several machines takes the same jobs: everything here can be
pickled, and a job that is no longer wanted is cancelled as every asyncio task is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from prunekit.serving.drawer import Picture

READY, DRAINING = "ready", "draining"  # states
DRAINING_RETRY = 5  # seconds, in which another server may take over


class Refused(Exception):  # noqa: N818 - it is an answer, not a fault
    """A job that was not accepted, and will not be drawn.

    retry_after: seconds after which a client may try again.
    """

    def __init__(self, message: str, retry_after: int):
        super().__init__(message, retry_after)
        self.message, self.retry_after = message, retry_after


class DrawingError(Exception):
    """A job that failed for a reason other than its request, which the log has."""


@dataclass(frozen=True)
class Job:
    """Images of one prompt, each by its seed; all that the API leaves open is filled in.

    size: pixels (height, width). negative_prompt: None is not the empty text: see `PromptRoutedPipeline`.
    expert: draws the images; None: the expert that the router chooses.
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
    """What a backend draws with.

    name: of the model. size: its own pixels (height, width). multiple: of which sides must be multiples.
    guidance: where a request asks for none.
    """

    name: str
    num_experts: int
    size: tuple[int, int]
    multiple: int
    guidance: float


@dataclass(frozen=True)
class Running:
    """A batch that is being drawn: by which expert, how many images, and how far it is."""

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
        self.images = 0  # of jobs under way
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def job(self, job: Job) -> Iterator[None]:
        """Give a context in which a job is under way; Refused once draining has begun."""
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
    """Whatever draws; its methods are called from one event loop."""

    @property
    def served(self) -> Served:
        """What it draws with."""
        ...

    async def start(self) -> None:
        """Begin; jobs may be given from now on, and wait until it is ready."""
        ...

    def ready(self) -> bool:
        """Return whether it draws at once what it is given."""
        ...

    def state(self) -> str:
        """Return "ready", or why it is not, in a few words."""
        ...

    def load(self) -> Load:
        """Return the current load of the backend."""
        ...

    async def draw(self, job: Job) -> Drawn:
        """Draw a job; cancelling it drops what waits, and stops a batch that nobody else waits for.

        Raises:
            Refused: there is no room, or it is about to end.
            UserError: the model cannot draw the job.
            DrawingError: drawing failed.

        """
        ...

    async def drain(self) -> None:
        """Refuse new jobs, answer the accepted ones, and end."""
        ...
