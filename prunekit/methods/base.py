"""What every method shares: its common settings, what it works on, and the form of its result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from diffusers import DiffusionPipeline, UNet2DConditionModel
from pydantic import BaseModel, ConfigDict, Field, model_validator

from prunekit.cost import CostModel
from prunekit.data.fingerprint import Fingerprint
from prunekit.data.images import CaptionedImages
from prunekit.errors import UserError, nearest
from prunekit.latency import LatencyModel
from prunekit.methods.aptp.router import Router
from prunekit.methods.budget import Scores, select, unaligned
from prunekit.methods.latency_budget import LatencySettings, latency_model
from prunekit.run_directory import RESULT, SCORES
from prunekit.training.checkpoint import read_json, write_json
from prunekit.training.trainer import Log
from prunekit.units import Architecture, UnitSpace, discover
from prunekit.units.discovery import match

FORMAT = 1
OPEN_GATES = 1.05  # times the budget: where soft gates cost more at the end of a search, the cut goes by little
MOST_SHARE = 0.9  # of the training prompts: an expert with more leaves nearly nothing to route
SCORES_FORMAT = 1  # raised whenever a method scores otherwise than before, so that old files are made anew


class PruneSettings(BaseModel):
    """The settings that all methods have; a method's own `Config` adds to them."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    budget: float = Field(
        0.8,
        gt=0,
        lt=1,
        description="Cost to reach, as a share of the dense UNet's MACs; or {latency: 0.7, device: here}: of its time.",
    )
    latency: LatencySettings | None = Field(
        None, description="What the budget's time is measured on; unset: the budget counts MACs."
    )
    align: Literal[8, 16, 32, 64] | None = Field(
        None, description="Channels of which every cut width is a multiple; unset: any. Methods of whole layers: none."
    )
    depth: Literal["aptp", "all", "blocks", "none"] = Field("aptp", description="Which whole layers may be removed.")
    include: str | list[str] | None = Field(
        None, description="Globs over module paths: prune only these; all if unset."
    )
    exclude: str | list[str] | None = Field(None, description="Globs over module paths: leave these as they are.")
    convention: Literal["exact", "conv_linear", "aptp"] = Field("exact", description="How MACs are counted.")
    resolution: int | tuple[int, int] | None = Field(
        None, description="Image side or (height, width) in pixels at which MACs count; unset: the model's own."
    )
    text_length: int | None = Field(None, ge=1, description="Text tokens at which MACs count; unset: the tokenizer's.")
    seed: int = Field(0, ge=0, lt=2**63, description="What all randomness of the method is keyed by.")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("budget"), Mapping):
            own = dict(data["budget"])
            if "latency" not in own:
                raise UserError(f"budget={own}: give a number, or a mapping with `latency`, the share of the time")
            data = {**data, "budget": own.pop("latency"), "latency": own}
        for name in data if isinstance(data, dict) else ():
            if name not in cls.model_fields:
                hint = nearest(str(name), cls.model_fields) or "."
                raise UserError(f"unknown setting {name!r}{hint} Settings: {', '.join(cls.model_fields)}")
        return data


