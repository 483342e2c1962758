"""The backend on a Ray cluster: it routes prompts here, and replicas of `ray_app.Pool` draw them on other nodes.

A job whose replica is lost is drawn again by another one with the same seeds, so its answer is the same.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from prunekit.runtime.errors import first_line
from prunekit.serving.backend import DRAINING, READY, Admission, DrawingError, Drawn, Job, Load, Refused, Served
from prunekit.serving.experts import route
from prunekit.serving.routed_directory import load_router

NO_REPLICA = "no replica is ready"  # a state
ATTEMPTS = 5  # of a job whose replica is lost; more losses are a fault of the job, such as its memory
PAUSE_SECONDS = 1.0  # before a job is drawn again
POLL_SECONDS = 1.0  # between questions to all replicas
POLL_TIMEOUT = 5.0  # seconds, after which a question is given up
SILENT = 6  # questions without an answer, after which no replica counts as ready
BUSY_RETRY = 5  # seconds that a client is asked to wait

log = logging.getLogger(__name__)


class RayBackend:
    """Gives jobs to the replicas of a deployment, which answer by `Pool.draw`.

    Args:
        pool: of the replicas.
        directory: a run, an export or any diffusers pipeline, of which only the router is read.
        method: of a run, as `open_pipeline` has it.

    """

    served: Served

    def __init__(self, pool: DeploymentHandle, directory: Path, method: str | None):
        self._pool = pool
        self._router, self._encoder = load_router(directory, method)
        self._embedding = ThreadPoolExecutor(1, "router")
        self._admission = Admission()
        self._loads: list[Load] = []  # of the replicas, when they were last asked
        self._silent = 0  # questions in a row without an answer

    async def connect(self) -> None:
        """Wait until a replica is ready, and learn what it draws with."""
        self.served = await self._pool.served.remote()
        await self._look()

    async def start(self) -> None:
        """Begin to watch the replicas."""
        self._watching = asyncio.ensure_future(self._watch())

    def ready(self) -> bool:
        """Return whether it draws at once what it is given."""
        return self.state() == READY

    def state(self) -> str:
        """Return "ready", "draining" or "no replica is ready"."""
        if self._admission.draining:
            return DRAINING
        return READY if self._loads else NO_REPLICA

    def load(self) -> Load:
        """Return how busy it is: what replicas draw, as of the last second, and all other images of jobs under way."""
        running = tuple(batch for load in self._loads for batch in load.running)
        return Load(max(0, self._admission.images - sum(batch.images for batch in running)), running)

    async def draw(self, job: Job) -> Drawn:
        """Draw a job, as `Backend.draw` says."""
        with self._admission.job(job):
            loop = asyncio.get_running_loop()
            expert = await loop.run_in_executor(self._embedding, self._expert_of, job.prompt)
            return await self._draw(replace(job, expert=expert))

    async def drain(self) -> None:
        """Refuse new jobs, and answer the accepted ones."""
        await self._admission.drain()

    def _expert_of(self, prompt: str) -> int:
        return int(route([prompt], self._router, self._encoder)[0])

    async def _draw(self, job: Job) -> Drawn:
        """Ask replicas until one answers."""
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(PAUSE_SECONDS)
            response = self._pool.draw.remote(job)
            try:
                answer = await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except BackPressureError:
                raise Refused("all replicas are busy, and many requests wait", BUSY_RETRY) from None
            except DeploymentUnavailableError:
                raise Refused(NO_REPLICA, BUSY_RETRY) from None
            except RayTaskError as error:
                log.error("a replica failed: %s", error)
                raise DrawingError("drawing failed") from error
            except (RayError, RayServeException) as error:
                log.warning("a replica was lost, and another one draws its images: %s", first_line(error))
                continue
            if isinstance(answer, Exception):
                raise answer
            return answer
        raise DrawingError(f"the replicas that drew it were lost {ATTEMPTS} times")

    async def _watch(self) -> None:
        while True:
            await self._look()
            await asyncio.sleep(POLL_SECONDS)

    async def _look(self) -> None:
        """Ask all replicas how busy they are. One that was just lost keeps the others' answers away for a while."""
        try:
            answers = await self._pool.broadcast("load").results_async(timeout_s=POLL_TIMEOUT, return_exceptions=True)
            self._loads, self._silent = [answer for answer in answers if isinstance(answer, Load)], 0
        except Exception as error:  # the next look may succeed
            self._silent += 1
            log.warning("replicas did not say how busy they are: %s", first_line(error))
            if self._silent >= SILENT:
                self._loads = []


class ResidentFirst(RequestRouter):
    """Serve's choice of a replica where not all experts fit into memory: first the replicas that hold the job's expert.

    A hint: a replica whose queue is longer than a batch is not preferred, and no job waits for a replica.
    Replicas say what they hold by `Pool.record_routing_stats`.
    """

    def initialize_state(self, **settings: Any) -> None:
        """Take the setting `max_batch`: images that may wait at a replica that is preferred."""
        self._most = int(settings["max_batch"])

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the replicas in two ranks; of a rank, Serve takes the one with the fewest requests."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # where every replica is full
        job = pending_request.args[0] if pending_request is not None and pending_request.args else None
        stats = [replica.routing_stats for replica in candidate_replicas]
        first = holders(stats, job.expert, self._most) if isinstance(job, Job) else []
        others = [index for index in range(len(candidate_replicas)) if index not in first]
        return [[candidate_replicas[index] for index in rank] for rank in (first, others)]


def holders(stats: Sequence[dict[str, Any]], expert: int | None, most: int) -> list[int]:
    """Return which replicas hold an expert and have at most `most` images waiting, by their routing statistics."""
    return [
        index for index, own in enumerate(stats) if expert in own.get("resident", ()) and own.get("waiting", 0) <= most
    ]
