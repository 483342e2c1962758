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
MEMBER = re.compile(r"[a-z_]\w*:[\w,]+")  # a budget that is a member's own, such as bksdm:2,1,1,1


class Section(BaseModel):
    """A part of a recipe, in which a setting that it does not know is a mistake."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class EvaluationConfig(Section):
    """What is generated and compared, the same for every row of the table."""

    num_images: int = Field(500, gt=1, description="generated images of each row")
    num_references: int = Field(
        10_000, gt=1, description="real images at most that they are held against; each prompt's own is among them"
    )
    num_seen_images: int | None = Field(
        None,
        ge=0,
        description="generated images of each row whose prompts are of training pictures, for the figures in "
        "parentheses; unset: as many as num_images. Only where data.holdout_by=pictures",
    )
    at_steps: list[int] = Field(
        [], description="fine-tuning steps whose weights are kept and get rows of their own, beside the last one's"
    )
    steps: int = Field(25, gt=0, description="sampling steps, of the pipeline's own scheduler")
    guidance: float = Field(3.0, ge=0, description="classifier-free guidance scale")
    batch_size: int = Field(50, gt=0, description="prompts of one pipeline call; fixed batches by index")
    precision: Precision = Field("auto", description=f"autocast while generating; {AUTO}")
    num_predictions: int = Field(256, gt=0, description="(image, t, noise) triples of the agreement with dense")
    num_pictures: int = Field(10, gt=0, description="columns of the comparison picture")

    def seen_images(self, holds_pictures: bool) -> int:
        """Return how many of a row's pictures are of training pictures' prompts; none where no picture is held out."""
        if not holds_pictures:
            return 0
        return self.num_images if self.num_seen_images is None else self.num_seen_images


class RecoverConfig(Section):
    """What follows the cut."""

    closed_form: ClosedFormConfig | None = Field(
        None,
        description="refit the layers that lost inputs, by ridge regression, without back-propagation; {} takes the "
        "defaults, unset: no refit",
    )
    fine_tune: bool = Field(True, description="fine-tune, as the section fine_tune says")


class MemoryConfig(Section):
    """How models are held that no stage trains in full; for denoisers that fill a GPU."""

    weights: Literal["float32", "bfloat16", "auto"] = Field(
        "float32",
        description="dtype of frozen weights: the model's own, and those of a pruned model that a refit or "
        "fine_tune.lora alone changes; bfloat16 halves their memory, and their forward passes run in bfloat16; auto: "
        "bfloat16 where `precision: auto` means it, else float32 without offloading",
    )
    offload: bool = Field(
        False,
        description="with weights in bfloat16: text encoders, autoencoder and, while pruned models are fine-tuned, the "
        "teacher stay in host memory; each layer is copied to the GPU while it runs",
    )

    @model_validator(mode="after")
    def _offloads_lowered(self) -> "MemoryConfig":
        if self.offload and self.weights == "float32":
            raise UserError("memory.offload=true needs memory.weights=bfloat16, or auto")
        return self


class CommonRecipe(Section):
    """What every recipe that prunes a model says."""

    name: Name = Field(description="names the run directory")
    seed: Seed = Field(0, description="what all randomness is keyed by")
    model: str = Field("emoji", description="the embedded model, a directory, a .safetensors file, or a hub id")
    single_file_config: str | None = Field(None, description="with a single file: the pipeline whose configs it has")
    lora: Annotated[list[LoraWeights], BeforeValidator(as_lora)] = Field(
        [], description="LoRA weights merged into the model first: a path, or a list of paths or {path, scale}"
    )
    prompt_encoder: str = Field("emoji", description="the embedded one, or a Sentence Transformer's id or path")
    evaluator: str = Field("emoji", description="the embedded evaluator, or a CLIP model's id or path")
    data: DataConfig = DataConfig()
    cache: CacheConfig = Field(CacheConfig(), description="what of the frozen parts' output is kept on disk, and how")
    memory: MemoryConfig = Field(MemoryConfig(), description="how models are held that no stage trains in full")
    tracking: TrackingConfig = Field(TrackingConfig(), description="where figures go beside log.jsonl")
    resolution: int | None = Field(
        None, gt=0, le=2**14, description="pixels of a side while training; unset: the model's own"
    )
    prune: PruneSettings = Field(PruneSettings(), description="what may be removed, and the budget")
    recover: RecoverConfig = Field(RecoverConfig(), description="what follows the cut")
    fine_tune: FineTuneConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    engine: Engine = LOCAL

    @property
    def drawn_images(self) -> int:
        """How many pictures a row draws, of held-out and of training pictures' prompts."""
        return self.evaluation.num_images + self.evaluation.seen_images(self.data.holds_pictures)