@dataclass
class PruneResult:
    """What a method chose.

    architectures: one, or N of a mixture. router: sends a prompt to one of the N; None where there is one.
    info: JSON values, e.g. the method, its settings, the MACs reached.
    """

    architectures: list[Architecture]
    router: Router | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """What a person should know beside the MACs, a line each: the predicted time."""
        if ratios := self.info.get("latency_ratio"):
            device = self.info["latency_table"]["device"]
            return [f"predicted at {self._mean(ratios):.4f} of the dense time on {device}"]
        return []

    def warnings(self) -> list[str]:
        """What may be wrong, a line each.

        Widths that stay unaligned, a search that ended before its gates closed, experts that are the same architecture,
        experts without training prompts, and an expert with nearly all of them.
        """
        info, lines = self.info, []
        left = {f"{path} ({channels})" for own in info.get("unaligned", ()) for path, channels in own.items()}
        if left:
            few = ", ".join(sorted(left)[:3]) + (", …" if len(left) > 3 else "")
            lines.append(f"{len(left)} width(s) are no multiple of {info['settings']['align']} channels: {few}")
        kept = info.get("gates_ratio")
        if kept and (mean := self._mean(kept)) > OPEN_GATES * info["settings"]["budget"]:
            more = "raise search.steps or search.learning_rate" + ", or lower warmup" * ("warmup" in info["settings"])
            lines.append(f"gates kept {mean:.2f} of the cost when the search ended, so the cut goes by little: {more}")
        lines += [
            f"experts {_listed(same)} of {len(self.architectures)} have the same architecture" for same in self._alike()
        ]
        counts = info.get("prompts_per_expert") or ()
        return lines + share_warnings([count / sum(counts) for count in counts])

    def _alike(self) -> list[list[int]]:
        """Return the experts that share an architecture, a list for each such architecture."""
        groups: list[list[int]] = []
        for index, architecture in enumerate(self.architectures):
            group = next((group for group in groups if self.architectures[group[0]] == architecture), None)
            groups.append([index]) if group is None else group.append(index)
        return [group for group in groups if len(group) > 1]

    def _mean(self, values: Sequence[float]) -> float:
        """Return the mean of a value per architecture over the training prompts, where they are known."""
        counts = self.info.get("prompts_per_expert") or [1] * len(values)
        return sum(n * value for n, value in zip(counts, values, strict=True)) / sum(counts)

    @property
    def space(self) -> UnitSpace:
        """The space of all its architectures."""
        return self.architectures[0].space

    def save(self, directory: str | Path) -> Path:
        """Write `result.json` and, where there is a router, `router.safetensors`; returns the directory."""
        directory = Path(directory)
        if self.router is not None:
            self.router.save(directory)
        # The space is the same for all: it is written once.
        architectures = [{**architecture.to_dict(), "space": None} for architecture in self.architectures]
        content = {
            "format": FORMAT,
            "info": self.info,
            "has_router": self.router is not None,
            "space": self.space.to_dict(),
            "architectures": architectures,
        }
        write_json(directory / RESULT, content)
        return directory

    @classmethod
    def load(cls, directory: str | Path, of: UNet2DConditionModel | UnitSpace | None = None) -> "PruneResult":
        """Read what `save` wrote.

        Args:
            directory: where it lies.
            of: the UNet or space that it must fit; the UNet may be on the meta device.

        Raises:
            FileNotFoundError: no result there.
            ValueError: a result of another format, or one that does not fit `of` (the message names a difference).

        """
        path = Path(directory) / RESULT
        if not path.is_file():
            raise FileNotFoundError(f"no pruning result at {path}")
        content = read_json(path)
        if content.get("format") != FORMAT:
            raise UserError(f"{path} has format {content.get('format')!r}; this version reads format {FORMAT}")
        space = of if isinstance(of, UnitSpace) else UnitSpace.from_dict(content["space"])
        if isinstance(of, UNet2DConditionModel):
            match(of, space)
        architectures = [
            Architecture.from_dict({**architecture, "space": content["space"]}, space)
            for architecture in content["architectures"]
        ]
        router = Router.load(directory) if content["has_router"] else None
        return cls(architectures, router, content["info"])


def share_warnings(shares: Sequence[float]) -> list[str]:
    """Return what is wrong with how a mixture's N experts share the training prompts, a line each; none for N = 1."""
    count, lines = len(shares), []
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


class Method:
    """A way to choose Architectures. A subclass has a `Config` and a `prune`, and registers itself by name."""

    Config: ClassVar[type[PruneSettings]] = PruneSettings
    name: ClassVar[str]  # set by `register`
    needs_data: ClassVar[bool] = True

    def __init__(self, **settings: Any):
        self.config = self.Config(**settings)

    def prune(
        self,
        pipeline: DiffusionPipeline | UNet2DConditionModel,
        dataset: Any = None,
        directory: str | Path | None = None,
        log: Log | None = None,
    ) -> PruneResult:
        """Choose; see the method. Where a directory is given, the result is also saved there.

        log: takes rows of figures while a method trains.
        """
        raise NotImplementedError

    def fine_tuning(self) -> dict[str, Any]:
        """Fine-tuning settings, by name, that the method asks for in place of a recipe's; none unless it says so."""
        return {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.config)})"


class ScoreMethod(Method):
    """A method that scores every unit once and can then meet any budget."""

    def score(self, pipeline: DiffusionPipeline | UNet2DConditionModel, dataset: Any = None) -> Scores:
        """The importance of every unit."""
        raise NotImplementedError

    def prune(
        self,
        pipeline: DiffusionPipeline | UNet2DConditionModel,
        dataset: Any = None,
        directory: str | Path | None = None,
        log: Log | None = None,
    ) -> PruneResult:
        """Score, and take the highest scores within the budget.

        Where a directory is given, the scores are kept there as `scores.safetensors`. A later prune of the same
        weights with the same data and settings reads them, whatever its budget; otherwise they are made anew.
        """
        cost = budget_cost(pipeline, self.config)
        path = None if directory is None else Path(directory) / SCORES
        scores = self.score(pipeline, dataset) if path is None else self._cached(path, pipeline, dataset)
        architecture = select(scores, cost, self.config.budget, self.config.align)
        result = PruneResult([architecture], info=describe_result(self, [architecture], cost))
        if directory is not None:
            result.save(directory)
        return result

    def score_info(self) -> dict[str, Any]:
        """What every `Scores.info` of the method holds: its name, and its settings without what meets the budget."""
        settings = self.config.model_dump(mode="json", exclude={"budget", "latency", "align"})
        return {"method": self.name, "settings": settings}

    def _cached(self, path: Path, pipeline: DiffusionPipeline | UNet2DConditionModel, dataset: Any) -> Scores:
        key = self._key(pipeline, dataset)
        if path.is_file():
            try:
                scores = Scores.load(path)
            except ValueError:  # of another format
                scores = None
            if scores is not None and scores.info.get("key") == key:
                return scores
        scores = self.score(pipeline, dataset)
        scores.info["key"] = key
        scores.save(path)
        return scores

    def _key(self, pipeline: DiffusionPipeline | UNet2DConditionModel, dataset: Any) -> str:
        """A digest of all that the scores depend on: settings, the UNet's weights, the noise schedule, the data."""
        unet, scheduler = unet_of(pipeline), getattr(pipeline, "scheduler", None)
        configs = [{} if part is None else part.config for part in (unet, scheduler)]
        plain = [sorted(item for item in config.items() if not item[0].startswith("_")) for config in configs]
        fingerprint = Fingerprint(SCORES_FORMAT, self.score_info(), *plain)
        if unet.device.type != "meta":
            fingerprint.add_module(unet)
        if isinstance(dataset, CaptionedImages):  # what will encode them
            fingerprint.add_encoders(pipeline)
        return fingerprint.add_data(dataset).key()


