"""The schema of a recipe: every setting with its type, default and meaning; a section per part of a run."""

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from prunekit.data.cache_config import CacheConfig
from prunekit.data.config import DataConfig
from prunekit.jobs.recipe.faults import explain
from prunekit.methods import registry
from prunekit.methods.base import Method
from prunekit.methods.settings import PruneSettings
from prunekit.models import LoraWeights, as_lora
from prunekit.models.emoji_model import EmojiModelConfig
from prunekit.models.emoji_sd3 import EmojiSD3Config
from prunekit.recovery.closed_form import ClosedFormConfig
from prunekit.recovery.deltas import DeltaConfig
from prunekit.recovery.fine_tuning import FineTuneConfig
from prunekit.recovery.low_rank import LoraConfig
from prunekit.runtime.engines import LOCAL, Engine
from prunekit.runtime.errors import UserError, nearest, plain_name
from prunekit.runtime.precision import AUTO, Precision
from prunekit.runtime.tracking import TrackingConfig
from prunekit.training.trainer import TrainerConfig

Name = Annotated[str, AfterValidator(lambda text: plain_name(text, "name"))]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
MEMBER = re.compile(r"[a-z_]\w*:[\w,]+")  # a budget that names a BK-SDM member, such as bksdm:2,1,1,1


class Section(BaseModel):
    """A part of a recipe; an unknown setting in it is an error."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class EvaluationConfig(Section):
    """Settings of generation and evaluation, equal for every row of the table."""

    num_images: int = Field(500, gt=1, description="Number of generated images per row.")
    num_references: int = Field(
        10_000,
        gt=1,
        description="Largest number of real images to compare with; they include the image of each prompt.",
    )
    num_seen_images: int | None = Field(
        None,
        ge=0,
        description="Number of generated images per row for prompts of training pictures (the figures in parentheses), "
        "if data.holdout_by=pictures; unset: num_images.",
    )
    at_steps: list[int] = Field(
        [],
        description="Fine-tuning steps whose weights are stored and get their own rows, in addition to the last step.",
    )
    steps: int = Field(25, gt=0, description="Number of sampling steps of the pipeline's own scheduler.")
    guidance: float = Field(3.0, ge=0, description="Scale of classifier-free guidance.")
    batch_size: int = Field(50, gt=0, description="Prompts per pipeline call; batches are fixed by index.")
    precision: Precision = Field("auto", description=f"Autocast dtype of generation. {AUTO}")
    num_predictions: int = Field(
        256, gt=0, description="Number of (image, t, noise) triples for the agreement with the dense model."
    )
    num_pictures: int = Field(10, gt=0, description="Number of columns of the comparison picture.")

    def seen_images(self, holds_pictures: bool) -> int:
        """Return the number of pictures per row for prompts of training pictures; 0 if no pictures are held out."""
        if not holds_pictures:
            return 0
        return self.num_images if self.num_seen_images is None else self.num_seen_images


class RecoverConfig(Section):
    """Recovery after the cut."""

    closed_form: ClosedFormConfig | None = Field(
        None,
        description="Refit the layers that lost inputs by ridge regression, without back-propagation; {} selects the "
        "defaults; unset: no refit.",
    )
    fine_tune: bool = Field(
        True, description="Fine-tune with the settings of the section fine_tune; false: no fine-tuning."
    )


class MemoryConfig(Section):
    """Storage of models that no stage trains in full, for denoisers that fill a GPU."""

    weights: Literal["float32", "bfloat16", "auto"] = Field(
        "float32",
        description="Dtype of frozen weights: those of the dense model, and those of a pruned model that only a refit "
        "or fine_tune.lora changes. bfloat16 halves their memory, and their forward passes run in bfloat16; auto: "
        "bfloat16 if `precision: auto` selects it, else float32 without offloading.",
    )
    offload: bool = Field(
        False,
        description="With weights in bfloat16: text encoders, autoencoder and, during fine-tuning, the teacher stay in "
        "host memory; each layer is copied to the GPU while it runs.",
    )

    @model_validator(mode="after")
    def _offloads_lowered(self) -> "MemoryConfig":
        if self.offload and self.weights == "float32":
            raise UserError("memory.offload=true needs memory.weights=bfloat16, or auto")
        return self


class CommonRecipe(Section):
    """Settings of every recipe that prunes a model."""

    name: Name = Field(description="Name of the run's directory.")
    seed: Seed = Field(0, description="Seed of all random numbers.")
    model: str = Field(
        "emoji",
        description="Model to prune: an embedded model, a diffusers directory, a .safetensors file, or a hub id.",
    )
    single_file_config: str | None = Field(
        None, description="Single files only: pipeline from which to take the configs; unset: by the file's tensors."
    )
    lora: Annotated[list[LoraWeights], BeforeValidator(as_lora)] = Field(
        [], description="LoRA weights to merge into the model first: a path, or a list of paths or {path, scale}."
    )
    prompt_encoder: str = Field(
        "emoji",
        description="Prompt encoder of the router: the embedded one (emoji), or a Sentence Transformer's id or path.",
    )
    evaluator: str = Field(
        "emoji", description="Evaluator of pictures: the embedded one (emoji), or a CLIP model's id or path."
    )
    data: DataConfig = DataConfig()
    cache: CacheConfig = Field(CacheConfig(), description="Storage of the frozen encoders' output on disk.")
    memory: MemoryConfig = Field(MemoryConfig(), description="Storage of models that no stage trains in full.")
    tracking: TrackingConfig = Field(TrackingConfig(), description="Trackers that get the figures of log.jsonl too.")
    resolution: int | None = Field(
        None, gt=0, le=2**14, description="Side of training pictures in pixels; unset: the model's own."
    )
    prune: PruneSettings = Field(PruneSettings(), description="Units that may be removed, and the budget.")
    recover: RecoverConfig = Field(RecoverConfig(), description="Recovery after the cut.")
    fine_tune: FineTuneConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    engine: Engine = LOCAL

    @property
    def drawn_images(self) -> int:
        """Number of pictures that a row draws, for prompts of held-out and of training pictures."""
        return self.evaluation.num_images + self.evaluation.seen_images(self.data.holds_pictures)


class PruneRecipe(CommonRecipe):
    """Prune one model by one or more methods, fine-tune, generate, and compare."""

    job: Literal["prune"] = "prune"
    prune: PruneSettings = Field(description="Units that may be removed, and the budget.")
    methods: dict[str, dict[str, Any]] = Field(description="Methods by name, each with its settings.")

    @model_validator(mode="after")
    def _methods(self) -> "PruneRecipe":
        if not self.methods:
            raise UserError(f"methods is empty; available: {', '.join(registry.names())}")
        if "seed" not in self.prune.model_fields_set:  # so that the written recipe says what a resumed run will use
            self.prune = self.prune.model_copy(update={"seed": self.seed})
        for name in self.methods:
            _refits_each(name, self.method(name), self.fine_tuning(name), self.recover)
        late = [step for step in self.evaluation.at_steps if not 0 < step < self.fine_tune.steps]
        if late:
            raise UserError(
                f"evaluation.at_steps={self.evaluation.at_steps}: each must be above 0 and below "
                f"fine_tune.steps={self.fine_tune.steps}, whose weights always have a row"
            )
        return self

    def method(self, name: str) -> Method:
        """Return the method `name`, with the settings of the section `prune` and those of the method."""
        return build_method(name, self.prune, self.methods[name] or {}, f"methods.{name}")

    def method_of(self, label: str) -> Method:
        """Return the method of a row; it has the same signature as in a comparison's recipe."""
        return self.method(label)

    def fine_tuning(self, name: str) -> FineTuneConfig:
        """Return the settings for fine-tuning a method's architectures, with the changes that the method requires."""
        return FineTuneConfig.model_validate({**self.fine_tune.model_dump(), **self.method(name).fine_tuning()})


