"""A recipe: everything that a run depends on, in one YAML file with `key=value` overrides, checked before it starts."""

import difflib
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from prunekit.data.cache_config import CacheConfig
from prunekit.data.config import DataConfig
from prunekit.methods import registry
from prunekit.methods.base import Method, PruneSettings
from prunekit.models import LoraWeights, as_lora
from prunekit.training.emoji_model import EmojiModelConfig
from prunekit.training.fine_tuning import FineTuneConfig
from prunekit.training.tracking import TrackingConfig
from prunekit.training.trainer import TrainerConfig

SMOKE = {"steps": 2, "batch_size": 4, "warmup_steps": 1}  # what scale=smoke puts in place of a training's figures
SMOKE_IMAGES = 4


class RecipeError(ValueError):
    """A recipe that cannot be used; the message is one line that says what to change."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class EvaluationConfig(_Section):
    """What is generated and compared, the same for every row of the table."""

    num_images: int = Field(500, gt=1, description="generated images of each row")
    at_steps: list[int] = Field(
        [], description="fine-tuning steps whose weights are kept and get rows of their own, beside the last one's"
    )
    steps: int = Field(25, gt=0, description="PNDM steps")
    guidance: float = Field(3.0, ge=0, description="classifier-free guidance scale")
    batch_size: int = Field(50, gt=0, description="prompts of one pipeline call; fixed batches by index")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="autocast while generating")
    num_predictions: int = Field(256, gt=0, description="(image, t, noise) triples of the agreement with dense")
    num_pictures: int = Field(10, gt=0, description="columns of the comparison picture")


class CommonRecipe(_Section):
    """What every recipe that prunes a model says."""

    name: str = Field(description="names the run directory")
    seed: int = Field(0, ge=0, description="what all randomness is keyed by")
    scale: Literal["full", "smoke"] = Field("full", description="smoke: every stage with two steps, to see it through")
    model: str = Field("emoji", description="the embedded model, a directory, a .safetensors file, or a hub id")
    single_file_config: str | None = Field(None, description="with a single file: the pipeline whose configs it has")
    lora: Annotated[list[LoraWeights], BeforeValidator(as_lora)] = Field(
        [], description="LoRA weights merged into the model first: a path, or a list of paths or {path, scale}"
    )
    prompt_encoder: str = Field("emoji", description="the embedded one, or a Sentence Transformer's id or path")
    evaluator: str = Field("emoji", description="the embedded evaluator, or a CLIP model's id or path")
    data: DataConfig = DataConfig()
    cache: CacheConfig = Field(CacheConfig(), description="what of the frozen parts' output is kept on disk, and how")
    tracking: TrackingConfig = Field(TrackingConfig(), description="where figures go beside log.jsonl")
    resolution: int | None = Field(None, gt=0, description="pixels of a side while training; unset: the model's own")
    prune: PruneSettings = Field(PruneSettings(), description="what may be removed, and the budget")
    fine_tune: FineTuneConfig
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="before")
    @classmethod
    def _shrink(cls, data: Any) -> Any:
        return _smoke(data) if isinstance(data, dict) and data.get("scale") == "smoke" else data


class PruneRecipe(CommonRecipe):
    """Prune one model by one or more methods, fine-tune, generate, and compare."""

    job: Literal["prune"] = "prune"
    prune: PruneSettings = Field(description="what may be removed, and the budget")
    methods: dict[str, dict[str, Any]] = Field(description="methods by name, each with its own settings")

    @model_validator(mode="after")
    def _methods(self) -> "PruneRecipe":
        if not self.methods:
            raise ValueError(f"methods is empty; available: {', '.join(registry.names())}")
        if "seed" not in self.prune.model_fields_set:  # so that the written recipe says what a resumed run will use
            self.prune = self.prune.model_copy(update={"seed": self.seed})
        for name in self.methods:
            self.method(name)
        return self

    def method(self, name: str) -> Method:
        """Return the method `name` with the recipe's common settings and its own."""
        return build_method(name, self.prune, self.methods[name] or {}, f"methods.{name}")

    def fine_tuning(self, name: str) -> FineTuneConfig:
        """Return how the method's architectures are fine-tuned: the recipe's settings, under what the method asks."""
        return self.fine_tune.model_copy(update=self.method(name).fine_tuning())


