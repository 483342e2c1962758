"""Result of a method's `prune`: architectures, a router for a mixture, and their settings, costs and figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin

from prunekit.core.cost import CostModel
from prunekit.core.discovery import match
from prunekit.core.space import Architecture, UnitSpace
from prunekit.core.timesteps import TimestepBins, sampled_timesteps
from prunekit.methods.router import Router
from prunekit.runtime.errors import UserError
from prunekit.runtime.files import read_json, write_json
from prunekit.runtime.run_directory import RESULT

FORMAT = 1
OPEN_GATES = 1.05  # times the budget: if soft gates cost more when a search ends, the cut is nearly arbitrary
MOST_SHARE = 0.9  # of the training prompts: an expert with more leaves nearly nothing to route


@dataclass
class ResultInfo:
    """Settings, costs and figures of a result. Lists have one entry per architecture, in their order.

    On disk these are the keys of `info` in result.json; a field that is empty or None has no key there.

    Args:
        method: the name of the method.
        settings: all settings of the method, as JSON values.
        imported: for an imported result: the JSON values that its source recorded.
        sample_size: (height, width) of the latents at which MACs were counted.
        text_length: text tokens at which MACs were counted.
        convention: the convention by which MACs were counted.
        dense_macs: MACs of the dense UNet.
        macs: MACs of each architecture.
        ratio: MACs of each architecture as a share of the dense MACs.
        dense_params: parameters of the dense UNet.
        params: parameters of each architecture.
        unaligned: with `align`, the width groups of each architecture that stay unaligned, with their channels.
        latency_ratio: with a budget in time, the predicted time of each architecture as a share of the dense time.
        latency_table: with a budget in time, the conditions, dense nanoseconds and digest of the latency table.
        variant: for a method with a fixed family of architectures: the name of the chosen member.
        prompts_per_expert: for a mixture: the number of training prompts that inference routing sends to each expert.
        assignment: for a mixture: the number of training prompts per expert before balancing, by kind of assignment.
        mixture_ratio: for a mixture: the mean MACs over the training prompts and a sampler's timesteps, as a share of
            the dense MACs.
        one_mask: whether all architectures are the same on purpose, and only weights differ.
        timestep_shares: if architectures depend on the timestep: fraction of the sampler's timesteps in each bin.
        search: figures of the method's training: steps, seconds, loss and its terms.
        gates_ratio: cost of each architecture's soft gates at the end of the search, as a share of the dense cost.
        extra: further JSON values of a method; their keys are not names of fields.

    """

    method: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    imported: dict[str, Any] = field(default_factory=dict)
    sample_size: tuple[int, int] | None = None
    text_length: int | None = None
    convention: str | None = None
    dense_macs: int | None = None
    macs: list[int] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    dense_params: int | None = None
    params: list[int] = field(default_factory=list)
    unaligned: list[dict[str, int]] = field(default_factory=list)
    latency_ratio: list[float] = field(default_factory=list)
    latency_table: dict[str, Any] = field(default_factory=dict)
    variant: str | None = None
    prompts_per_expert: list[int] = field(default_factory=list)
    assignment: dict[str, list[int]] = field(default_factory=dict)
    mixture_ratio: float | None = None
    one_mask: bool | None = None
    timestep_shares: list[float] = field(default_factory=list)
    search: dict[str, float] = field(default_factory=dict)
    gates_ratio: list[float] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def mean_ratio(self) -> float:
        """MACs as a fraction of the dense MACs; for a mixture, the mean over training prompts and timesteps."""
        return self.ratio[0] if self.mixture_ratio is None else self.mixture_ratio

    @property
    def search_seconds(self) -> float:
        """Seconds of the method's training; 0 for a method that trains nothing."""
        return float(self.search.get("seconds", 0.0))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are set, and `extra`, as one mapping of JSON values.

        Raises:
            UserError: a key of `extra` that is the name of a field.

        """
        if taken := sorted(set(self.extra) & set(FIELDS)):
            raise UserError(f"ResultInfo.extra[{taken[0]!r}]: set the field {taken[0]} instead, or choose another key")
        values = {name: getattr(self, name) for name in FIELDS}
        values["sample_size"] = None if self.sample_size is None else list(self.sample_size)
        return {name: value for name, value in values.items() if value not in (None, "", [], {})} | self.extra

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "ResultInfo":
        """Read a mapping that `to_dict` returned; a key that is not a field goes to `extra`."""
        known = {name: value for name, value in content.items() if name in FIELDS}
        if known.get("sample_size") is not None:
            known["sample_size"] = tuple(known["sample_size"])
        return cls(**known, extra={name: value for name, value in content.items() if name not in FIELDS})


FIELDS = tuple(field.name for field in fields(ResultInfo) if field.name != "extra")


@dataclass
class PruneResult:
    """The result of a method.

    architectures: one, or N of a mixture. router: sends each prompt to an expert; None: there is one expert.
    info: the method, its settings, and the costs reached; a mapping is read by `ResultInfo.from_dict`.
    bins: K timestep bins, if the architecture of an expert depends on the timestep; expert i then has the architectures
    i·K to (i + 1)·K - 1, one per bin. None: an expert is one architecture.
    """

    architectures: list[Architecture]
    router: Router | None = None
    info: ResultInfo = field(default_factory=ResultInfo)
    bins: TimestepBins | None = None

    def __post_init__(self) -> None:
        if isinstance(self.info, Mapping):
            self.info = ResultInfo.from_dict(self.info)

    def notes(self) -> list[str]:
        """Return notes for people, one line each, such as the predicted time."""
        if ratios := self.info.latency_ratio:
            device = self.info.latency_table["device"]
            return [f"predicted at {self._mean(ratios):.4f} of the dense time on {device}"]
        return []

    def warnings(self) -> list[str]:
        """Return warnings, one line each.

        Widths that stay unaligned, a search that ended before its gates closed, experts that are the same architecture,
        experts without training prompts, and an expert with nearly all of them.
        """
        info, lines = self.info, []
        left = {f"{path} ({channels})" for widths in info.unaligned for path, channels in widths.items()}
        if left:
            few = ", ".join(sorted(left)[:3]) + (", …" if len(left) > 3 else "")
            lines.append(f"{len(left)} width(s) are not multiples of {info.settings['align']} channels: {few}")
        if info.gates_ratio and (mean := self._mean(info.gates_ratio)) > OPEN_GATES * info.settings["budget"]:
            more = "raise search.steps or search.learning_rate" + ", or lower warmup" * ("warmup" in info.settings)
            lines.append(
                f"gates kept {mean:.2f} of the dense cost when the search ended, so the final cut is nearly "
                f"arbitrary: {more}"
            )
        lines += [
            f"experts {_listed(same)} of {len(self.architectures)} have the same architecture" for same in self._alike()
        ]
        counts = info.prompts_per_expert
        return lines + share_warnings([count / sum(counts) for count in counts])

    def _alike(self) -> list[list[int]]:
        """Return lists of experts that share an architecture; no lists if they share it on purpose (`one_mask`)."""
        groups: list[list[int]] = []
        if self.info.one_mask:
            return groups
        for index, architecture in enumerate(self.architectures):
            group = next((group for group in groups if self.architectures[group[0]] == architecture), None)
            groups.append([index]) if group is None else group.append(index)
        return [group for group in groups if len(group) > 1]

    def _mean(self, values: Sequence[float]) -> float:
        """Return the mean of one value per architecture over training prompts and timesteps, if they are known."""
        shares = self.info.timestep_shares or [1.0]
        counts = self.info.prompts_per_expert or [1] * (len(values) // len(shares))
        weights = [count * share for count in counts for share in shares]
        return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)

    @property
    def space(self) -> UnitSpace:
        """Return the space of the architectures."""
        return self.architectures[0].space

    @property
    def num_experts(self) -> int:
        """Return the number of experts, among which the router chooses."""
        return len(self.architectures) // (len(self.bins) if self.bins else 1)

    def expert_macs(self, cost: CostModel, expert: int, scheduler: Any, steps: int) -> int:
        """Return an expert's exact MACs; for timestep bins, the rounded mean over the sampler's timesteps."""
        macs = [cost.macs(architecture) for architecture in self.members(expert)]
        if self.bins is None:
            return macs[0]
        shares = self.bins.shares(sampled_timesteps(scheduler, steps))
        return round(sum(share * count for share, count in zip(shares, macs, strict=True)))

    def expert_params(self, cost: CostModel, expert: int) -> int:
        """Return the number of an expert's parameters; for slices of shared weights, of those that any slice keeps."""
        members = self.members(expert)
        kept = torch.stack([architecture.values for architecture in members]).any(0)
        return cost.params(Architecture(self.space, kept))

    def members(self, expert: int) -> list[Architecture]:
        """Return the architectures of an expert: one, or one for each bin of timesteps."""
        count = len(self.bins) if self.bins else 1
        return self.architectures[expert * count : (expert + 1) * count]

    def save(self, directory: str | Path) -> Path:
        """Write `result.json`, and `router.safetensors` if there is a router; return the directory."""
        directory = Path(directory)
        if self.router is not None:
            self.router.save(directory)
        # The space is the same for all: it is written once.
        architectures = [{**architecture.to_dict(), "space": None} for architecture in self.architectures]
        content = {
            "format": FORMAT,
            "info": self.info.to_dict(),
            "has_router": self.router is not None,
            "space": self.space.to_dict(),
            "architectures": architectures,
            **({"bounds": list(self.bins.bounds)} if self.bins else {}),
        }
        write_json(directory / RESULT, content)
        return directory

    @classmethod
    def load(cls, directory: str | Path, of: ModelMixin | UnitSpace | None = None) -> "PruneResult":
        """Read a result that `save` wrote.

        Args:
            directory: directory of the result.
            of: the UNet or space that the result must fit; the UNet may be on the meta device.

        Raises:
            FileNotFoundError: no result in the directory.
            ValueError: a result of another format, or one that does not fit `of` (the message names a difference).

        """
        path = Path(directory) / RESULT
        if not path.is_file():
            raise FileNotFoundError(f"no pruning result at {path}")
        content = read_json(path)
        if content.get("format") != FORMAT:
            raise UserError(f"{path} has format {content.get('format')!r}; this version reads format {FORMAT}")
        space = of if isinstance(of, UnitSpace) else UnitSpace.from_dict(content["space"])
        if of is not None and not isinstance(of, UnitSpace):
            match(of, space)
        architectures = [
            Architecture.from_dict({**architecture, "space": content["space"]}, space)
            for architecture in content["architectures"]
        ]
        router = Router.load(directory) if content["has_router"] else None
        bins = TimestepBins(tuple(content["bounds"])) if "bounds" in content else None
        return cls(architectures, router, ResultInfo.from_dict(content["info"]), bins)


