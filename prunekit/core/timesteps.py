"""TimestepModel: one module with a slice for each range of timesteps, usable as a stock pipeline's denoiser."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from prunekit.runtime.errors import UserError

from .call import Call
from .registry import denoiser_of
from .slicing import CUT, export_model, load_model

CONFIG = "config.json"
FORMAT = 1


@dataclass(frozen=True)
class TimestepBins:
    """Timesteps divided into K bins; bin b holds the timesteps t with bounds[b - 1] <= t < bounds[b].

    bounds: K - 1 ascending timesteps, in the unit of the noise process.
    """

    bounds: tuple[float, ...]

    def __post_init__(self) -> None:
        if list(self.bounds) != sorted(set(self.bounds)):
            raise UserError(f"bounds of timesteps must ascend, got {list(self.bounds)}")

    def __len__(self) -> int:
        return len(self.bounds) + 1

    def of(self, timesteps: Tensor) -> Tensor:
        """Return the bin of each timestep, int64, of the shape of `timesteps`."""
        bounds = torch.tensor(self.bounds, dtype=torch.float64, device=timesteps.device)
        return torch.bucketize(timesteps.double(), bounds, right=True)

    def of_taken(self, times: Tensor, take: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the bin of each time, given in the denoiser's unit: int64, of the shape of `times`.

        take: converts timesteps of the noise process to this unit, ascending or descending. The bounds are converted
            too, so bounds and times are rounded alike.
        """
        bounds = torch.tensor(self.bounds, dtype=torch.float64)
        bounds = take(bounds.to(times.dtype) if times.is_floating_point() else bounds).double()
        first, second = take(bounds.new_tensor([0.0, 1.0])).tolist()
        sign = 1 if first < second else -1
        return torch.bucketize(sign * times.double().cpu(), sign * bounds, right=True)

    def shares(self, timesteps: Iterable[float]) -> list[Fraction]:
        """Return the exact fraction of a sampler's timesteps in each bin, (K)."""
        counts = torch.bincount(self.of(torch.tensor([float(t) for t in timesteps])), minlength=len(self)).tolist()
        return [Fraction(count, sum(counts)) for count in counts]


def middle_shift(config: Mapping[str, Any]) -> float:
    """Return the middle of the range of a scheduler's shift that depends on picture size, as a logarithm."""
    return (config.get("base_shift", 0.5) + config.get("max_shift", 1.15)) / 2


def sampled_timesteps(scheduler: Any, steps: int) -> Tensor:
    """Return the timesteps of a denoiser's calls for one picture, (n,) float64; the scheduler is not changed.

    A shift that depends on the picture's size is taken at the middle of its range, as in `FlowMatching`.
    """
    scheduler, config = copy.deepcopy(scheduler), scheduler.config
    is_shifted = config.get("use_dynamic_shifting")
    scheduler.set_timesteps(steps, **({"mu": middle_shift(config)} if is_shifted else {}))
    return torch.as_tensor(scheduler.timesteps).double().cpu()


