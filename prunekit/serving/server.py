"""`prunekit serve`: the API under uvicorn until a signal stops it; the server then answers the accepted requests."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn

from prunekit.runtime.errors import cannot_listen
from prunekit.serving.api import build
from prunekit.serving.backend import Backend
from prunekit.serving.in_process import InProcessBackend
from prunekit.serving.limits import ServerSettings


class Server(uvicorn.Server):
    """uvicorn's server with draining: at SIGTERM or Ctrl-C, it refuses new requests and answers the accepted ones.

    A second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, backend: Backend, started: Callable[[], None]):
        super().__init__(config)
        self.backend, self.announce = backend, started
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked = False  # whether a signal has asked the server to stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, and announce it."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._announcing = asyncio.ensure_future(asyncio.to_thread(self.announce))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, and end at the second."""
        if self._loop is None or self._asked:
            self.should_exit = self.force_exit = True
        else:
            self._asked = True
            self._loop.call_soon_threadsafe(self._begin_to_drain)

    def _begin_to_drain(self) -> None:
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        try:
            await self.backend.drain()
        finally:
            self.should_exit = True


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Reserve an address within the context; UserError if it is taken. It accepts no connections before `listen`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise cannot_listen(host, port) from error
        yield listener


def served_line(name: str, host: str, port: int, settings: ServerSettings) -> str:
    """Return the line that a server prints once it has started."""
    open_to = "" if settings.api_key or ipaddress.ip_address(host).is_loopback else " to everybody who reaches it"
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    return f"{name} is served{open_to} at {url} ; Ctrl-C stops it"


def serve(directory: Path, settings: ServerSettings, say: Callable[[str], None]) -> None:
    """Serve a run, an export or any diffusers pipeline until SIGTERM or Ctrl-C.

    Raises:
        FileNotFoundError: the directory holds no model, or lacks an expert.
        UserError: the model is faulty, an expert has no weights, a device is not usable, or the address is taken.

    """
    with listening(settings.host, settings.port) as listener:  # before the model is read, which takes long
        backend = InProcessBackend.open(directory, settings)
        host, port = listener.getsockname()[:2]

        def started() -> None:
            say(served_line(backend.served.name, host, port, settings))

        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        app = build(backend, settings)
        config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, ws="none")
        Server(config, backend, started).run([listener])
    say("The server is stopped")
