"""`prunekit serve --engine ray`: the server on a Ray cluster, until a signal stops it."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from prunekit.runtime.errors import UserError, first_line
from prunekit.runtime.ray_connection import connected
from prunekit.serving.limits import PoolSettings, ServerSettings
from prunekit.serving.ray_config import APPLICATION, INGRESS, QUIET, Arguments, deployment_options
from prunekit.serving.routed_directory import load_router
from prunekit.serving.server import listening, served_line

ENGINE = "--engine ray"
HEAD = "node:__internal_head__"  # a resource of the head node alone
WAKE_SECONDS = 1.0


def serve_on_ray(directory: Path, settings: ServerSettings, pool: PoolSettings, say: Callable[[str], None]) -> None:
    """Serve a run, an export or any diffusers pipeline on a Ray cluster until SIGTERM or Ctrl-C.

    After the signal, new requests are refused, accepted requests are answered, and Ray Serve stops on the cluster. A
    second signal stops it at once.

    Raises:
        FileNotFoundError: the directory holds no model.
        UserError: the port is taken, no cluster is at the address, this is not its head node, Serve already runs on the
            cluster, or the replicas do not start.

    """
    with listening(settings.host, settings.port) as listener:  # before the cluster is asked for anything
        host, port = listener.getsockname()[:2]
    load_router(directory, settings.method)  # raises the model's errors before the cluster is used
    with connected(pool.address, ENGINE, "--ray-address "):
        import ray
        from ray import serve

        from prunekit.serving.ray_app import application

        _check_cluster(ray)
        if pool.gpus is None:
            pool = replace(pool, gpus=float(ray.cluster_resources().get("GPU", 0) > 0))
        arguments = Arguments(directory=directory.resolve(), settings=settings)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        ingress = None
        try:
            serve.start("HeadOnly", {"host": host, "port": port}, logging_config=QUIET)
            app = application(arguments, deployment_options(settings, pool))
            serve.run(app, name=APPLICATION, logging_config=QUIET)
            ingress = serve.get_deployment_handle(INGRESS, APPLICATION)
            say(served_line(settings.name or arguments.directory.name, host, port, settings))
            while True:
                time.sleep(WAKE_SECONDS)
        except RuntimeError as error:
            raise UserError(f"the model is not served: {first_line(error)}; see the logs of its replicas") from error
        except KeyboardInterrupt:
            with contextlib.suppress(KeyboardInterrupt):
                if ingress is not None:
                    ingress.drain.remote().result()
                    serve.delete(APPLICATION)  # first: shutdown alone loses answers
        finally:
            serve.shutdown()
            signal.signal(signal.SIGTERM, before)
    say("The server is stopped")


def _check_cluster(ray: Any) -> None:
    """Raise UserError if this is not the head node, or if Serve already runs: this command would stop it at its end."""
    here = ray.get_runtime_context().get_node_id()
    (node,) = [node for node in ray.nodes() if node["NodeID"] == here]
    if HEAD not in node["Resources"]:
        raise UserError(
            "this is not the cluster's head node, where the server listens: run the command there, or deploy the file "
            "that --write-config writes"
        )
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return
    raise UserError("Ray Serve already runs on this cluster: deploy the file that --write-config writes")
