"""Put hostile values into nested settings, and measure time, memory and file writes of work in a forked process."""

import contextlib
import copy
import os
import pickle
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import auditing
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from prunekit.runtime.errors import UserError

SCALE = int(os.environ.get("PRUNEKIT_FUZZ", "1"))
GIB = 2**30
MEMORY = 4 * GIB  # limit of the additional memory of a case
RATIO, START = 5.0, 2.0  # CPU time limit of a damaged input: RATIO times that of the undamaged input, plus START s


TIMEOUT = pytest.mark.timeout(600 * SCALE)  # seconds; test files set it as their `pytestmark`


REPEATS = 4  # most measurements of a case that seems slow


def fuzzed(examples: int) -> settings:
    """Return hypothesis settings: the same `examples` examples in every run, times PRUNEKIT_FUZZ if it is set."""
    return settings(max_examples=examples * SCALE, derandomize=True, deadline=None, database=None)


NUMBERS = (0, 1, 2, 7, -1, 10**6, 10**9, 2**31, 2**63, 10**30, -(10**30), 0.0, -0.5, 0.5, 1e-300, 1e300)
NOT_FINITE = (float("inf"), float("-inf"), float("nan"))
TEXTS = (
    *("", " ", "a" * 10_000, "a\nb", "a\0b", "\x1b[31m", "\u202e", "\u2028", "кадр", "😀", "-", "--", "=", "<<", "*"),
    *(
        "../../x",
        "/dev/zero",
        "/etc/passwd",
        "~",
        "~nobody/x",
        ".",
        "a/b",
        "a/b/c",
        "\\",
        "%s",
        "{}",
        "[",
        "5",
        "1e999",
    ),
    *("true", "null", ".nan", "???", "!!python/name:os.system", "norm", "emoji", "sd-1.5", "all", "none"),
)
OTHERS = (True, False, None, [], {}, [[]], [None], [0], ["a"], {"a": 1}, {"": ""}, [1] * 5000, {"x": {"y": {"z": []}}})


def nested(depth: int) -> list:
    """Return `depth` nested lists."""
    return [nested(depth - 1)] if depth else []


HOSTILE = (*NUMBERS, *NOT_FINITE, *TEXTS, *OTHERS, nested(60))


def places(content: Any, place: tuple = ()) -> Iterator[tuple]:
    """Yield the path of keys to every value in nested mappings and lists, outermost first."""
    if place:
        yield place
    if isinstance(content, dict | list):
        for key in content if isinstance(content, dict) else range(len(content)):
            yield from places(content[key], (*place, key))


def _holder(content: Any, place: tuple) -> Any:
    for key in place[:-1]:
        content = content[key]
    return content


