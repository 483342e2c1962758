"""Run the server in a thread of this process: a model over HTTP at a free port, drained at the end."""

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from prunekit.serving.api import GENERATIONS, build
from prunekit.serving.backend import Backend
from prunekit.serving.limits import ServerSettings
from prunekit.serving.server import Server, listening


@contextmanager
def serving(backend: Backend, settings: ServerSettings | None = None) -> Iterator[str]:
    """Serve a backend; yield its address, such as http://127.0.0.1:54321."""
    started = threading.Event()
    settings = settings or ServerSettings()
    with listening("127.0.0.1", 0) as listener:
        config = uvicorn.Config(build(backend, settings), log_level="warning", access_log=False, ws="none")
        server = Server(config, backend, started.set)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        assert started.wait(20)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.handle_exit(15, None)
            thread.join(60)
            assert not thread.is_alive()


def ask(url: str, body: dict | bytes | None = None, path: str = GENERATIONS, **headers: str):
    """Send a request (a POST if it has a body); return status, content and headers."""
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            content, status, given = answer.read(), answer.status, answer.headers
    except urllib.error.HTTPError as error:
        content, status, given = error.read(), error.code, error.headers
    is_json = "json" in given.get("Content-Type", "")
    return status, json.loads(content) if is_json else content.decode(), given
