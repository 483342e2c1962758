"""The backend on a Ray cluster: it routes prompts in this process, and replicas of `ray_app.Pool` draw them.

If a job's replica is lost, another replica draws the job again with the same seeds, so the answer is the same.
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
ATTEMPTS = 5  # for a job whose replica is lost; after that, the cause is likely the job, such as its memory
PAUSE_SECONDS = 1.0  # before a job is drawn again
POLL_SECONDS = 1.0  # between polls of all replicas
POLL_TIMEOUT = 5.0  # seconds after which a poll fails
SILENT = 6  # failed polls in a row, after which no replica counts as ready
BUSY_RETRY = 5  # seconds that a client is asked to wait

log = logging.getLogger(__name__)


class RayBackend:
    """Gives jobs to the replicas of a deployment, which answer by `Pool.draw`.

    Args:
        pool: handle of the replicas' deployment.
        directory: directory of a run, an export or any diffusers pipeline; only its router is read.
        method: method of the run, as in `open_pipeline`.

    """

    served: Served

    def __init__(self, pool: DeploymentHandle, directory: Path, method: str | None):
        self._pool = pool
        self._router, self._encoder = load_router(directory, method)
        self._embedding = ThreadPoolExecutor(1, "router")
        self._admission = Admission()
        self._loads: list[Load] = []  # of the replicas, at the last poll
        self._silent = 0  # failed polls in a row

    async def connect(self) -> None:
        """Wait until a replica is ready, and ask it for the model that it draws with."""
        self.served = await self._pool.served.remote()
        await self._look()

    async def start(self) -> None:
        """Begin to poll the replicas."""
        self._watching = asyncio.ensure_future(self._watch())

    def ready(self) -> bool:
        """Return whether the backend is ready to draw jobs."""
        return self.state() == READY

    def state(self) -> str:
        """Return "ready", "draining" or "no replica is ready"."""
        if self._admission.draining:
            return DRAINING
        return READY if self._loads else NO_REPLICA

    def load(self) -> Load:
        """Return the load: batches that replicas drew at the last poll; all other images of jobs under way wait."""
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
        """Send the job to replicas until one answers, at most ATTEMPTS times."""
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
        """Poll the loads of all replicas. A replica that was just lost makes polls fail for a while."""
        try:
            answers = await self._pool.broadcast("load").results_async(timeout_s=POLL_TIMEOUT, return_exceptions=True)
            self._loads, self._silent = [answer for answer in answers if isinstance(answer, Load)], 0
        except Exception as error:  # the next look may succeed
            self._silent += 1
            log.warning("replicas did not say how busy they are: %s", first_line(error))
            if self._silent >= SILENT:
                self._loads = []


class ResidentFirst(RequestRouter):
    """Ray Serve's choice of a replica if not all experts fit into memory: it prefers replicas with the job's expert.

    The preference is a hint: it ends when a replica's queue is longer than a batch, and no job waits for a preferred
    replica. Replicas report the experts in their memory through `Pool.record_routing_stats`.
    """

    def initialize_state(self, **settings: Any) -> None:
        """Set `max_batch`, the largest number of images that may wait at a preferred replica."""
        self._most = int(settings["max_batch"])

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the replicas in two ranks, preferred replicas and others.

        Serve takes the replica with the fewest requests in the first rank. If all of its replicas are full, Serve tries
        the second rank.
        """
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # wait between attempts if all replicas are full
        job = pending_request.args[0] if pending_request is not None and pending_request.args else None
        stats = [replica.routing_stats for replica in candidate_replicas]
        first = holders(stats, job.expert, self._most) if isinstance(job, Job) else []
        others = [index for index in range(len(candidate_replicas)) if index not in first]
        return [[candidate_replicas[index] for index in rank] for rank in (first, others)]


def holders(stats: Sequence[dict[str, Any]], expert: int | None, most: int) -> list[int]:
    """Return the indices of the replicas that hold an expert and have at most `most` waiting images.

    stats: routing statistics of each replica.
    """
    return [
        index for index, own in enumerate(stats) if expert in own.get("resident", ()) and own.get("waiting", 0) <= most
    ]
