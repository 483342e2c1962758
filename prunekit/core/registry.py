"""The registry of the `Denoiser` of each model class. Heavy modules are imported at a model's first use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import copy
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from prunekit.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from .denoiser import Denoiser
    from .family import Family, NoiseProcess

SCALES = ("vae_scale_factor", "vae_scale_factor_spatial")  # pipeline attributes with the pixels per latent position
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")  # pipeline attributes that hold the tokenizers
_LOADERS: dict[str, Callable[[], Denoiser]] = {}
_LOADED: dict[str, Denoiser] = {}
_UNNAMED: list[str] = []  # the class to assume for configs that name no class
_ATTRIBUTE_OF: dict[str, str] = {}  # pipeline attribute by model class
_MODEL_OF: dict[str, str] = {}  # model class of the denoiser by pipeline class
_ATTRIBUTES = ["denoiser"]  # pipeline attributes that may hold a denoiser; prunekit's shapes of pipelines use the first


def register_denoiser(
    models: Iterable[type | str],
    denoiser: Denoiser | Callable[[], Denoiser],
    attribute: str = "transformer",
    unnamed: str | None = None,
    pipelines: Iterable[str] = (),
) -> None:
    """Register the description of model classes; a later registration replaces an earlier one.

    Args:
        models: classes, or their names. A subclass is described by its nearest registered base class.
        denoiser: the description, or a function that returns it; the function is called once, at the first use.
        attribute: attribute of a pipeline that holds such a model: "unet" or "transformer".
        unnamed: model class to assume for old configs that name no class.
        pipelines: names of the diffusers pipelines that may be loaded with such a model in this attribute.

    """
    names = [model if isinstance(model, str) else model.__name__ for model in models]
    _MODEL_OF.update(dict.fromkeys(pipelines, names[0]))
    _UNNAMED[:] = [unnamed] if unnamed is not None else _UNNAMED
    for name in names:
        _LOADED.pop(name, None)
        _ATTRIBUTE_OF[name] = attribute
        _LOADERS[name] = denoiser if callable(denoiser) else lambda: denoiser
    if attribute not in _ATTRIBUTES:
        _ATTRIBUTES.append(attribute)


def supported() -> list[str]:
    """Return the names of the supported model classes."""
    return sorted(_LOADERS)


def pipeline_parts() -> Mapping[str, str]:
    """Return {class name of a pipeline: attribute that holds its denoiser} for the pipelines that can be loaded."""
    return {pipeline: _ATTRIBUTE_OF[model] for pipeline, model in _MODEL_OF.items()}


def denoiser_of(model: nn.Module | type) -> Denoiser:
    """Return the `Denoiser` that describes a model or a model class.

    Raises:
        UserError: no `Denoiser` describes the class; the message names the supported classes.

    """
    return _loaded(_registered(model))


def denoiser_named(name: str | None) -> Denoiser:
    """Return the `Denoiser` of a model class by the class name in a model's config, "_class_name".

    name: a pruned model's class name is "Pruned" plus the name of its dense class. None: the class to assume for old
        configs that name no class.

    Raises:
        UserError: no `Denoiser` describes the class; the message names the supported classes.

    """
    base = _UNNAMED[0] if name is None else name.removeprefix("Pruned")
    if base not in _LOADERS:
        raise UserError(f"{name} is not supported. Supported models: {', '.join(supported())}")
    return _loaded(base)


def part_of(model: nn.Module | type) -> str:
    """Return the pipeline attribute for a model of this class: "unet" or "transformer"; errors as in `denoiser_of`."""
    return _ATTRIBUTE_OF[_registered(model)]


def is_denoiser(model: Any) -> bool:
    """Return whether a `Denoiser` describes this object's class."""
    return any(base.__name__ in _LOADERS for base in type(_described(model)).__mro__)


def _registered(model: Any) -> str:
    """Return the name of the nearest registered class of a model or a model class."""
    cls = model if isinstance(model, type) else type(_described(model))
    for base in cls.__mro__:
        if base.__name__ in _LOADERS:
            return base.__name__
    raise UserError(f"{cls.__name__} is not supported. Supported models: {', '.join(supported())}")


def _described(model: Any) -> Any:
    """Return the model whose class is looked up: a model's `described` part, if it has one, else the model itself."""
    return model.described if isinstance(getattr(type(model), "described", None), property) else model


def _attribute(pipeline: Any) -> str | None:
    """Return the name of the pipeline's attribute that holds a denoiser; None if none does."""
    return next((name for name in _ATTRIBUTES if is_denoiser(getattr(pipeline, name, None))), None)


