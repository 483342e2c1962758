"""One progress bar for whatever takes long: step, loss, time left; silent when output is not a terminal."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

console = Console(file=sys.stderr)
PLAIN_SECONDS = 30.0  # between lines where there is no terminal to redraw


class Progress:
    """A context: a rich bar on a terminal, a plain line every 30 seconds elsewhere."""

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
        """Say that `done` of the total are finished, with the current value (a loss)."""
        text = "" if value is None else f"{value:.4g}"
        if self.bar is not None:
            self.bar.update(self.task, completed=done, value=text)
        elif self.enabled and (time.monotonic() - self.last_line > PLAIN_SECONDS):
            self.last_line = time.monotonic()
            left = (self.last_line - self.start) / max(1, done - self.first) * (self.total - done)
            console.print(f"{self.title}: {done}/{self.total} {text} ({left / 60:.1f} min left)", highlight=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