class PruneRecipe(CommonRecipe):
    """Prune one model by one or more methods, fine-tune, generate, and compare."""

    job: Literal["prune"] = "prune"
    prune: PruneSettings = Field(description="what may be removed, and the budget")
    methods: dict[str, dict[str, Any]] = Field(description="methods by name, each with its own settings")

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
        """Return the method `name` with the recipe's common settings and its own."""
        return build_method(name, self.prune, self.methods[name] or {}, f"methods.{name}")

    def method_of(self, label: str) -> Method:
        """Return the method of a row, as a comparison's recipe does."""
        return self.method(label)

    def fine_tuning(self, name: str) -> FineTuneConfig:
        """Return how the method's architectures are fine-tuned: the recipe's settings, under what the method asks."""
        return FineTuneConfig.model_validate({**self.fine_tune.model_dump(), **self.method(name).fine_tuning()})


class BudgetEntry(Section):
    """One budget of a comparison."""

    budget: float | str = Field(
        description='share of the dense MACs, or "bksdm:base", "bksdm:2,1,1,1": that member\'s own'
    )
    seeds: list[Seed] = Field(
        [0], min_length=1, description="repetitions: search, fine-tuning and noise are keyed by it"
    )
    methods: list[str] | None = Field(None, description="labels of the methods at this budget; unset: all")

    @field_validator("budget")
    @classmethod
    def _names_a_member(cls, budget: float | str) -> float | str:
        if isinstance(budget, str) and not MEMBER.fullmatch(budget):
            raise UserError(f"budget={budget!r}: give a share of the dense MACs, or bksdm:VARIANT such as bksdm:base")
        return budget

    @property
    def label(self) -> str:
        """What the table calls it."""
        return str(self.budget)


class Row(Section):
    """What a row of a comparison says beside its method's own settings."""

    method: str | None = Field(None, description="the method's name; unset: the row's label")
    distillation: bool = Field(True, description="false: the denoising error alone counts, in full")
    shared_backbone: bool | None = Field(None, description="as fine_tune has it")
    lora: LoraConfig | None = Field(None, description="as fine_tune has it")
    deltas: DeltaConfig | None = Field(None, description="as fine_tune has it")
    closed_form: bool | ClosedFormConfig | None = Field(
        None, description="as recover has it; true takes the settings there, or the defaults"
    )
    fine_tune: bool | None = Field(None, description="as recover has it")
    partition: Literal["router", "random"] = Field(
        "router",
        description="random: a control whose experts train on and serve prompts at random, with the router's shares",
    )


PER_CELL = {"budget", "seed"}  # settings of `prune` that a comparison has in `budgets`


