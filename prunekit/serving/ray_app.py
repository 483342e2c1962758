"""The Ray Serve application: an ingress that answers HTTP and routes, and a pool of replicas that draw.

`serve deploy` and KubeRay call `build` with the arguments in the file that `prunekit serve --write-config` wrote. Each
replica has its own `InProcessBackend`, which batches images by expert, steps, guidance and size.
"""

import asyncio
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from prunekit.runtime.errors import UserError
from prunekit.serving import api
from prunekit.serving.backend import DrawingError, Drawn, Job, Load, Refused, Served
from prunekit.serving.in_process import FAILING, WARMING, InProcessBackend
from prunekit.serving.limits import API_KEY, PoolSettings, ServerSettings
from prunekit.serving.ray_backend import RayBackend, ResidentFirst
from prunekit.serving.ray_config import INGRESS, POOL, Arguments, deployment_options

STATS_SECONDS = 1.0  # between a replica's routing statistics
WARM_SECONDS = 0.05  # between checks whether a replica has warmed up
CONSTRUCTOR_ATTEMPTS = 3


class Pool:
    """A replica: draws on the GPUs that Ray gives it, or on the CPU."""

    async def __init__(self, directory: Path, settings: ServerSettings):  # type: ignore[misc]  # as Serve allows
        """Load the model and warm up every expert, so that a replica that is ready draws at once."""
        gpus = len(ray.get_runtime_context().get_accelerator_ids().get("GPU", ()))
        devices = [f"cuda:{index}" for index in range(gpus)] or ["cpu"]
        self._backend = InProcessBackend.open(directory, replace(settings, devices=tuple(devices)))
        await self._backend.start()
        while self._backend.state() == WARMING:
            await asyncio.sleep(WARM_SECONDS)
        self.check_health()

    def served(self) -> Served:
        """Return the model that the replica draws with."""
        return self._backend.served

    def load(self) -> Load:
        """Return the current load of the replica."""
        return self._backend.load()

    async def draw(self, job: Job) -> Drawn | Exception:
        """Draw a job; return its error instead of raising it, so that Ray does not take it for a replica's failure."""
        try:
            return await self._backend.draw(job)
        except (Refused, UserError, DrawingError) as error:
            return error

    def check_health(self) -> None:
        """Raise RuntimeError if every device failed several times in a row; Serve then replaces the replica."""
        if self._backend.state() == FAILING:
            raise RuntimeError("drawing failed several times in a row; the replica's log says why")

    def record_routing_stats(self) -> dict[str, Any]:
        """Return the replica's experts in memory and its number of waiting images, for `ResidentFirst`."""
        return {"resident": sorted(self._backend.resident()), "waiting": self._backend.load().waiting}


class Ingress:
    """Answers HTTP requests with the same application as `prunekit serve` on one machine; replicas draw the images."""

    def __init__(self, pool: DeploymentHandle, directory: Path, settings: ServerSettings, needs_api_key: bool):
        if needs_api_key:
            if not os.environ.get(API_KEY):
                raise UserError(f"requests need an API key: set {API_KEY} in the environment of all nodes")
            settings = replace(settings, api_key=os.environ[API_KEY])
        self._settings = settings
        self._backend = RayBackend(pool, directory, settings.method)

    async def __serve_build_asgi_app__(self) -> ASGIApp:  # Serve's name
        """Return the application, once a replica has reported the model that it draws with."""
        await self._backend.connect()
        return api.build(self._backend, self._settings)

    async def drain(self) -> None:
        """Refuse new requests, and return when the accepted ones are answered."""
        await self._backend.drain()


def build(arguments: Arguments) -> serve.Application:
    """Return the application for the arguments in a file; the file's `deployments` set the number of replicas."""
    return application(arguments, deployment_options(arguments.settings, PoolSettings()))


def application(arguments: Arguments, options: Mapping[str, Mapping[str, Any]]) -> serve.Application:
    """Return the application; options: options of each deployment, by the deployment's name."""
    given = (arguments.directory, arguments.settings)
    more: dict[str, Any] = {}
    if arguments.settings.max_resident is not None:
        more["request_router_config"] = {
            "request_router_class": f"{ResidentFirst.__module__}:{ResidentFirst.__name__}",
            "request_router_kwargs": {"max_batch": arguments.settings.batch},
            "request_routing_stats_period_s": STATS_SECONDS,
        }
    retries: dict[str, Any] = {"max_constructor_retry_count": CONSTRUCTOR_ATTEMPTS}
    pool: Any = serve.deployment(Pool, name=POOL, **options[POOL], **more, **retries)
    ingress: Any = serve.deployment(serve.ingress()(Ingress), name=INGRESS, **options[INGRESS], **retries)
    return ingress.bind(pool.bind(*given), *given, arguments.needs_api_key)
