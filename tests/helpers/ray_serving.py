"""A server on the cluster of `ray_cluster`, reached from outside the cluster's network through a Unix socket.

As a program, `python ray_serving.py SOCKET PORT` forwards connections from the socket to a port in its network.
"""

import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import httpx
import psutil
from ray_cluster import Cluster, Command

from prunekit.serving.api import GENERATIONS

PORT = 8000
REPLICA = "ray::ServeReplica:prunekit:Pool"  # the title of a replica's process
INGRESS = "ray::ServeReplica:prunekit:Ingress"
LIMIT = 240  # seconds


class Served:
    """A server at the cluster's port, which runs as long as a command runs."""

    def __init__(self, cluster: Cluster, command: Command | None = None):
        self.cluster, self.command = cluster, command
        self._socket = cluster.folder / f"{time.monotonic_ns()}.sock"
        self._forward = cluster.start(sys.executable, __file__, str(self._socket), str(PORT))
        self.until(self._socket.exists)

    def close(self) -> None:
        """Stop forwarding connections."""
        self._forward.kill_all()

    def client(self, **options) -> httpx.Client:
        """Return a client of the server."""
        return httpx.Client(transport=httpx.HTTPTransport(uds=str(self._socket)), base_url="http://ray", **options)

    def get(self, path: str) -> httpx.Response:
        """Request a path."""
        with self.client(timeout=LIMIT) as client:
            return client.get(path)

    def draw(self, timeout: float = LIMIT, **body) -> httpx.Response:
        """Request an image."""
        with self.client(timeout=timeout) as client:
            return client.post(GENERATIONS, json=body)

    def until(self, is_so: Callable[[], object]) -> None:
        """Wait until a condition holds."""
        deadline = time.monotonic() + LIMIT
        while not is_so():
            alive = self.command is None or self.command.is_alive
            assert alive and time.monotonic() < deadline, self.command and self.command.output()
            time.sleep(0.1)

    def is_ready(self) -> bool:
        """Return whether the server is ready to generate images."""
        with suppress(httpx.HTTPError):
            return self.get("/health").status_code == 200
        return False

    def replicas(self, node: Command | None = None) -> list[psutil.Process]:
        """Return the replica processes of a node, or of all nodes."""
        nodes = self.cluster.nodes if node is None else [node]
        return [process for one in nodes for process in one.family() if title(process).startswith(REPLICA)]

    def processes(self, name: str) -> list[psutil.Process]:
        """Return the cluster's processes, including the head's, whose title starts with a name."""
        return [process for process in self.cluster.family() if title(process).startswith(name)]

    def running(self) -> list[dict]:
        """Return the batches in progress."""
        return self.get("/health").json()["running"]


def title(process: psutil.Process) -> str:
    """Return a process's command line, which Ray sets; it is empty after the process has ended."""
    with suppress(psutil.Error):  # the process has just ended
        return " ".join(process.cmdline())
    return ""


async def _forward(socket: str, port: int) -> None:
    """Forward connections until the process ends."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(pump(reader, back), pump(there, writer))

    async with await asyncio.start_unix_server(connected, socket) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_forward(sys.argv[1], int(sys.argv[2])))