class CompareRecipe(CommonRecipe):
    """Methods x budgets x seeds x protocols in one fair table."""

    job: Literal["compare"]
    methods: dict[str, dict[str, Any]] = Field(
        description="rows by label: the method's settings, and those of the section Row"
    )
    budgets: list[BudgetEntry] = Field(min_length=1, description="budgets, each with its seeds")
    protocols: list[Literal["equal_steps", "equal_total", "equal_compute"]] = Field(
        ["equal_steps", "equal_total"],
        min_length=1,
        description="equal_steps: every model trains for fine_tune.steps, as the papers do; equal_total: every row "
        "computes as much as the costliest one does so, calibration and search included, by training longer; "
        "equal_compute: the N experts of a mixture share fine_tune.steps, 1/N each, and searches are not charged",
    )
    pairs: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = Field(
        [], description="pairs of rows whose agreement and KID are tested, paired by seed, with Holm's correction"
    )
    published: list[dict[str, float | str]] = Field([], description="figures of a paper, printed beside ours")

    @model_validator(mode="after")
    def _rows(self) -> "CompareRecipe":
        twice = PER_CELL & self.prune.model_fields_set
        if twice:
            raise UserError(
                f"prune.{min(twice)} does not belong into a comparison: `budgets` has budgets and seeds (of the time: "
                "add prune.latency={device: here})"
            )
        if self.prune.latency is not None and (named := [e.budget for e in self.budgets if isinstance(e.budget, str)]):
            raise UserError(f"budget {named[0]!r} is a member's MACs; with prune.latency give shares of the time")
        if self.evaluation.at_steps:
            raise UserError("evaluation.at_steps does not belong into a comparison: its rows are of the last step")
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
        """Return what a row says beside its method's settings."""
        settings = self.methods[label] or {}
        try:
            return Row(**{key: value for key, value in settings.items() if key in Row.model_fields})
        except ValidationError as error:
            raise UserError(explain(error, Row, f"methods.{label}.")) from error

    def recovering(self, label: str) -> RecoverConfig:
        """Return how a row's models are recovered: the recipe's way, but for what the row says."""
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

    def steps(self, protocol: str, num_models: int) -> int:
        """Return the fine-tuning steps of each of a row's models under a protocol."""
        steps = self.fine_tune.steps
        return max(1, steps // num_models) if protocol == "equal_compute" else steps

    def fine_tuning(self, label: str, steps: int, scale_warmup: bool = False) -> FineTuneConfig:
        """Return how a row's models are fine-tuned; without distillation the denoising error alone counts, in full.

        scale_warmup: the warm-up has the share of the steps that the recipe gives it, however many there are.
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
    """Return a method from the settings that all methods share and from further ones, which are found at `where`.

    more: other settings that are allowed there.
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
    """Refuse a closed-form refit of models that share their weights: it fits the weights of one mask alone."""
    if recovering.closed_form is not None and tuning.shared_backbone and method.num_models > 1:
        raise UserError(
            f"recover.closed_form with fine_tune.shared_backbone=true: the models of {label!r} share their weights, "
            "and a refit fits those of one model; leave one of the two out"
        )


class PretrainRecipe(Section):
    """Train an embedded model from nothing: the UNet's with all its parts and its evaluator, or SD 3's transformer."""

    job: Literal["pretrain"]
    name: Name = Field(description="names the run directory")
    seed: Seed = Field(0, description="what all randomness is keyed by")
    data: DataConfig = Field(DataConfig(holdout_by="captions"), description="what it learns from: every picture")
    transformer: EmojiSD3Config | None = Field(
        None,
        description="Stable Diffusion 3's transformer in miniature, on the frozen autoencoder and text encoder of the "
        "embedded model; unset: a UNet, with a new autoencoder, text encoder and evaluator",
    )
    shapes: EmojiModelConfig = Field(EmojiModelConfig(), description="shapes of the UNet and its parts")
    autoencoder: TrainerConfig | None = Field(None, description="training of the autoencoder, of a UNet's model")
    decoder: TrainerConfig | None = Field(None, description="further training of its decoder alone")
    diffusion: TrainerConfig
    evaluator: TrainerConfig | None = Field(None, description="training of the evaluator, of a UNet's model")
    caption_dropout: float = Field(0.1, ge=0, le=1, description="share of empty captions, for guidance")
    timestep_shift: float = Field(
        1.0, ge=1, description="above 1: more of the noisiest timesteps in `diffusion` of a UNet"
    )
    milestones: list[int] = Field([], description="steps of `diffusion` whose weights are kept for the quality curve")
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _parts(self) -> "PretrainRecipe":
        for name in ("autoencoder", "decoder", "evaluator"):
            if (getattr(self, name) is None) == (self.transformer is None):
                needed = "is needed" if self.transformer is None else "does not belong beside `transformer`"
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
            raise UserError("pretraining learns from every picture: leave data.holdout_by=captions")
        return data


AnyRecipe = PruneRecipe | PretrainRecipe | CompareRecipe
Recipe = Annotated[AnyRecipe, Field(discriminator="job")]
KINDS: dict[str, type[AnyRecipe]] = {"prune": PruneRecipe, "pretrain": PretrainRecipe, "compare": CompareRecipe}
