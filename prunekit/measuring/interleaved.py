"""Interleaved timing of several callables after a warm-up, with a measured noise floor.

The first callable is timed as two arms, A and A'. The deviation of their ratio from 1 is noise, so another ratio that
deviates less says nothing. Every round times each arm once. Rounds alternate between a random order and its reverse, so
that drift (heat, clocks, a busy machine) and the effect of the arm before fall on all arms alike. A ratio is the median
of the rounds' ratios.
"""

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from prunekit.measuring.clock import clock
from prunekit.runtime.errors import UserError

CONFIDENCE = 0.95
SHORTEST = 1e-4  # shortest sample in seconds: a faster callable is called several times per sample (not on CUDA)


@dataclass(frozen=True)
class Timing:
    """The samples of one arm, in seconds per call, in the order of the rounds."""

    seconds: tuple[float, ...]

    def quantile(self, share: float) -> float:
        """Return the time below which the fraction `share` of the samples lies, by linear interpolation."""
        ordered = sorted(self.seconds)
        position = share * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    @property
    def count(self) -> int:
        """The number of samples."""
        return len(self.seconds)

    @property
    def p50(self) -> float:
        """The median."""
        return self.quantile(0.5)

    @property
    def p90(self) -> float:
        """The 90th percentile."""
        return self.quantile(0.9)

    @property
    def p99(self) -> float:
        """The 99th percentile; with fewer than 100 samples it depends mostly on the largest one."""
        return self.quantile(0.99)


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios, with its 95 % confidence interval from order statistics."""

    value: float
    low: float
    high: float
    count: int

    @property
    def distance(self) -> float:
        """The largest distance of the interval from 1."""
        return max(abs(self.low - 1), abs(self.high - 1))

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """Return the median ratio of paired samples, with its interval from the binomial distribution."""
    ratios = sorted(a / b for a, b in zip(numerator, denominator, strict=True))
    if not ratios:
        raise UserError("a ratio needs at least one pair of samples")
    count, cut, tail, term = len(ratios), 0, 0.0, 0.5 ** len(ratios)
    while cut < count and tail + term <= (1 - CONFIDENCE) / 2:  # number of ratios to leave out at each end
        tail += term
        term *= (count - cut) / (cut + 1)
        cut += 1
    cut = max(0, min(cut - 1, (count - 1) // 2))
    return Ratio(statistics.median(ratios), ratios[cut], ratios[count - 1 - cut], count)


@dataclass(frozen=True)
class WarmUp:
    """The rule that ends the warm-up: in every arm, the last `window` samples have the median of the `window` before.

    tolerance: largest relative difference of the two medians.
    max_rounds, max_seconds: limits after which the warm-up ends in any case.
    """

    window: int = 3
    tolerance: float = 0.05
    max_rounds: int = 50
    max_seconds: float = 60.0

    def is_stable(self, seconds: Sequence[float]) -> bool:
        """Return whether one arm's samples have settled."""
        if len(seconds) < 2 * self.window:
            return False
        before, last = (
            statistics.median(part) for part in (seconds[-2 * self.window : -self.window], seconds[-self.window :])
        )
        return abs(last - before) <= self.tolerance * before


