"""Figures of fuzz tests: cases, faults, the largest CPU time and memory, and writes outside the allowed folders."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import auditing
import pytest
from fuzzing import RATIO, SCALE, Outcome, bounded

SHOWN = 3000  # largest number of characters shown of an input


@dataclass
class Figures:
    """Figures of one kind of input. With PRUNEKIT_FUZZ, a test continues after faults and lists them at its end."""

    name: str
    cases: int = 0
    refused: int = 0
    ratio: float = 0.0  # largest CPU time, as a multiple of the CPU time of the unmutated input
    seconds: float = 0.0  # CPU time of the case with the largest ratio
    longest: float = 0.0  # largest CPU time of a case, s
    memory: int = 0  # bytes
    outside: int = 0  # cases that wrote outside their folders, or used a network
    given: object = None  # input of the current case
    slowest: object = None  # input of the case with the largest ratio
    faults: list[str] = field(default_factory=list)

    @contextmanager
    def case(self, given: object) -> Iterator[None]:
        """Count one case. given: its input, shown with its fault."""
        self.cases, self.given = self.cases + 1, given
        try:
            yield
        except Exception:
            if SCALE == 1:
                raise
            self.faults.append(f"{str(given)[:SHOWN]}\n{traceback.format_exc()}")

    def check(self, outcome: Outcome, whole: float, folders: list[str]) -> None:
        """Record an outcome, and fail if `bounded` fails.

        whole: CPU time of the unmutated input, s. folders: folders in which the work may write.
        """
        self.refused += outcome.kind == "refused" or outcome.value is False
        if outcome.seconds / whole > self.ratio:
            self.ratio, self.seconds, self.slowest = outcome.seconds / whole, outcome.seconds, self.given
        self.longest = max(self.longest, outcome.seconds)
        self.memory = max(self.memory, outcome.memory)
        self.outside += bool(auditing.outside(outcome.seen, folders))
        bounded(outcome, whole, folders)

    def text(self) -> str:
        """Return the figures as one line."""
        return (
            f"{self.name}: {self.cases} cases, {self.refused} refused, {len(self.faults)} faults; largest CPU time "
            f"{self.ratio:.2f} x the unmutated input's ({self.seconds:.2f} s), longest {self.longest:.2f} s; largest "
            f"memory {self.memory / 2**20:.0f} MiB; {self.outside} wrote outside"
        ) + (f"\nthe slowest: {str(self.slowest)[:SHOWN]}" if self.ratio > RATIO else "")


def shown(*figures: Figures) -> Callable:
    """Return a fixture that prints the figures that a test has added to (with PRUNEKIT_FUZZ, or `pytest -s`)."""

    @pytest.fixture(autouse=True)
    def show_figures(request):
        before = [(one.cases, len(one.faults)) for one in figures]
        yield
        capture = request.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled() if SCALE > 1 and capture else nullcontext():
            for one, (cases, faults) in zip(figures, before, strict=True):
                if one.cases > cases:
                    print("", *one.faults[faults:], one.text(), sep="\n", flush=True)
        assert [len(one.faults) for one in figures] == [faults for _, faults in before], "faults, listed above"

    return show_figures