class BudgetEntry(_Section):
    """One budget of a comparison."""

    budget: float | str = Field(
        description='share of the dense MACs, or "bksdm:base", "bksdm:2,1,1,1": that member\'s own'
    )
    seeds: list[int] = Field(
        [0], min_length=1, description="repetitions: search, fine-tuning and noise are keyed by it"
    )
    methods: list[str] | None = Field(None, description="labels of the methods at this budget; unset: all")

    @property
    def label(self) -> str:
        """What the table calls it."""
        return str(self.budget)


class CompareRecipe(CommonRecipe):
    """Methods x budgets x seeds x protocols in one fair table."""

    job: Literal["compare"]
    methods: dict[str, dict[str, Any]] = Field(
        description="rows by label; `method` (the label by default), `distillation` (true), and the method's settings"
    )
    budgets: list[BudgetEntry] = Field(min_length=1, description="budgets, each with its seeds")
    protocols: list[Literal["equal_steps", "equal_compute"]] = Field(
        ["equal_steps", "equal_compute"],
        min_length=1,
        description="equal_steps: every model trains for fine_tune.steps, as the papers do; "
        "equal_compute: the N experts of a mixture share them, 1/N each",
    )
    published: list[dict[str, float | str]] = Field([], description="figures of a paper, printed beside ours")

    @model_validator(mode="after")
    def _rows(self) -> "CompareRecipe":
        twice = {"budget", "seed"} & self.prune.model_fields_set
        if twice:
            raise ValueError(f"prune.{min(twice)} does not belong into a comparison: `budgets` has budgets and seeds")
        for label in self.methods:
            self.method(label, 0.5, 0)
        for entry in self.budgets:
            for label in entry.methods or ():
                if label not in self.methods:
                    near = difflib.get_close_matches(label, self.methods, n=1)
                    hint = f"; did you mean {near[0]!r}?" if near else ""
                    raise ValueError(f"budgets name an unknown row {label!r}{hint} (rows: {', '.join(self.methods)})")
        return self

    def method(self, label: str, budget: float, seed: int) -> Method:
        """Return the method of a row at a budget."""
        settings = {**(self.methods[label] or {})}
        name, distils = settings.pop("method", label), settings.pop("distillation", True)
        if not isinstance(distils, bool):
            raise ValueError(f"methods.{label}.distillation={distils!r}: true or false")
        if not distils and "distillation_weight" in registry.get(name).Config.model_fields:
            settings["distillation_weight"] = 0.0
        common = self.prune.model_copy(update={"budget": budget, "seed": seed})
        return build_method(name, common, settings, f"methods.{label}")

    def steps(self, protocol: str, num_models: int) -> int:
        """Return the fine-tuning steps of each of a row's models under a protocol."""
        steps = self.fine_tune.steps
        return max(1, steps // num_models) if protocol == "equal_compute" else steps

    def fine_tuning(self, label: str, steps: int) -> FineTuneConfig:
        """Return how a row's models are fine-tuned; without distillation the denoising error alone counts, in full."""
        changes: dict[str, Any] = {"steps": steps, **self.method(label, 0.5, 0).fine_tuning()}
        if not (self.methods[label] or {}).get("distillation", True):
            changes |= {"distillation_weight": 0.0, "denoising_weight": 1.0}
        return self.fine_tune.model_copy(update=changes)


def build_method(name: str, common: PruneSettings, own: dict[str, Any], where: str) -> Method:
    """Return a method from the settings that all methods share and its own."""
    kind = registry.get(name)
    twice = sorted(set(own) & set(PruneSettings.model_fields))
    if twice:
        raise ValueError(f"{where}.{twice[0]} belongs to the section `prune`, which all methods share")
    try:
        return kind(**common.model_dump(exclude_unset=True), **own)
    except ValidationError as error:
        raise ValueError(_explain(error, kind.Config, f"{where}.")) from error


class PretrainRecipe(_Section):
    """Train the embedded model and its evaluator from nothing."""

    job: Literal["pretrain"]
    name: str = Field(description="names the run directory")
    seed: int = Field(0, ge=0, description="what all randomness is keyed by")
    scale: Literal["full", "smoke"] = Field("full", description="smoke: every stage with two steps, to see it through")
    data: DataConfig = DataConfig()
    shapes: EmojiModelConfig = EmojiModelConfig()
    autoencoder: TrainerConfig
    decoder: TrainerConfig
    diffusion: TrainerConfig
    evaluator: TrainerConfig
    caption_dropout: float = Field(0.1, ge=0, le=1, description="share of empty captions, for guidance")
    timestep_shift: float = Field(1.0, ge=1, description="above 1: more of the noisiest timesteps in `diffusion`")
    milestones: list[int] = Field([], description="steps of `diffusion` whose weights are kept for the quality curve")
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="before")
    @classmethod
    def _shrink(cls, data: Any) -> Any:
        return _smoke(data) | {"milestones": []} if isinstance(data, dict) and data.get("scale") == "smoke" else data


