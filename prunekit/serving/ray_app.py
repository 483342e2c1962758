"""The Ray Serve application: an ingress that answers HTTP and routes, and a pool of replicas that draw.

`serve deploy` and KubeRay build it by `build` from the arguments in the file that `prunekit serve --write-config` wrote.
Each replica has its own `InProcessBackend`, so that images are batched by expert, steps, guidance and size there.
"""

import asyncio
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from prunekit.runtime.errors import UserError
from prunekit.serving import api
from prunekit.serving.backend import DrawingError, Drawn, Job, Load, Refused, Served
from prunekit.serving.in_process import FAILING, WARMING, InProcessBackend
from prunekit.serving.limits import API_KEY, PoolSettings, ServerSettings
from prunekit.serving.ray_backend import RayBackend, ResidentFirst

INGRESS, POOL = "Ingress", "Pool"  # deployments
MANY_REQUESTS = 10_000  # that the ingress takes at once: it refuses those for which there is no room itself
STOP_MARGIN = 30.0  # seconds in which a replica ends beyond the longest request
STATS_SECONDS = 1.0  # between a replica's routing statistics
WARM_SECONDS = 0.05  # between looks at a replica that warms up
CONSTRUCTOR_ATTEMPTS = 3
ELSEWHERE = ("host", "port", "devices", "api_key")  # settings that the arguments leave to Serve, to Ray, and to nodes


class Arguments(BaseModel):
    """What `build` takes, as the file has it.

    directory: of the model, which all nodes have. needs_api_key: requests carry the key that the variable
    PRUNEKIT_API_KEY of the nodes' environment has, so that it is in no file.
    """

    model_config = ConfigDict(extra="forbid")

    directory: Path
    settings: ServerSettings = ServerSettings()
    needs_api_key: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the arguments as JSON values, with every setting that counts on a cluster."""
        settings = {name: value for name, value in asdict(self.settings).items() if name not in ELSEWHERE}
        return {"directory": str(self.directory), "settings": settings, "needs_api_key": self.needs_api_key}


class Pool:
    """A replica: draws on the GPUs that Ray gives it, or on the CPU."""

    async def __init__(self, directory: Path, settings: ServerSettings):
        """Load the model and draw a step with every expert, so that a replica that is ready draws at once."""
        gpus = len(ray.get_runtime_context().get_accelerator_ids().get("GPU", ()))
        devices = [f"cuda:{index}" for index in range(gpus)] or ["cpu"]
        self._backend = InProcessBackend.open(directory, replace(settings, devices=tuple(devices)))
        await self._backend.start()
        while self._backend.state() == WARMING:
            await asyncio.sleep(WARM_SECONDS)
        self.check_health()

    def served(self) -> Served:
        """Return what it draws with."""
        return self._backend.served

    def load(self) -> Load:
        """Return how busy it is."""
        return self._backend.load()

    async def draw(self, job: Job) -> Drawn | Exception:
        """Draw a job; what is wrong with it is an answer too, so that Ray does not take it for a fault of its own."""
        try:
            return await self._backend.draw(job)
        except (Refused, UserError, DrawingError) as error:
            return error

    def check_health(self) -> None:
        """Raise where every device failed lately: Serve then replaces the replica."""
        if self._backend.state() == FAILING:
            raise RuntimeError("drawing failed several times in a row; the replica's log says why")

    def record_routing_stats(self) -> dict[str, Any]:
        """Return what `ResidentFirst` looks at."""
        return {"resident": sorted(self._backend.resident()), "waiting": self._backend.load().waiting}


class Ingress:
    """Answers HTTP by the same application as `prunekit serve` on one machine; it draws nothing."""

    def __init__(self, pool: DeploymentHandle, directory: Path, settings: ServerSettings, needs_api_key: bool):
        if needs_api_key:
            if not os.environ.get(API_KEY):
                raise UserError(f"requests need an API key: set {API_KEY} in the environment of all nodes")
            settings = replace(settings, api_key=os.environ[API_KEY])
        self._settings = settings
        self._backend = RayBackend(pool, directory, settings.method)

    async def __serve_build_asgi_app__(self) -> ASGIApp:  # Serve's name
        """Return the application, once a replica has said what it draws with."""
        await self._backend.connect()
        return api.build(self._backend, self._settings)

    async def drain(self) -> None:
        """Refuse new requests, and return when the accepted ones are answered."""
        await self._backend.drain()


def build(arguments: Arguments) -> serve.Application:
    """Return the application of a file's arguments; the file's `deployments` say how many replicas there are."""
    return application(arguments, deployment_options(arguments.settings, PoolSettings()))


def application(arguments: Arguments, options: Mapping[str, Mapping[str, Any]]) -> serve.Application:
    """Return the application; options: of each deployment, by name."""
    given = (arguments.directory, arguments.settings)
    more: dict[str, Any] = {}
    if arguments.settings.max_resident is not None:
        more["request_router_config"] = {
            "request_router_class": f"{ResidentFirst.__module__}:{ResidentFirst.__name__}",
            "request_router_kwargs": {"max_batch": arguments.settings.batch},
            "request_routing_stats_period_s": STATS_SECONDS,
        }
    pool = serve.deployment(Pool, name=POOL, max_constructor_retry_count=CONSTRUCTOR_ATTEMPTS, **more)
    ingress = serve.deployment(serve.ingress()(Ingress), name=INGRESS, max_constructor_retry_count=CONSTRUCTOR_ATTEMPTS)
    return ingress.options(**options[INGRESS]).bind(
        pool.options(**options[POOL]).bind(*given), *given, arguments.needs_api_key
    )


def deployment_options(settings: ServerSettings, pool: PoolSettings) -> dict[str, dict[str, Any]]:
    """Return the options of both deployments, by name, as `serve.deployment` and a file take them.

    A replica takes as many requests as its devices draw at once and its queue holds; beyond it, as many wait at the
    ingress, and the others are refused. One that is to end has the time of the longest request.
    """
    least, most = pool.replicas
    stop = settings.request_seconds + STOP_MARGIN
    scale: dict[str, Any] = {"num_replicas": least}
    if most > least:
        scale = {
            "autoscaling_config": {
                "min_replicas": least,
                "max_replicas": most,
                "target_ongoing_requests": 2 * settings.batch,  # a batch that is drawn, and the next one
            }
        }
    needs = {"num_cpus": pool.cpus, "num_gpus": pool.gpus or 0}
    return {
        INGRESS: {
            "num_replicas": 1,  # it counts what /metrics shows
            "max_ongoing_requests": MANY_REQUESTS,
            "graceful_shutdown_timeout_s": stop,
            "ray_actor_options": {"num_cpus": 0},
        },
        POOL: {
            **scale,
            "max_ongoing_requests": settings.batch * max(1, int(needs["num_gpus"])) + settings.max_queued,
            "max_queued_requests": settings.max_queued,
            "graceful_shutdown_timeout_s": stop,
            "ray_actor_options": needs,
        },
    }
