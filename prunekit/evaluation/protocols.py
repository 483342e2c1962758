"""Evaluation protocols: named settings for making and measuring pictures. Never compare figures of two protocols."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from prunekit.data.config import DataConfig
from prunekit.evaluation.evaluator import INCEPTION
from prunekit.runtime.engines import LOCAL, Engine
from prunekit.runtime.errors import UserError, nearest
from prunekit.runtime.precision import AUTO, Precision
from prunekit.runtime.yaml_files import FAULTS, load_overrides, resolved

OF_TEXT = ("clip_score", "pick_score")  # metrics that need no real pictures
OF_NAMES = ("top1", "top5")  # metrics of pictures that are requested by name
MetricName = Literal["cmmd", "kid", "frechet", "clip_score", "top1", "top5", "pick_score"]
PICK_SCORE = "yuvalkirstain/PickScore_v1"


class ProtocolError(UserError):
    """Settings of an evaluation that cannot be used; the message is one line that says what to change."""


class Protocol(BaseModel):
    """How pictures are generated, which pictures they are compared with, and which metrics are measured."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    num_images: int = Field(gt=1, description="Number of pictures per model; fewer if there are fewer prompts.")
    num_references: int | None = Field(
        None, gt=1, description="Largest number of real pictures; unset: all pictures of the data."
    )
    ask: Literal["names", "captions"] = Field(
        "captions",
        description="Prompts. captions: one caption of each picture; names: half names, half held-out captions, as in "
        "runs.",
    )
    prompts: str | None = Field(
        None, description="Text file with one prompt per line, or PartiPrompts' TSV; unset: the data's captions."
    )
    steps: int = Field(25, gt=0, description="scheduler steps")
    guidance: float = Field(7.5, ge=0, description="Scale of classifier-free guidance.")
    at_steps: list[int] = Field(
        [],
        description="Runs only: fine-tuning steps whose stored weights get rows too (evaluation.at_steps "
        "of the recipe).",
    )
    scheduler: Literal["own", "pndm"] = Field("pndm", description="own: the pipeline's")
    resolution: int | None = Field(
        None, gt=0, le=2**14, description="Side of drawn pictures in pixels; unset: the model's own."
    )
    compare_at: int | None = Field(
        None, gt=0, description="Side of real and drawn pictures for metrics, in pixels; unset: as drawn."
    )
    batch_size: int = Field(16, gt=0, description="Prompts per pipeline call; batches are fixed by index.")
    precision: Precision = Field("float32", description=f"Autocast dtype of drawing. {AUTO}")
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="Seed of prompts and noise; unset: the run's seed, or 0."
    )
    metrics: list[MetricName] = Field(min_length=1, description="the columns")
    cmmd_model: str = Field(
        "emoji", description="Model that embeds pictures for cmmd: emoji, or a CLIP model's id or path."
    )
    feature_model: str = Field(
        "emoji",
        description="Model of the features for kid and frechet: emoji, inception, or a CLIP model's id or path.",
    )
    clip_model: str = Field("emoji", description="Model that embeds pictures and texts for clip_score, top1 and top5.")
    pick_model: str = Field(PICK_SCORE, description="Model of pick_score: a CLIP model with a logit_scale.")
    engine: Engine = LOCAL
    statistics: str | None = Field(
        None, description="File (.npz) with mu and sigma of real features for frechet, in place of the data's pictures."
    )

    @model_validator(mode="after")
    def _fits(self) -> "Protocol":
        if self.prompts is not None and (real := [name for name in self.metrics if name not in OF_TEXT]):
            raise UserError(f"prompts={self.prompts} have no real pictures, which {', '.join(real)} need: {_TEXT}")
        if self.ask == "captions" and (names := [name for name in self.metrics if name in OF_NAMES]):
            raise UserError(
                f"{', '.join(names)} need pictures requested by name: set ask=names, or remove them from metrics"
            )
        if self.ask == "names" and self.prompts is not None:
            raise UserError(f"prompts={self.prompts} have no names: set ask=captions")
        return self