AnyRecipe = PruneRecipe | PretrainRecipe | CompareRecipe
Recipe = Annotated[AnyRecipe, Field(discriminator="job")]


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> AnyRecipe:
    """Read a YAML recipe and put `key=value` overrides over it (dotted keys, as `fine_tune.steps=100`).

    Raises RecipeError, one line: no such file, bad YAML, an unknown key (with the nearest valid one), a wrong value
    (with what is allowed).
    """
    path = Path(path)
    if not path.is_file():
        known = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, known, n=1)
        raise RecipeError(f"no recipe at {path}" + (f"; did you mean {path.parent / near[0]}?" if near else ""))
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        content = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as error:
        raise RecipeError(f"{path} with {list(overrides)} cannot be read: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} holds no mapping of settings")
    return parse_recipe(content, str(path))


def parse_recipe(content: dict[str, Any], where: str = "recipe") -> AnyRecipe:
    """Check the settings of a recipe; errors as in `load_recipe`."""
    content = {"job": "prune", **content}
    kinds = {"prune": PruneRecipe, "pretrain": PretrainRecipe, "compare": CompareRecipe}
    kind = kinds.get(content["job"])
    if kind is None:
        raise RecipeError(f"{where}: job={content['job']!r}; allowed: {', '.join(kinds)}")
    try:
        return TypeAdapter(Recipe).validate_python(content)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_explain(error, kind)}") from error


def dump_recipe(recipe: AnyRecipe) -> str:
    """Return a recipe as YAML, every setting written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _smoke(content: dict[str, Any]) -> dict[str, Any]:
    """Shrink every training to two steps of four samples and the evaluation to a few images."""

    def shrink(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        node = {key: shrink(value) for key, value in node.items()}
        if "learning_rate" in node:  # a training
            node |= SMOKE
        return node | ({"warmup": 1} if "warmup" in node else {})

    evaluation = {"num_images": SMOKE_IMAGES, "steps": 2, "num_predictions": SMOKE_IMAGES, "num_pictures": 2}
    return shrink(content) | {"evaluation": {**(content.get("evaluation") or {}), **evaluation}}


def _explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """Return the first fault as one line that names the setting, what is allowed and the nearest valid name."""
    first = error.errors()[0]
    location = [
        str(part)
        for part in first["loc"]
        if part not in ("prune", "pretrain", "compare") or len(first["loc"]) == 1 or first["loc"][0] != part
    ]
    key = prefix + ".".join(location)
    if first["type"] == "extra_forbidden":
        allowed = sorted(_fields(model, location[:-1]))
        near = difflib.get_close_matches(location[-1], allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"unknown setting {key!r}{hint} (allowed: {', '.join(allowed)})"
    if first["type"] == "missing":
        return f"setting {key!r} is missing"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return _one_line(message)
    return f"{key}={first['input']!r}: {message[0].lower()}{message[1:]}"


def _fields(model: type[BaseModel], location: list[str]) -> set[str]:
    for part in location:
        annotation = model.model_fields[part].annotation
        options = [
            a for a in (annotation, *typing.get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)
        ]
        if not options:
            return set()
        model = options[0]
    return set(model.model_fields)


def _one_line(error: Any) -> str:
    return " ".join(str(error).split())