class BudgetEntry(Section):
    """One budget of a comparison."""

    budget: float | str = Field(
        description='Fraction of the dense MACs; or "bksdm:base", "bksdm:2,1,1,1": the MACs of this BK-SDM member.'
    )
    seeds: list[Seed] = Field(
        [0], min_length=1, description="Seeds of the repetitions; each one keys search, fine-tuning and noise."
    )
    methods: list[str] | None = Field(None, description="Labels of the methods at this budget; unset: all methods.")

    @field_validator("budget")
    @classmethod
    def _names_a_member(cls, budget: float | str) -> float | str:
        if isinstance(budget, str) and not MEMBER.fullmatch(budget):
            raise UserError(f"budget={budget!r}: give a share of the dense MACs, or bksdm:VARIANT such as bksdm:base")
        return budget

    @property
    def label(self) -> str:
        """Name of the budget in the table."""
        return str(self.budget)


class Row(Section):
    """Settings of a row of a comparison, in addition to those of its method."""

    method: str | None = Field(None, description="Name of the method; unset: the label of the row.")
    distillation: bool = Field(
        True, description="Distill from the dense model; false: only the denoising error, with weight 1."
    )
    shared_backbone: bool | None = Field(None, description="Unset: as in `fine_tune`.")
    lora: LoraConfig | None = Field(None, description="Unset: as in `fine_tune`.")
    deltas: DeltaConfig | None = Field(None, description="Unset: as in `fine_tune`.")
    closed_form: bool | ClosedFormConfig | None = Field(
        None, description="Closed-form refit; unset: as in `recover`; true: with the settings there, or the defaults."
    )
    fine_tune: bool | None = Field(None, description="Unset: as in `recover`.")
    partition: Literal["router", "random"] = Field(
        "router",
        description="random: a control; its experts train on and serve random prompts, with the router's shares.",
    )


