"""The server's configuration for a Ray cluster: the arguments of `ray_app.build`, the options of its deployments, and
the file for `serve deploy`. This module does not need Ray.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from prunekit.runtime.errors import UserError
from prunekit.runtime.files import write_text
from prunekit.serving.limits import PoolSettings, ServerSettings
from prunekit.serving.routed_directory import load_router

APPLICATION = "prunekit"
IMPORT_PATH = "prunekit.serving.ray_app:build"
INGRESS, POOL = "Ingress", "Pool"  # deployments
MANY_REQUESTS = 10_000  # taken by the ingress at once; it refuses requests for which the replicas have no room
STOP_MARGIN = 30.0  # seconds that a stopping replica gets in addition to the longest request
ELSEWHERE = ("host", "port", "devices", "api_key")  # settings of Serve, Ray and the nodes, not in the arguments
QUIET = {"enable_access_log": False}
HEADER = """\
# Written by `prunekit serve --write-config`. On a node of a running cluster:
#     serve deploy FILE
# On Kubernetes, this file is the text of a RayService's spec.serveConfigV2.
# Every node needs prunekit[serve,ray] and the directory below. A changed `deployments` restarts no replica.
"""


class Arguments(BaseModel):
    """The arguments of `ray_app.build`, as the file has them.

    directory: directory of the model, which all nodes see. needs_api_key: whether requests must carry an API key. The
    key is in the variable PRUNEKIT_API_KEY of the nodes' environment, not in the file.
    """

    model_config = ConfigDict(extra="forbid")

    directory: Path
    settings: ServerSettings = ServerSettings()
    needs_api_key: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the arguments as JSON values, with every setting that applies on a cluster."""
        settings = {name: value for name, value in asdict(self.settings).items() if name not in ELSEWHERE}
        return {"directory": str(self.directory), "settings": settings, "needs_api_key": self.needs_api_key}


def deployment_options(settings: ServerSettings, pool: PoolSettings) -> dict[str, dict[str, Any]]:
    """Return the options of both deployments, by name, as `serve.deployment` and a file take them.

    A replica takes as many requests as its devices draw at once plus as many as its queue holds. If the replicas are
    full, up to `max_queued` requests wait at the ingress, and further requests are refused. A replica that must stop
    gets the time of the longest request, and 30 s more.
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
            "num_replicas": 1,  # it has the counters that /metrics shows
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


def write(directory: Path, settings: ServerSettings, pool: PoolSettings, path: Path) -> None:
    """Write the file that `serve deploy` takes.

    A directory that does not exist on this machine may exist on the nodes: it is not checked, and its path must be
    absolute.

    Raises:
        UserError: the number of GPUs per replica is not set, or the path of a directory that does not exist here is
            relative.
        FileNotFoundError: the directory exists here, but holds no model.

    """
    if pool.gpus is None:
        raise UserError("--write-config needs --gpus-per-replica: GPUs of a replica, 0 for CPUs alone")
    if directory.is_dir():
        load_router(directory, settings.method)
        directory = directory.resolve()
    elif not directory.is_absolute():
        raise UserError(f"{directory} is not a directory here: give the absolute path that the nodes see")
    arguments = Arguments(directory=directory, settings=settings, needs_api_key=settings.api_key is not None)
    options = deployment_options(settings, pool)
    application = {
        "name": APPLICATION,
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "args": arguments.to_json(),
        "deployments": [{"name": name, **own} for name, own in options.items()],
    }
    content = {
        "proxy_location": "EveryNode",
        "http_options": {"host": settings.host, "port": settings.port},
        "logging_config": QUIET,
        "applications": [application],
    }
    write_text(path, HEADER.replace("FILE", path.name) + yaml.safe_dump(content, sort_keys=False))
