"""Base classes of all methods: how a method is called, and what it declares to recipes, plans and checks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from diffusers import DiffusionPipeline, ModelMixin

from prunekit.core.cost import CostModel
from prunekit.core.discovery import discover
from prunekit.core.registry import denoiser_in, scale_of, text_length
from prunekit.core.space import Architecture, UnitSpace
from prunekit.data.encoded import EncodedData
from prunekit.data.fingerprint import Fingerprint
from prunekit.data.images import CaptionedImages
from prunekit.measuring.latency_model import LatencyModel
from prunekit.methods.budget import Scores, select, unaligned
from prunekit.methods.latency_budget import latency_model
from prunekit.methods.result import PruneResult, ResultInfo, describe_cost
from prunekit.methods.settings import PruneSettings
from prunekit.methods.workload import MethodWork
from prunekit.runtime.errors import UserError
from prunekit.runtime.run_directory import SCORES
from prunekit.training.memory import SMOKE, capped, two_steps
from prunekit.training.trainer import Log, TrainerConfig

SCORES_FORMAT = 1  # increase it whenever a method computes other scores than before: old files are then ignored
Dataset = EncodedData | CaptionedImages
M = TypeVar("M", bound="Method")


class Method:
    """A way to choose Architectures. A subclass has a `Config` and a `choose`, and registers itself by name.

    A method declares what recipes, plans, checks and comparisons need to know of it: `num_models`, `work`, `smoke`,
    `short_settings`, `undistilled` and `fine_tuning`. All of them have a default.
    """

    Config: ClassVar[type[PruneSettings]] = PruneSettings
    name: ClassVar[str]  # set by `register`
    needs_data: ClassVar[bool] = True
    smoke: ClassVar[Mapping[str, int | None]] = {}  # largest values of settings in a smoke test; None: unset
    undistilled: ClassVar[Mapping[str, Any]] = {}  # settings under which the method chooses without a teacher

    def __init__(self, **settings: Any):
        self.config = self.Config(**settings)

    @property
    def num_models(self) -> int:
        """Return the number of Architectures that `prune` returns."""
        return 1

    def prune(
        self,
        pipeline: DiffusionPipeline | ModelMixin,
        dataset: Dataset | None = None,
        directory: str | Path | None = None,
        log: Log | None = None,
    ) -> PruneResult:
        """Choose Architectures that meet the budget.

        Args:
            pipeline: a pipeline, which is not changed; or its denoiser alone, if the method does not need the rest.
            dataset: encoded data, or captioned images, which are then encoded with the embedded prompt encoder; None
                if the method needs none.
            directory: folder of the result and of files from which a later call resumes; None: nothing is saved.
            log: function that takes rows of figures while a method trains.

        Raises:
            UserError: a budget below the smallest cost of the UNet, settings that do not fit it, or missing data.

        """
        directory = None if directory is None else Path(directory)
        result = self.choose(pipeline, dataset, directory, log)
        if (count := len(result.architectures)) != self.num_models:
            raise UserError(
                f"{self.name} chose {count} architectures, but its num_models is {self.num_models}: num_models "
                "must equal the number that `choose` returns"
            )
        if directory is not None:
            result.save(directory)
            self.clear(directory)
        return result

    def choose(
        self,
        pipeline: DiffusionPipeline | ModelMixin,
        dataset: Dataset | None,
        directory: Path | None,
        log: Log | None,
    ) -> PruneResult:
        """Choose Architectures that meet the budget; arguments as in `prune`, which calls this and saves the result."""
        raise NotImplementedError

    def clear(self, directory: Path) -> None:
        """Remove the files that a directory with a saved result no longer needs, such as checkpoints."""

    def work(self, space: UnitSpace) -> MethodWork:
        """Return the work that the method does before it chooses among the units of a space; none by default."""
        return MethodWork()

    def calibration_bytes(self, model: ModelMixin) -> int:
        """Return the bytes that a calibration holds in addition to its forward passes; the model may be on meta."""
        return 0

    def fine_tuning(self) -> dict[str, Any]:
        """Return fine-tuning settings, by name, that replace a recipe's; none by default."""
        return {}

    def short_settings(self, devices: int) -> dict[str, Any]:
        """Return settings to change so that the method takes seconds, at its full batch sizes.

        `prunekit check` measures memory and time with them. By default every training among the settings gets two
        steps. devices: number of devices that share a batch; a micro-batch is at most the samples of one device.
        """
        return {name: two_steps(value, devices) for name, value in self.config if isinstance(value, TrainerConfig)}

    @classmethod
    def smoke_settings(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return a recipe's settings of the method, reduced to the size of a smoke test.

        A number that `smoke` names is capped at the value there, also if the recipe does not give it. Trainings are
        capped as well. A setting of a wrong type is left unchanged, and `Config` refuses it.
        """
        most = {name: value for name, value in cls.smoke.items() if value is not None}
        unset = {name: None for name, value in cls.smoke.items() if value is None}
        kinds = {name: field.annotation for name, field in cls.Config.model_fields.items()}
        trainings = [name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, TrainerConfig)]
        missing = {
            name: cls.Config.model_fields[name].get_default(call_default_factory=True)
            for name in trainings
            if name not in settings
        }
        small = most | {name: value.model_dump() for name, value in missing.items() if isinstance(value, TrainerConfig)}
        chosen = capped({**small, **settings}, most) | unset
        cut = {name: capped(chosen[name], SMOKE) for name in trainings if isinstance(chosen.get(name), Mapping)}
        return chosen | cut

    def shrunk(self: M) -> M:
        """Return the same method at the size of a smoke test."""
        return type(self)(**self.smoke_settings(self.config.model_dump(exclude_unset=True)))

    def recorded(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return a recipe's settings in the form that a run records; later versions must read the same meaning."""
        return settings

    @classmethod
    def read_recorded(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Return settings that an earlier version recorded, in the form of this version."""
        return settings

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.config)})"


class ScoreMethod(Method):
    """A method that scores every unit once and can then meet any budget."""

    def score(self, pipeline: DiffusionPipeline | ModelMixin, dataset: Dataset | None = None) -> Scores:
        """Return the importance of every unit."""
        raise NotImplementedError

    def choose(
        self,
        pipeline: DiffusionPipeline | ModelMixin,
        dataset: Dataset | None,
        directory: Path | None,
        log: Log | None,
    ) -> PruneResult:
        """Score all units, and keep the units with the highest scores within the budget.

        If a directory is given, the scores are saved there as `scores.safetensors`. A later call with the same weights,
        data and settings reads them, for any budget.
        """
        cost = budget_cost(pipeline, self.config)
        scores = self.kept_scores(pipeline, dataset, directory)
        architecture = select(scores, cost, self.config.budget, self.config.align)
        return PruneResult([architecture], info=describe_result(self, [architecture], cost))

    def score_info(self) -> dict[str, Any]:
        """Return the content of `Scores.info`: the method's name, and its settings except those of the budget."""
        settings = self.config.model_dump(mode="json", exclude={"budget", "latency", "align"})
        return {"method": self.name, "settings": settings}

    def kept_scores(
        self, pipeline: DiffusionPipeline | ModelMixin, dataset: Dataset | None, directory: Path | None
    ) -> Scores:
        """Return the scores, from `directory` if weights, data and settings are the same; save new scores there."""
        if directory is None:
            return self.score(pipeline, dataset)
        path, key = directory / SCORES, self._key(pipeline, dataset)
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

    def _key(self, pipeline: DiffusionPipeline | ModelMixin, dataset: Dataset | None) -> str:
        """Return a digest of all that the scores depend on: settings, weights, the noise schedule and the data."""
        model, scheduler = denoiser_in(pipeline), getattr(pipeline, "scheduler", None)
        configs = [{} if part is None else part.config for part in (model, scheduler)]
        plain = [sorted(item for item in config.items() if not item[0].startswith("_")) for config in configs]
        fingerprint = Fingerprint(SCORES_FORMAT, self.score_info(), *plain)
        if model.device.type != "meta":
            fingerprint.add_module(model)
        if isinstance(dataset, CaptionedImages):  # the encoding depends on them
            fingerprint.add_encoders(pipeline)
        return fingerprint.add_data(dataset).key()


def space_of(pipeline: DiffusionPipeline | ModelMixin, settings: PruneSettings) -> UnitSpace:
    """Return the units that may be removed under the settings."""
    return discover(denoiser_in(pipeline), settings.depth, settings.include, settings.exclude)


def space_and_cost(pipeline: DiffusionPipeline | ModelMixin, settings: PruneSettings) -> tuple[UnitSpace, CostModel]:
    """Return the units that may be removed, and their cost model at the resolution and text length of the settings.

    Raises:
        ValueError: a resolution that is not a multiple of the pipeline's VAE scale, or one given for a UNet alone,
            whose VAE is unknown.

    """
    model, space = denoiser_in(pipeline), space_of(pipeline, settings)
    tokens = settings.text_length or text_length(pipeline)
    return space, CostModel(model, space, _sample_size(pipeline, settings.resolution), tokens, settings.convention)


def budget_cost(pipeline: DiffusionPipeline | ModelMixin, settings: PruneSettings) -> CostModel:
    """Return the cost model of the budget: MACs, or time on a device; a missing latency table is measured.

    Raises:
        ValueError: as `space_and_cost` and `latency_model`.

    """
    _, cost = space_and_cost(pipeline, settings)
    return (
        cost
        if settings.latency is None
        else latency_model(denoiser_in(pipeline), cost, settings.latency, settings.align)
    )


def _sample_size(
    pipeline: DiffusionPipeline | ModelMixin, resolution: int | tuple[int, int] | None
) -> tuple[int, int] | None:
    if resolution is None:
        return None
    scale = scale_of(pipeline)
    if scale is None:
        raise UserError(
            f"resolution={resolution} is in pixels, and a UNet alone has no VAE scale; pass the whole pipeline, "
            "or unset resolution"
        )
    sides = (resolution, resolution) if isinstance(resolution, int) else resolution
    if any(side < scale or side % scale for side in sides):
        nearest = tuple(max(1, round(side / scale)) * scale for side in sides)
        raise UserError(
            f"resolution={resolution} must be multiples of the VAE's scale {scale}; the nearest is {nearest}"
        )
    return sides[0] // scale, sides[1] // scale


def describe_result(method: Method, architectures: Sequence[Architecture], cost: CostModel) -> ResultInfo:
    """Return the info that every result has: the method, its settings and the costs of the architectures.

    With `align`, the info also has the groups that stay unaligned; with a latency budget, also the predicted time.
    """
    info = describe_cost(architectures, cost)
    info.method, info.settings = method.name, method.config.model_dump(mode="json")
    if (align := method.config.align) is not None:
        info.unaligned = [unaligned(architecture, align) for architecture in architectures]
    if isinstance(cost, LatencyModel):
        info.latency_ratio = [cost.latency_ratio(architecture) for architecture in architectures]
        info.latency_table = {**cost.table.conditions, "dense": cost.table.dense, "digest": cost.table.digest}
    return info
