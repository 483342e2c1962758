"""An audit hook that records the files and network addresses a process uses; it imports only the standard library.

Python's audit events do not cover files that a library opens in C or Rust; tests find those by listing folders.
"""

import os
import sys
from pathlib import Path, PurePath

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
ONE_PATH = {  # events with one path, and the index of the argument that is the directory's file descriptor
    "os.chmod": 2,
    "os.chown": 3,
    "os.mkdir": 2,
    "os.remove": 1,
    "os.rmdir": 1,
    "os.truncate": None,
    "os.utime": 3,
    "sqlite3.connect": None,
}
TWO_PATHS = {"os.link": (2, 3), "os.rename": (2, 3), "os.symlink": (None, 2)}
NETWORK = ("socket.bind", "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")


def _place(path: object, directory: object = None) -> str:
    """Return the absolute path of a call's argument. directory: file descriptor that the path is relative to, or -1."""
    text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else f"<descriptor {path!r}>"
    start = Path(f"/proc/self/fd/{directory}").readlink() if isinstance(directory, int) and directory >= 0 else Path()
    given = start / text
    place = str(given.parent.resolve() / given.name)
    own = f"/proc/{os.getpid()}/"  # /proc/self resolves to it
    return f"/proc/self/{place.removeprefix(own)}" if place.startswith(own) else place


def _changed(event: str, arguments: tuple) -> list[str]:
    """Return the paths that an event changes."""
    if event == "open":
        path, _, flags = arguments
        writes = isinstance(flags, int) and flags & WRITING and not isinstance(path, int)
        return [_place(path)] if writes else []
    if event in ONE_PATH:
        if isinstance(arguments[0], int):  # descriptor of an open file
            return []
        at = ONE_PATH[event]
        return [_place(arguments[0], arguments[at] if at is not None and at < len(arguments) else None)]
    if event in TWO_PATHS:
        changed = list(zip(arguments[:2], TWO_PATHS[event], strict=True))
        return [
            _place(path, arguments[at] if at is not None and at < len(arguments) else None)
            for path, at in (changed[1:] if event in ("os.symlink", "os.link") else changed)
        ]
    return []


def watch(also: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """Return a list that grows by (event, path or address) until the process ends. also: more events to record."""
    seen: list[tuple[str, str]] = []

    def hook(event: str, arguments: tuple) -> None:
        if event in NETWORK:
            address = arguments[0] if event.startswith("socket.get") else arguments[-1]
            if not (isinstance(address, str | bytes) and event in NETWORK[:2]):  # a Unix socket is a file here
                seen.append((event, repr(address)))
        elif event in also:
            seen.append((event, repr(arguments[:2])))
        else:
            for path in _changed(event, arguments):
                seen.append((event, path))

    sys.addaudithook(hook)
    return seen


def outside(seen: list[tuple[str, str]], folders: list[str]) -> list[tuple[str, str]]:
    """Return the entries outside `folders`, except Python's bytecode caches and devices."""
    roots = [Path(folder).resolve() for folder in folders]
    return [
        (event, path)
        for event, path in seen
        if event in NETWORK
        or not (
            any(PurePath(path).is_relative_to(root) for root in roots)
            or "__pycache__" in PurePath(path).parts
            or path.startswith(("/dev/", "/proc/self/"))
        )
    ]