def unet_of(pipeline: DiffusionPipeline | UNet2DConditionModel) -> UNet2DConditionModel:
    """The UNet of a pipeline, or the UNet itself."""
    unet = pipeline if isinstance(pipeline, UNet2DConditionModel) else getattr(pipeline, "unet", None)
    if not isinstance(unet, UNet2DConditionModel):
        raise UserError(
            f"a pipeline with a UNet2DConditionModel, or one itself, is needed; got {type(pipeline).__name__}"
        )
    return unet


def space_of(pipeline: DiffusionPipeline | UNet2DConditionModel, settings: PruneSettings) -> UnitSpace:
    """The units that the settings allow to remove."""
    return discover(unet_of(pipeline), settings.depth, settings.include, settings.exclude)


def space_and_cost(
    pipeline: DiffusionPipeline | UNet2DConditionModel, settings: PruneSettings
) -> tuple[UnitSpace, CostModel]:
    """The units that may be removed, and what counts their cost at the resolution and text length of the settings.

    Raises:
        ValueError: a resolution that is no multiple of the pipeline's VAE scale, or one given for a UNet alone, whose
            VAE is unknown.

    """
    unet, space = unet_of(pipeline), space_of(pipeline, settings)
    tokenizer = getattr(pipeline, "tokenizer", None)
    text_length = settings.text_length or getattr(tokenizer, "model_max_length", 77)
    return space, CostModel(unet, space, _sample_size(pipeline, settings.resolution), text_length, settings.convention)


def budget_cost(pipeline: DiffusionPipeline | UNet2DConditionModel, settings: PruneSettings) -> CostModel:
    """What counts the budget: MACs, or the time on a device, whose table is then measured unless it is there.

    Raises:
        ValueError: as `space_and_cost` and `latency_model`.

    """
    _, cost = space_and_cost(pipeline, settings)
    return (
        cost if settings.latency is None else latency_model(unet_of(pipeline), cost, settings.latency, settings.align)
    )


def _sample_size(
    pipeline: DiffusionPipeline | UNet2DConditionModel, resolution: int | tuple[int, int] | None
) -> tuple[int, int] | None:
    if resolution is None:
        return None
    scale = getattr(pipeline, "vae_scale_factor", None)
    if scale is None:
        raise UserError(
            f"resolution={resolution} is in pixels, and a UNet alone does not know its VAE's scale; "
            "pass the whole pipeline, or leave resolution unset"
        )
    sides = (resolution, resolution) if isinstance(resolution, int) else resolution
    if any(side < scale or side % scale for side in sides):
        nearest = tuple(max(1, round(side / scale)) * scale for side in sides)
        raise UserError(
            f"resolution={resolution} must be multiples of the VAE's scale {scale}; the nearest is {nearest}"
        )
    return sides[0] // scale, sides[1] // scale


def describe_result(method: Method, architectures: list[Architecture], cost: CostModel) -> dict[str, Any]:
    """What every result's `info` holds: method, settings, and what was reached.

    With `align`: `unaligned`, per architecture the groups that stay so, with their channels. With a budget in time:
    `latency_ratio`, predicted.
    """
    settings = method.config.model_dump(mode="json")
    info = {"method": method.name, "settings": settings, **describe_cost(architectures, cost)}
    if (align := method.config.align) is not None:
        info["unaligned"] = [unaligned(architecture, align) for architecture in architectures]
    if isinstance(cost, LatencyModel):
        info["latency_ratio"] = [cost.latency_ratio(architecture) for architecture in architectures]
        info["latency_table"] = {**cost.table.conditions, "dense": cost.table.dense, "digest": cost.table.digest}
    return info


def describe_cost(architectures: list[Architecture], cost: CostModel) -> dict[str, Any]:
    """What every result's `info` says of costs, and how they were counted."""
    return {
        "sample_size": list(cost.sample_size),
        "text_length": cost.text_length,
        "convention": cost.convention,
        "dense_macs": cost.dense_macs,
        "macs": [cost.macs(architecture) for architecture in architectures],
        "ratio": [cost.ratio(architecture) for architecture in architectures],
        "dense_params": cost.dense_params,
        "params": [cost.params(architecture) for architecture in architectures],
    }
