"""Replacements of the Hugging Face Hub: its cache, and a server of one repository that can drop connections."""

import hashlib
import json
import shutil
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0" * 40


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        server, path = self.server, self.path.split("?")[0]
        server.asked.append(path)
        prefix = f"/{server.repository}/resolve/"
        if path.startswith(f"/api/models/{server.repository}"):
            return self.send(json.dumps(self.listing(path)).encode(), body, {"Content-Type": "application/json"})
        file = server.directory / path.removeprefix(prefix).partition("/")[2]
        if not path.startswith(prefix) or not file.is_file():
            kind = "EntryNotFound" if path.startswith(prefix) else "RepoNotFound"
            return self.send(b"", body, {"X-Error-Code": kind}, status=404)
        content = file.read_bytes()
        lost = server.lost is not None and path.endswith(server.lost)
        return self.send(content, body, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'}, lost=lost)

    def listing(self, path):
        names = sorted(p.relative_to(self.server.directory) for p in self.server.directory.rglob("*") if p.is_file())
        if "/tree/" in path:
            sizes = {name: (self.server.directory / name).stat().st_size for name in names}
            return [{"type": "file", "path": str(n), "size": s, "oid": COMMIT} for n, s in sizes.items()]
        siblings = [{"rfilename": str(name)} for name in names]
        return {"id": self.server.repository, "modelId": self.server.repository, "sha": COMMIT, "siblings": siblings}

    def send(self, content, body, headers, status=200, lost=False):
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if lost else content)
        self.close_connection = True

    def log_message(self, *arguments):
        pass


@contextmanager
def small_hub(directory: Path, repository: str = "some/model"):
    """Serve a directory; yield the server, with its `url`. A download whose path ends with `lost` stops halfway."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.directory, server.repository, server.lost, server.asked = directory, repository, None, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def fill_cache(cache: Path, repository: str, directory: Path) -> None:
    """Put a directory into a hub cache, as if it had been downloaded as `repository`."""
    place = cache / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    shutil.copytree(directory, place / "snapshots" / COMMIT)
