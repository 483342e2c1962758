"""The latency table of a denoiser on a device, as plain data: each layer's time by the number of units it keeps."""

from __future__ import annotations

import hashlib
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import ModelMixin

from prunekit.measuring.environment import device_name
from prunekit.runtime.errors import UserError

FORMAT = 1
DEFAULT_WIDTHS = 32  # measured numbers of kept units per width group, besides 0: every number of most groups


@dataclass(frozen=True)
class LayerTimes:
    """The time of one layer.

    kind: "resnet", "attention", "feedforward"; "transformer" (without its blocks), "downsampler", "upsampler"; for a
        transformer model also "block" (without its layers).
    units: number of units of its width group; 0 for a layer without units, which has a single time.
    kept: the numbers of units at which it was measured, ascending.
    nanoseconds: time at each of these numbers; more units may take less time, since a kernel for an odd width can be
        half as fast.
    """

    kind: str
    units: int
    kept: tuple[int, ...]
    nanoseconds: tuple[int, ...]

    @classmethod
    def fitted(cls, kind: str, units: int, samples: Mapping[int, Sequence[float]]) -> LayerTimes:
        """Return the medians of samples.

        samples: seconds, by the number of kept units.
        """
        if not units:
            every = [second for seconds in samples.values() for second in seconds]
            return cls(kind, 0, (0,), (round(1e9 * statistics.median(every)),))
        kept = sorted(samples)
        times = tuple(round(1e9 * max(0.0, statistics.median(samples[count]))) for count in kept)
        return cls(kind, units, tuple(kept), times)

    @property
    def full(self) -> int:
        """The time with all units, in nanoseconds."""
        return self.nanoseconds[-1]

    def curve(self) -> list[int]:
        """Return the nanoseconds with 0, 1, …, `units` units, interpolated linearly between the measured numbers."""
        points, times = list(zip(self.kept, self.nanoseconds, strict=True)), [self.nanoseconds[0]]
        for (low, before), (high, after) in itertools.pairwise(points):
            span = high - low
            times += [before + (after - before) * step // span for step in range(1, span + 1)]
        return times


@dataclass(frozen=True)
class LatencyTable:
    """The times of a denoiser's layers by path, in the order of a forward pass, and of the rest of a call.

    conditions: what the times depend on: device, torch, dtype, batch, sample_size, text_length, and the model's shape.
    """

    conditions: dict[str, Any]
    rest: int  # nanoseconds outside of all layers
    layers: dict[str, LayerTimes]

    @property
    def dense(self) -> int:
        """The time of a call of the whole model, in nanoseconds."""
        return self.rest + sum(layer.full for layer in self.layers.values())

    @property
    def digest(self) -> str:
        """A hash of the table's whole content."""
        return hashlib.blake2b(json.dumps(self.to_dict()).encode(), digest_size=8).hexdigest()

    def refuse(self, conditions: Mapping[str, Any]) -> None:
        """Raise UserError, in one line, if the table was measured under other conditions than these."""
        for name, wanted in conditions.items():
            if self.conditions.get(name) != wanted:
                what = "of another model" if name == "model" else f"for {name} {self.conditions.get(name)}"
                wish = "" if name == "model" else f", but {wanted} was requested"
                raise UserError(
                    f"the latency table is {what}{wish}; measure a table on that device, or on this machine with "
                    "device: here"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON form, which `from_dict` reads."""
        layers = {path: asdict(layer) for path, layer in self.layers.items()}
        return {"format": FORMAT, "conditions": self.conditions, "rest": self.rest, "layers": layers}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LatencyTable:
        """Return the table that `to_dict` wrote; raise UserError for another format."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise UserError(f"this is not a latency table of format {FORMAT}; measure the table again")
        layers = {
            path: LayerTimes(layer["kind"], layer["units"], tuple(layer["kept"]), tuple(layer["nanoseconds"]))
            for path, layer in data["layers"].items()
        }
        return cls(dict(data["conditions"]), data["rest"], layers)


def conditions_of(
    model: ModelMixin, sample_size: tuple[int, int], text_length: int, batch: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Return what the times of a denoiser's call depend on, as JSON."""
    plain = {key: value for key, value in model.config.items() if not key.startswith("_") and key != "sample_size"}
    return {
        "model": hashlib.blake2b(json.dumps(plain, sort_keys=True, default=str).encode(), digest_size=8).hexdigest(),
        "device": device_name(model.device),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "sample_size": list(sample_size),
        "text_length": text_length,
    }