def share_warnings(shares: Sequence[float]) -> list[str]:
    """Return warnings, one line each, about how N experts share the training prompts; none for N = 1."""
    count = len(shares)
    lines: list[str] = []
    if count < 2:
        return lines
    if empty := [expert for expert, share in enumerate(shares) if not share]:
        get, are = ("get", "are") if len(empty) > 1 else ("gets", "is")
        experts = "experts" if len(empty) > 1 else "expert"
        lines.append(f"{experts} {_listed(empty)} of {count} {get} no training prompts and {are} not fine-tuned")
    most = max(range(count), key=lambda expert: shares[expert])
    if shares[most] > MOST_SHARE:
        lines.append(
            f"expert {most} of {count} gets {100 * shares[most]:.1f} % of the training prompts, so the mixture is "
            "nearly one architecture"
        )
    return lines


def _listed(experts: Sequence[int]) -> str:
    return ", ".join(map(str, experts))


def describe_cost(architectures: Sequence[Architecture], cost: CostModel) -> ResultInfo:
    """Return the info about the costs of architectures, and about how the costs were counted."""
    return ResultInfo(
        sample_size=cost.sample_size,
        text_length=cost.text_length,
        convention=cost.convention,
        dense_macs=cost.dense_macs,
        macs=[cost.macs(architecture) for architecture in architectures],
        ratio=[cost.ratio(architecture) for architecture in architectures],
        dense_params=cost.dense_params,
        params=[cost.params(architecture) for architecture in architectures],
    )