PER_CELL = {"budget", "seed"}  # settings of `prune` that a comparison gives in `budgets`


class CompareRecipe(CommonRecipe):
    """Methods x budgets x seeds x protocols in one fair table."""

    job: Literal["compare"]
    methods: dict[str, dict[str, Any]] = Field(
        description="Rows by label: settings of the method, and settings of the section Row."
    )
    budgets: list[BudgetEntry] = Field(min_length=1, description="Budgets, each with its seeds.")
    protocols: list[Literal["equal_steps", "equal_total", "equal_compute"]] = Field(
        ["equal_steps", "equal_total"],
        min_length=1,
        description="Training protocols. equal_steps: every model trains for fine_tune.steps, as in the papers; "
        "equal_total: every row gets as much compute as the most expensive row has under equal_steps, "
        "calibration and search included, by longer training; equal_compute: the N experts of a mixture share "
        "fine_tune.steps, 1/N each, and searches are not charged.",
    )
    pairs: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = Field(
        [],
        description="Pairs of rows whose differences in agreement and KID are tested, paired by seed, with Holm's "
        "correction.",
    )
    published: list[dict[str, float | str]] = Field([], description="Published figures, printed below the table.")

    @model_validator(mode="after")
    def _rows(self) -> "CompareRecipe":
        twice = PER_CELL & self.prune.model_fields_set
        if twice:
            raise UserError(
                f"prune.{min(twice)} is not allowed in a comparison: give budgets and seeds in `budgets` (for a "
                "budget of time, add prune.latency={device: here})"
            )
        if self.prune.latency is not None and (named := [e.budget for e in self.budgets if isinstance(e.budget, str)]):
            raise UserError(
                f"budget {named[0]!r} means the MACs of a BK-SDM member; with prune.latency give fractions of the time"
            )
        if self.evaluation.at_steps:
            raise UserError("evaluation.at_steps is not allowed in a comparison: its rows are of the last step")
        if unknown := next((label for pair in self.pairs for label in pair if label not in self.methods), None):
            raise UserError(f"pairs name an unknown row {unknown!r}{nearest(unknown, self.methods)}")
        for label in self.methods:
            plain_name(label, "a row of methods")
            tuning = self.fine_tuning(label, self.fine_tune.steps)
            _refits_each(label, self.method_of(label), tuning, self.recovering(label))
        for entry in self.budgets:
            for label in entry.methods or ():
                if label not in self.methods:
                    rows = f"(rows: {', '.join(self.methods)})"
                    raise UserError(f"budgets name an unknown row {label!r}{nearest(label, self.methods)} {rows}")
        return self

    @field_serializer("prune", mode="wrap")
    def _prune(self, prune: PruneSettings, settings: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in settings(prune).items() if name not in PER_CELL}

    def method(self, label: str, budget: float, seed: int) -> Method:
        """Return the method of a row at a budget."""
        row = self.row(label)
        name = row.method or label
        settings = {key: value for key, value in (self.methods[label] or {}).items() if key not in Row.model_fields}
        if not row.distillation:
            settings |= registry.get(name).undistilled
        common = self.prune.model_copy(update={"budget": budget, "seed": seed})
        return build_method(name, common, settings, f"methods.{label}", more=Row.model_fields)

    def row(self, label: str) -> Row:
        """Return a row's settings other than those of its method."""
        settings = self.methods[label] or {}
        try:
            return Row(**{key: value for key, value in settings.items() if key in Row.model_fields})
        except ValidationError as error:
            raise UserError(explain(error, Row, f"methods.{label}.")) from error

    def recovering(self, label: str) -> RecoverConfig:
        """Return the recovery settings of a row: the recipe's settings with the row's changes."""
        row, changes = self.row(label), dict[str, Any]()
        if row.closed_form is True:
            changes["closed_form"] = self.recover.closed_form or ClosedFormConfig()
        elif row.closed_form is not None:
            changes["closed_form"] = row.closed_form or None
        if row.fine_tune is not None:
            changes["fine_tune"] = row.fine_tune
        return self.recover.model_copy(update=changes)

    def method_of(self, label: str) -> Method:
        """Return the method of a row at an arbitrary budget and seed, on which its other settings do not depend."""
        return self.method(label, 0.5, 0)

    def fine_tuning(self, label: str, steps: int, scale_warmup: bool = False) -> FineTuneConfig:
        """Return a row's fine-tuning settings; without distillation, only the denoising error counts, with weight 1.

        steps: number of fine-tuning steps. scale_warmup: scale the warm-up with `steps`, so that its share of the steps
            is that in the recipe.
        """
        changes: dict[str, Any] = {"steps": steps, **self.method_of(label).fine_tuning()}
        if scale_warmup:
            changes["warmup_steps"] = round(self.fine_tune.warmup_steps * steps / self.fine_tune.steps)
        row = self.row(label)
        if not row.distillation:
            changes |= {"distillation_weight": 0.0, "denoising_weight": 1.0}
        if row.shared_backbone is not None:
            changes["shared_backbone"] = row.shared_backbone
        for name, value in (("lora", row.lora), ("deltas", row.deltas)):
            if value is not None:
                changes[name] = value.model_dump()
        return FineTuneConfig.model_validate({**self.fine_tune.model_dump(), **changes})


