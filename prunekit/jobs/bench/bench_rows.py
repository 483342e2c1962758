"""One row of a benchmark: its file, its key, and the figures of its measurement."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prunekit.data.fingerprint import Fingerprint
from prunekit.jobs.bench.bench_recipe import BenchRecipe, CellConfig
from prunekit.measuring.environment import SAME
from prunekit.measuring.interleaved import Measurement, Ratio, Timing
from prunekit.runtime.files import read_json
from prunekit.runtime.run_directory import DENSE

FORMAT = 1
Row = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """An architecture of a benchmark, described by its shapes alone.

    macs, params: exact counts at batch 1 and the benchmark's resolution. digest: hash of the kept units or the config.
    budget: share of the dense MACs; None: not chosen for a budget. published_seconds: published time per image.
    kept: [kept, total] units of each kind, if it was chosen for a budget.
    unaligned: channels of the groups that are not multiples of `align`, if it was chosen with `align`.
    """

    name: str
    macs: int
    params: int
    digest: str
    budget: float | None = None
    published_seconds: float | None = None
    kept: Mapping[str, list[int]] | None = None
    unaligned: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Piece:
    """One row to measure: an architecture under a cell's settings."""

    recipe: BenchRecipe
    cell: CellConfig
    subject: Subject
    dense: Subject

    @property
    def title(self) -> str:
        """Title of the row in messages."""
        cell = self.cell
        layout = "" if cell.memory_format == "contiguous" else f", {cell.memory_format}"
        return f"{self.subject.name}: {cell.workload}, {cell.dtype}, {cell.mode}{layout}"

    @property
    def key(self) -> str:
        """Digest of everything that the row depends on, except the device and the versions."""
        recipe, cell = self.recipe, self.cell
        settings = recipe.model_dump(exclude={"name", "device", "architectures", "cells", "published"})
        content = [FORMAT, sorted(settings.items()), sorted(cell.model_dump(exclude={"architectures"}).items())]
        return Fingerprint(*content, self.dense.digest, self.subject.digest).key()

    def path(self, folder: Path) -> Path:
        """Return the file of the row in a device's folder."""
        cell = self.cell
        return folder / f"{self.subject.name}-{cell.workload}-{cell.dtype}-{cell.mode}-{self.key[:8]}.json"

    def read(self, folder: Path, environment: Mapping[str, Any] | None = None) -> Row | None:
        """Return the row if it was measured (with `environment`: in an equal one); else None."""
        path = self.path(folder)
        if not path.is_file():
            return None
        row = read_json(path)
        if row["key"] != self.key:
            return None
        same = environment is None or all(row["environment"][name] == environment[name] for name in SAME)
        return row if same else None


def row_of(piece: Piece, measured: Measurement, facts: Mapping[str, Any], environment: Mapping[str, Any]) -> Row:
    """Return a row's figures, as JSON.

    measured: its arms are `dense` and, unless the piece is the dense model, the piece's architecture.
    facts: figures of the call other than times (denoiser calls, memory, …).
    """
    recipe, cell, subject = piece.recipe, piece.cell, piece.subject
    ratio = None if subject.name == DENSE else measured.ratio(subject.name)
    macs_ratio = subject.macs / piece.dense.macs
    arm = measured.arms[subject.name]
    return {
        "format": FORMAT,
        "key": piece.key,
        "recipe": recipe.name,
        "model": recipe.model,
        "weights": recipe.weights,
        "architecture": subject.name,
        "budget": subject.budget,
        "kept": subject.kept,
        "unaligned": subject.unaligned,
        "macs": subject.macs,
        "macs_ratio": macs_ratio,
        "params": subject.params,
        "params_ratio": subject.params / piece.dense.params,
        **cell.model_dump(exclude={"architectures"}),
        **{key: getattr(recipe, key) for key in ("resolution", "batch", "guidance", "steps", "seed")},
        **_times("", arm),
        **({} if ratio is None else _times("dense_", measured.arms[DENSE])),
        "latency_ratio": None if ratio is None else asdict(ratio),
        "noise": asdict(measured.noise),
        "noise_floor": measured.noise.distance,
        "latency_per_mac": None if ratio is None else ratio.value / macs_ratio,
        "not_faster": ratio is not None and macs_ratio < 1 and not _is_faster(ratio, measured.noise),
        "warmup_rounds": measured.warmup_rounds,
        "is_warm": measured.is_warm,
        "calls_per_sample": measured.calls,
        **facts,
        "published_seconds": subject.published_seconds,
        "environment": dict(environment),
        "samples": {
            **{name: list(timing.seconds) for name, timing in measured.arms.items()},
            f"{measured.reference} again": list(measured.again.seconds),
        },
    }


def _is_faster(ratio: Ratio, noise: Ratio) -> bool:
    """Return whether a time is below the dense model's: its ratio is below the noise, and its interval below 1."""
    return ratio.value < 1 - noise.distance and ratio.high < 1


def _times(prefix: str, timing: Timing) -> Row:
    return {f"{prefix}{name}": getattr(timing, name) for name in ("p50", "p90", "p99", "count")}