_TEXT = f"set metrics=[{','.join(OF_TEXT)}] or fewer"
_PUBLISHED = {"compare_at": 256, "num_images": 30_000, "feature_model": INCEPTION}
PROTOCOLS: dict[str, dict[str, Any]] = {
    "aptp": {
        **_PUBLISHED,
        "resolution": 768,
        "metrics": ["frechet", "clip_score", "cmmd"],
        "clip_model": "openai/clip-vit-base-patch32",
        "cmmd_model": "openai/clip-vit-large-patch14-336",
    },
    "bksdm": {
        **_PUBLISHED,
        "resolution": 512,
        "metrics": ["frechet", "clip_score"],
        "clip_model": "laion/CLIP-ViT-g-14-laion2B-s12B-b42K",
        "cmmd_model": "openai/clip-vit-large-patch14-336",
    },
    "emoji": {
        "ask": "names",
        "num_images": 500,
        "num_references": 10_000,
        "guidance": 3.0,
        "scheduler": "own",
        "batch_size": 50,
        "metrics": ["cmmd", "kid", "clip_score", "top1", "top5"],
    },
}


def load_protocol(name: str, overrides: Iterable[str] = (), num_images: int | None = None) -> Protocol:
    """Return a protocol's settings, changed by `num_images` and by `key=value` overrides.

    Raises ProtocolError, one line, for an unknown protocol or key (with the nearest valid one), or a wrong value.
    """
    if name not in PROTOCOLS:
        raise ProtocolError(f"no protocol {name!r}{nearest(name, PROTOCOLS) or '.'} Protocols: {', '.join(PROTOCOLS)}")
    try:
        changes = resolved(load_overrides(overrides), "settings")
    except UserError as error:
        raise ProtocolError(str(error)) from error
    content = {**PROTOCOLS[name], **({} if num_images is None else {"num_images": num_images}), **changes}
    return checked(Protocol, {**content, "name": name}, "")


def load_data_config(given: str | Path | Mapping[str, Any] | DataConfig) -> DataConfig:
    """Return the data settings that `given` describes.

    given: "emoji"; a folder of tar or parquet shards, or of pictures with captions; a YAML file with a recipe or with
    only the recipe's section `data`; or that section as a mapping or as YAML text, such as "{kind: coco, path: coco}".
    Raises ProtocolError, one line, for anything else.
    """
    if isinstance(given, DataConfig):
        return given
    content: Any = given
    if isinstance(given, str | Path):
        path = Path(given).expanduser()
        if str(given) == "emoji":
            return DataConfig()
        if path.is_dir():
            kinds = {"webdataset": "*.tar", "parquet": "*.parquet"}
            kind = next((kind for kind, pattern in kinds.items() if any(path.rglob(pattern))), "folder")
            return DataConfig(kind=kind, path=str(path))
        if not path.is_file() and not str(given).lstrip().startswith("{"):
            raise ProtocolError(
                f"no data at {given}: give emoji, a folder, a YAML file, or settings such as "
                '"{kind: coco, path: coco, split: val30k}" (docs/data.md)'
            )
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8") if path.is_file() else str(given))
        except FAULTS as error:
            raise ProtocolError(f"--data {given} is not YAML: {error}") from error
        content = content.get("data", content) if isinstance(content, dict) else content
    if not isinstance(content, Mapping):
        raise ProtocolError(f"--data {given} does not hold a mapping of settings (docs/data.md)")
    return checked(DataConfig, dict(content), "data.")


def checked(model: type[BaseModel], content: dict[str, Any], prefix: str) -> Any:
    """Return `content` as validated settings; raise ProtocolError, one line, for the first fault.

    prefix: text before the keys in messages.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            allowed = ", ".join(name for name in model.model_fields if name != "name")
            near = nearest(key, model.model_fields) or "."
            raise ProtocolError(f"unknown setting {prefix}{key}{near} Settings: {allowed}") from error
        message = " ".join(first["msg"].removeprefix("Value error, ").split())
        shown = "" if first["type"] == "value_error" else f"{prefix}{key}={first['input']!r}: "
        raise ProtocolError(f"{shown}{message}") from error