def has_denoiser(pipeline: Any) -> bool:
    """Return whether a pipeline holds a supported denoiser; the pipeline of a mixture holds several in other places."""
    return _attribute(pipeline) is not None


def denoiser_name(pipeline: Any) -> str:
    """Return the name of the pipeline's attribute that holds its denoiser, such as "unet".

    Raises:
        UserError: the pipeline has no denoiser that prunekit describes.

    """
    if (name := _attribute(pipeline)) is not None:
        return name
    raise UserError(
        "expected a pipeline with a supported denoiser, or a supported denoiser; got "
        f"{type(pipeline).__name__}. Supported models: {', '.join(supported())}"
    )


def denoiser_in(pipeline: Any) -> Any:
    """Return the denoiser of a pipeline; a denoiser itself is returned as it is.

    Raises:
        UserError: neither a supported model nor a pipeline with one.

    """
    return pipeline if is_denoiser(pipeline) else getattr(pipeline, denoiser_name(pipeline))


def with_denoiser(pipeline: Any, model: nn.Module) -> Any:
    """Return a copy of a pipeline with another denoiser; the copy shares all other parts and the settings."""
    other = copy(pipeline)
    setattr(other, denoiser_name(pipeline), model)
    return other


def family_of(pipeline: Any) -> Family:
    """Return the family of a pipeline or of a denoiser; errors as in `denoiser_in`."""
    return denoiser_of(denoiser_in(pipeline)).family


def family_named(pipeline: str) -> Family:
    """Return the family of a pipeline by the name of its class, one of `pipeline_parts()`."""
    return _loaded(_MODEL_OF[pipeline]).family


def call_options(pipeline: Any, guidance: float) -> dict[str, Any]:
    """Return the keyword arguments of a pipeline's calls with texts at a guidance scale, except sizes and steps."""
    if not has_denoiser(pipeline):  # no family describes it
        return {"guidance_scale": guidance}
    family = family_of(pipeline)
    negative = {} if family.negative is None else {"negative_prompt": family.negative}
    return {**family.call_options(pipeline, guidance), **negative}


def texts_of(pipeline: Any, guidance: float, options: Mapping[str, Any] = MappingProxyType({})) -> int:
    """Return the number of texts per picture on which a pipeline runs its denoiser at every step, at a guidance scale.

    pipeline: a pipeline, the shape of one, or a denoiser alone.
    options: further options of the pipeline's call.
    """
    settings = pipeline.config if (stated := getattr(pipeline, "settings", None)) is None else stated
    return family_of(pipeline).texts(guidance, {**settings, **options})


def pictures_of(pipeline: Any, output: Any) -> Any:
    """Return the pictures from the output of a pipeline's call."""
    return family_of(pipeline).pictures(output) if has_denoiser(pipeline) else output.images


def scale_of(pipeline: Any) -> int | None:
    """Return the pixels per latent position, along a side, of a pipeline or its shape; None for a denoiser alone."""
    return next((int(getattr(pipeline, name)) for name in SCALES if hasattr(pipeline, name)), None)


def text_length(pipeline: Any, family: Family | None = None) -> int:
    """Return the number of text tokens of a pipeline's denoiser; for a denoiser alone, its family's usual number.

    family: family of a pipeline that holds no denoiser; by default the family of its denoiser.
    """
    if (stated := getattr(pipeline, "text_length", None)) is not None:  # the shape of a pipeline
        return int(stated)
    tokenizers = {name: getattr(pipeline, name, None) for name in TOKENIZERS}
    lengths = {name: int(part.model_max_length) for name, part in tokenizers.items() if part is not None}
    return (family or family_of(pipeline)).text_length(lengths)


def process_of(pipeline: Any) -> NoiseProcess:
    """Return the noise process of a pipeline's scheduler; for a denoiser alone, the usual one of its family.

    For a denoiser alone, use the process only to add noise: only a pipeline's scheduler says whether the denoiser
    predicts noise or velocity.
    """
    return family_of(pipeline).process(getattr(pipeline, "scheduler", None))


def latent_size(model: nn.Module) -> tuple[int, int]:
    """Return the latent size (h, w) that a model was made for.

    Raises:
        UserError: the model's config does not say.

    """
    size = denoiser_of(model).latent_size(model)
    if size is None:
        raise UserError(f"the config of this {type(model).__name__} has no sample_size: give the latent's size")
    return size


def _loaded(name: str) -> Denoiser:
    if name not in _LOADED:
        _LOADED[name] = _LOADERS[name]()
    return _LOADED[name]