@dataclass(frozen=True)
class Measurement:
    """The result of `measure`.

    arms: timings by name, in the order given.
    again: the second arm of the first callable.
    warmup_rounds: number of warm-up rounds, whose samples were discarded.
    is_warm: whether the samples had settled by then.
    calls: number of calls per sample; a sample's seconds are per call.
    """

    arms: Mapping[str, Timing]
    again: Timing
    warmup_rounds: int
    is_warm: bool
    calls: int

    @property
    def reference(self) -> str:
        """The name of the first callable."""
        return next(iter(self.arms))

    @cached_property
    def noise(self) -> Ratio:
        """A'/A: the first callable against itself; its distance from 1 is the noise floor of the other ratios."""
        return paired_ratio(self.again.seconds, self.arms[self.reference].seconds)

    def ratio(self, name: str, of: str | None = None) -> Ratio:
        """Return the time of one arm divided by the time of another (by default the first), paired by rounds."""
        for given in (name, of):
            if given is not None and given not in self.arms:
                raise UserError(f"no arm {given!r}; the arms are {', '.join(self.arms)}")
        return paired_ratio(self.arms[name].seconds, self.arms[of or self.reference].seconds)

    def lines(self) -> list[str]:
        """Return the measurement for a terminal: one line per arm, then the noise floor."""
        width = max(map(len, self.arms))
        lines = [
            f"{name:<{width}}  p50 {1e3 * arm.p50:10.4f} ms  p90 {1e3 * arm.p90:10.4f}  p99 {1e3 * arm.p99:10.4f}  "
            f"n={arm.count}" + ("" if name == self.reference else f"  ratio {self.ratio(name)}")
            for name, arm in self.arms.items()
        ]
        settled = "settled" if self.is_warm else "NOT settled"
        floor = f"noise floor (A/A) {self.noise}: ±{self.noise.distance:.1%}"
        return [*lines, f"{floor}; {settled} after {self.warmup_rounds} warm-up rounds, {self.calls} calls a sample"]


def measure(
    callables: Mapping[str, Callable[[], Any]],
    repeats: int = 30,
    device: str | torch.device = "cpu",
    warm_up: WarmUp | None = None,
    seed: int = 0,
    progress: Callable[[int], Any] = lambda done: None,
) -> Measurement:
    """Time callables side by side.

    Args:
        callables: functions by name; the first one is the reference. Their return values are ignored.
        repeats: number of counted samples per function; each round takes one sample of every function.
        device: device on which the functions compute. CPU: a monotonic clock around calls. CUDA: events on the current
            stream, after a write that empties the L2 cache; a sample is one call, and the device is idle before it.
        warm_up: rule for the end of the warm-up, whose samples are not counted.
        seed: seed of the functions' order in each round.
        progress: takes the number of finished rounds.

    Raises:
        ValueError: nothing to time, or fewer than one repeat.

    """
    if not callables:
        raise UserError("nothing to time: give at least one callable, by name")
    if repeats < 1:
        raise UserError(f"repeats={repeats}: at least 1 is needed")
    warm_up, time_of = warm_up or WarmUp(), clock(device)
    rounds, is_warm, calls = _warm(callables, warm_up, time_of, torch.device(device).type == "cuda")
    functions = [*callables.values(), next(iter(callables.values()))]
    samples: list[list[float]] = [[] for _ in functions]
    generator, order = random.Random(seed), list(range(len(functions)))
    for done in range(repeats):
        if done % 2 == 0:
            generator.shuffle(order)
        for arm in order if done % 2 == 0 else reversed(order):
            samples[arm].append(time_of(functions[arm], calls))
        progress(done + 1)
    timings = [Timing(tuple(seconds)) for seconds in samples]
    return Measurement(dict(zip(callables, timings, strict=False)), timings[-1], rounds, is_warm, calls)


def _warm(
    callables: Mapping[str, Callable[[], Any]],
    warm_up: WarmUp,
    time_of: Callable[[Callable[[], Any], int], float],
    is_cuda: bool,
) -> tuple[int, bool, int]:
    """Run rounds until every callable has settled; return (rounds, whether all have settled, calls per sample).

    The time of the first round, which compiles and allocates, does not count toward `max_seconds`.
    """
    fastest = min([time_of(function, 1) for function in callables.values()])
    calls, rounds, spent, is_warm = 1, 1, 0.0, False
    seconds: list[list[float]] = [[] for _ in callables]
    while not is_warm and rounds < warm_up.max_rounds and spent < warm_up.max_seconds:
        for arm, function in zip(seconds, callables.values(), strict=True):
            arm.append(time_of(function, calls))
            spent += arm[-1] * calls
            fastest = min(fastest, arm[-1])
        rounds += 1
        is_warm = all(map(warm_up.is_stable, seconds))
        if not is_cuda and fastest * calls < SHORTEST:
            calls = max(calls + 1, round(2 * SHORTEST / max(fastest, 1e-9)))
            seconds, is_warm = [[] for _ in callables], False
    return rounds, is_warm, calls