@st.composite
def mutated(draw, content: Any, values: tuple = HOSTILE, most: int = 3) -> Any:
    """Replace, drop, add, copy and swap 1 to `most` values of nested settings."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, most))):
        known = list(places(content))
        if not known:
            break
        place = draw(st.sampled_from(known))
        holder, key = _holder(content, place), place[-1]
        kind = draw(st.sampled_from((*["replace"] * 6, "drop", "add", "copy", "swap", "next")))
        if kind == "replace":
            holder[key] = copy.deepcopy(draw(st.sampled_from(values)))
        elif kind == "next" and isinstance(holder[key], int | float):  # near the valid value
            holder[key] = holder[key] * draw(st.sampled_from((-1, 0, 1.5, 2, 3, 0.1)))
        elif kind == "drop":
            del holder[key]
        elif kind == "add":
            target = holder[key] if isinstance(holder[key], dict | list) else holder
            value = copy.deepcopy(draw(st.sampled_from(values)))
            if isinstance(target, list):
                target.append(value)
            else:
                target[draw(st.sampled_from(("", "x", "seed", "_", "a.b", "name ", "job")))] = value
        else:
            other = draw(st.sampled_from(known))
            if other[: len(place)] == place or place[: len(other)] == other:
                continue  # one value contains the other
            second = _holder(content, other)
            holder[key], old = copy.deepcopy(second[other[-1]]), holder[key]
            if kind == "swap":
                second[other[-1]] = old
    return content


@dataclass(frozen=True)
class Outcome:
    """Result of work in a forked process."""

    kind: str  # "done", "refused" (in one line), or "fault"
    value: Any  # return value, error message or traceback
    seconds: float  # CPU time
    memory: int  # largest additional memory since the process started, bytes
    seen: list[tuple[str, str]]  # file writes and network use, from `auditing.watch`


def forked(work: Callable[[], Any], seconds: float, memory: int = MEMORY) -> Outcome:
    """Run `work` in a fork that may use at most `seconds` of CPU time and `memory` bytes of additional memory."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        _be_the_fork(work, writing, seconds, memory)
    os.close(writing)
    parts, until = [], time.monotonic() + 10 * seconds + 30
    while True:
        ready, _, _ = select.select([reading], [], [], max(0.0, until - time.monotonic()))
        part = os.read(reading, 2**16) if ready else b""
        if not ready:
            os.kill(process, signal.SIGKILL)  # it hangs without using CPU time
        if not part:
            break
        parts.append(part)
    os.close(reading)
    _, status, used = os.wait4(process, 0)
    spent = used.ru_utime + used.ru_stime
    if not parts or status != 0:
        ended = f"ended by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {status}"
        return Outcome("fault", f"{ended} after {spent:.1f} s of CPU time", spent, 0, [])
    kind, value, before, seen = pickle.loads(b"".join(parts))
    return Outcome(kind, value, spent, 1024 * used.ru_maxrss - before, seen)


def _be_the_fork(work: Callable[[], Any], writing: int, seconds: float, memory: int) -> None:
    kind, value, before, seen = "fault", "", 0, []
    try:
        sizes = Path("/proc/self/statm").read_text().split()
        page, before = resource.getpagesize(), 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 1))
        resource.setrlimit(resource.RLIMIT_AS, (int(sizes[0]) * page + memory,) * 2)
        torch.set_num_threads(1)
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        seen = auditing.watch()
        try:
            kind, value = "done", work()
        except UserError as error:
            text = str(error)
            lines = len(text.splitlines())
            kind = "refused" if lines == 1 and text.isprintable() else "fault"
            value = text if kind == "refused" else f"an error of {lines} lines: {text!r}"
        seen = list(seen)
    except BaseException:
        kind, value, seen = "fault", traceback.format_exc(), list(seen)
    with contextlib.suppress(BaseException), os.fdopen(writing, "wb") as pipe:
        pickle.dump((kind, value, before, seen), pipe)
    os._exit(0)


def measured(work: Callable[[], Any], whole: float) -> Outcome:
    """Run `work` in a fork; repeat it if it takes more than RATIO times `whole` seconds; return the fastest outcome.

    On a busy machine, a fork of a few hundredths of a second sometimes takes several times as long.
    """
    outcomes = [forked(work, RATIO * whole + START)]
    while outcomes[-1].seconds > RATIO * whole and outcomes[-1].kind != "fault" and len(outcomes) < REPEATS:
        outcomes.append(forked(work, RATIO * whole + START))
    faults = [outcome for outcome in outcomes if outcome.kind == "fault"]
    return (faults or sorted(outcomes, key=lambda outcome: outcome.seconds))[0]


def bounded(outcome: Outcome, whole: float, folders: list[str]) -> None:
    """Check that an outcome is a success or a refusal within the limits of time and memory, without other file writes.

    whole: CPU time of the undamaged input, s. folders: folders in which the work may write.
    """
    assert outcome.kind != "fault", outcome.value
    assert outcome.seconds <= RATIO * whole + START, f"{outcome.seconds:.1f} s, and {whole:.1f} s of the whole one"
    assert outcome.memory <= MEMORY, f"{outcome.memory / GIB:.1f} GiB"
    assert not auditing.outside(outcome.seen, folders)