def build_method(
    name: str, common: PruneSettings, settings: dict[str, Any], where: str, more: Iterable[str] = ()
) -> Method:
    """Return a method with the settings `common` of all methods and its own `settings`, given in the recipe at `where`.

    more: names of other settings that are allowed at `where`, for error messages.
    """
    kind = registry.get(name)
    twice = sorted(set(settings) & set(PruneSettings.model_fields))
    if twice:
        raise UserError(f"{where}.{twice[0]} belongs to the section `prune`, which all methods share")
    try:
        return kind(**common.model_dump(exclude_unset=True), **settings)
    except ValidationError as error:
        raise UserError(explain(error, kind.Config, f"{where}.", more=more)) from error


def _refits_each(label: str, method: Method, tuning: FineTuneConfig, recovering: RecoverConfig) -> None:
    """Refuse a closed-form refit of models that share their weights: a refit fits the weights of one model only."""
    if recovering.closed_form is not None and tuning.shared_backbone and method.num_models > 1:
        raise UserError(
            f"recover.closed_form with fine_tune.shared_backbone=true: the models of {label!r} share their weights, "
            "and a refit fits those of one model; leave one of the two out"
        )


class PretrainRecipe(Section):
    """Train an embedded model from scratch: the UNet with its other parts and evaluator, or the SD 3 transformer."""

    job: Literal["pretrain"]
    name: Name = Field(description="Name of the run's directory.")
    seed: Seed = Field(0, description="Seed of all random numbers.")
    data: DataConfig = Field(
        DataConfig(holdout_by="captions"), description="Training data: pictures with training captions."
    )
    transformer: EmojiSD3Config | None = Field(
        None,
        description="Small Stable Diffusion 3 transformer on the frozen autoencoder and text encoder of the embedded "
        "model; unset: a UNet with a new autoencoder, text encoder and evaluator.",
    )
    shapes: EmojiModelConfig = Field(EmojiModelConfig(), description="Shapes of the UNet and of the models around it.")
    autoencoder: TrainerConfig | None = Field(None, description="Training of the autoencoder, for a UNet.")
    decoder: TrainerConfig | None = Field(
        None, description="Further training of the autoencoder's decoder alone, for a UNet."
    )
    diffusion: TrainerConfig
    evaluator: TrainerConfig | None = Field(None, description="Training of the evaluator, for a UNet.")
    caption_dropout: float = Field(
        0.1, ge=0, le=1, description="Fraction of captions replaced by the empty caption, for classifier-free guidance."
    )
    timestep_shift: float = Field(
        1.0, ge=1, description="Shift of the timesteps of `diffusion` towards noise, for a UNet; 1: no shift."
    )
    milestones: list[int] = Field(
        [], description="Steps of `diffusion` whose weights are stored for the quality curve."
    )
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _parts(self) -> "PretrainRecipe":
        for name in ("autoencoder", "decoder", "evaluator"):
            if (getattr(self, name) is None) == (self.transformer is None):
                needed = "is needed" if self.transformer is None else "is not allowed with `transformer`"
                raise UserError(
                    f"{name} {needed}: a transformer takes the embedded model's parts, a UNet trains its own"
                )
        return self

    @field_validator("data")
    @classmethod
    def _every_picture(cls, data: DataConfig) -> DataConfig:
        if "holdout_by" not in data.model_fields_set:
            return data.model_copy(update={"holdout_by": "captions"})
        if data.holdout_by == "pictures":
            raise UserError("pretraining uses every picture: set data.holdout_by=captions")
        return data


AnyRecipe = PruneRecipe | PretrainRecipe | CompareRecipe
Recipe = Annotated[AnyRecipe, Field(discriminator="job")]
KINDS: dict[str, type[AnyRecipe]] = {"prune": PruneRecipe, "pretrain": PretrainRecipe, "compare": CompareRecipe}