class TimestepModel(ModelMixin, ConfigMixin):
    """Several slices of one denoiser; each sample runs through the slice of its timestep.

    Call it like the denoiser. Its other attributes, such as `config` and the parts that a pipeline reads, are those of
    the first slice; its config does not say how a slice was cut or folded. It holds no weights of its own.
    """

    config_name = CONFIG

    def __init__(self, slices: Sequence[nn.Module], bins: TimestepBins):
        """Hold the slices, one per bin.

        Raises:
            UserError: the number of slices is not the number of bins, or the slices are of several model classes.

        """
        super().__init__()
        if len(slices) != len(bins) or not slices:
            raise UserError(f"{len(slices)} slices for {len(bins)} bins of timesteps: give one slice per bin")
        if len(classes := {type(denoiser_of(model)).__name__ for model in slices}) > 1:
            raise UserError(f"all slices must be of one denoiser class, got {', '.join(sorted(classes))}")
        self.slices, self.bins = nn.ModuleList(slices), bins
        first: Any = slices[0]
        self._internal_dict = FrozenDict({key: first.config[key] for key in first.config if key not in CUT})
        self._parameters_of = tuple(inspect.signature(type(first).forward).parameters)[1:]

    @property
    def described(self) -> nn.Module:
        """The first slice, which stands for all slices when the model's denoiser is looked up."""
        return self.slices[0]

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the first slice, where this model has none; pipelines read such attributes."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "slices" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.slices[0], name)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Run each sample through the slice of its timestep; arguments and result are those of a slice."""
        options |= dict(zip(self._parameters_of, arguments, strict=False))
        denoiser = denoiser_of(self.slices[0])
        bins = self.bins.of_taken(torch.as_tensor(options[denoiser.timestep]), denoiser.taken)
        if (only := int(bins.amin())) == int(bins.amax()):
            return self.slices[only](**options)
        call = Call({name: value for name, value in options.items() if value is not None})
        parts = {int(b): (bins == b).nonzero().flatten() for b in bins.unique()}
        outputs = [self.slices[b](**call.take(rows.to(call.device))) for b, rows in parts.items()]
        order = torch.cat(list(parts.values())).argsort().to(call.device)
        return _joined(outputs, lambda values: torch.cat(values)[order])

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write each slice into a subfolder, as a stock model if possible, and a file with the bins."""
        for model, folder in saved_parts(self, Path(save_directory)):
            export_model(model, folder)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> TimestepModel:
        """Load a model that `save_pretrained` wrote.

        Raises:
            UserError: the folder holds something else, or another format.

        """
        folder = Path(pretrained_model_name_or_path)
        bins = read_bins(folder)
        if bins is None:
            raise UserError(f"{folder} holds no {cls.__name__}")
        return cls([load_model(slice_folder(folder, index), **options) for index in range(len(bins))], bins)


def read_denoiser(folder: str | Path, **options: Any) -> Any:
    """Load a saved denoiser: a single model, stock or pruned, or a `TimestepModel`; errors as in `load_model`."""
    if read_bins(folder) is None:
        return load_model(folder, **options)
    return TimestepModel.from_pretrained(folder, **options)


def saved_parts(model: nn.Module, folder: Path) -> list[tuple[Any, Path]]:
    """Return the models to save for a denoiser, with their folders: itself, or the slices of a `TimestepModel`.

    The bins of a `TimestepModel` are written to `folder`.
    """
    if not isinstance(model, TimestepModel):
        return [(model, folder)]
    write_bins(folder, model.bins)
    return [(part, slice_folder(folder, index)) for index, part in enumerate(model.slices)]


def slice_folder(folder: str | Path, index: int) -> Path:
    """Return the folder of one slice inside the folder of a `TimestepModel`."""
    return Path(folder) / f"slice-{index}"


def write_bins(folder: Path, bins: TimestepBins) -> None:
    """Write the config of a `TimestepModel`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"_class_name": TimestepModel.__name__, "format": FORMAT, "bounds": list(bins.bounds)}
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_bins(folder: str | Path) -> TimestepBins | None:
    """Return the bins of a `TimestepModel`'s folder; None for the folder of a single model.

    Raises:
        UserError: another format, or bounds that are not numbers.

    """
    try:
        content = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # loading the folder as a single model reports the error
        return None
    if not isinstance(content, dict) or content.get("_class_name") != TimestepModel.__name__:
        return None
    if content.get("format") != FORMAT:
        raise UserError(f"{folder} has format {content.get('format')!r}; this version of prunekit reads {FORMAT}")
    bounds = content.get("bounds")
    if not isinstance(bounds, list) or not all(isinstance(bound, int | float) for bound in bounds):
        raise UserError(f"{folder} names no bounds of timesteps: {bounds!r}")
    return TimestepBins(tuple(bounds))


def _joined(outputs: Sequence[Any], join: Callable[[list[Tensor]], Tensor]) -> Any:
    """Join outputs of models with `join`; the result has their structure: tensors, lists, tuples or mappings."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return join(list(outputs))
    if isinstance(first, list):  # one tensor per sample, all of one shape
        return list(join([torch.stack(output) for output in outputs]))
    if isinstance(first, tuple):
        return tuple(_joined(values, join) for values in zip(*outputs, strict=True))
    return type(first)(**{name: _joined([output[name] for output in outputs], join) for name in first})
