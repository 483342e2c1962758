"""Progress of a command: a bar for long work (step, loss, time left; plain lines if stderr is not a terminal), the
protocol of logs, and the peak memory.
"""

import resource
import sys
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

console = Console(file=sys.stderr)
PLAIN_SECONDS = 30.0  # between progress lines if stderr is not a terminal

Watcher = Callable[[float, float, float], None]  # takes seconds since the start, and shares done at the start and now
_watchers: list[Watcher] = []


class Log(Hashable, Protocol):
    """An object that receives the lines and rows of a command: a `RunLog` or a substitute."""

    def log(self, row: dict[str, Any], /) -> None:
        """Keep a row."""

    def say(self, text: str, /) -> None:
        """Show a line."""


class Saying:
    """A log that passes its lines to a function and drops its rows."""

    def __init__(self, say: Callable[[str], Any]):
        self.say = say

    def log(self, row: dict[str, Any]) -> None:
        """Drop the row."""


class Progress:
    """A context that shows progress: a rich bar on a terminal, else a plain line every 30 seconds."""

    def __init__(self, title: str, total: int, done: int = 0, enabled: bool = True):
        self.title, self.total, self.first, self.enabled = title, total, done, enabled
        self.bar: RichProgress | None = None
        self.start = self.last_line = time.monotonic()

    def __enter__(self) -> "Progress":
        if self.enabled and console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[value]}"),
            )
            self.bar = RichProgress(*columns, console=console)
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=self.total, completed=self.first, value="")
        return self

    def update(self, done: int, value: float | None = None) -> None:
        """Show that `done` of the total are finished, with the current value of the loss."""
        if self.enabled and self.total:
            for watcher in _watchers:
                watcher(time.monotonic() - self.start, self.first / self.total, done / self.total)
        text = "" if value is None else f"loss {value:.4g}"
        if self.bar is not None:
            self.bar.update(self.task, completed=done, value=text)
        elif self.enabled and (time.monotonic() - self.last_line > PLAIN_SECONDS):
            self.last_line = time.monotonic()
            left = (self.last_line - self.start) / max(1, done - self.first) * (self.total - done)
            line = ", ".join(filter(None, (f"{self.title}: {done}/{self.total}", text, f"{left / 60:.1f} min left")))
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Call `watcher` at every update of every `Progress` within the context."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def peak_memory() -> int:
    """Return this process's peak memory so far in bytes: GPU memory if it uses a GPU, else main memory."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
