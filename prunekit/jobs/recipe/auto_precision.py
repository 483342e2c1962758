"""Resolution of `precision: auto` in a recipe: done once, before a run starts, and recorded with the run."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from pydantic import BaseModel

from prunekit.jobs.recipe.earlier import as_recorded_now, missing_settings, to_record
from prunekit.jobs.recipe.reading import load_recipe, parse_recipe
from prunekit.jobs.recipe.schema import AnyRecipe, CommonRecipe, MemoryConfig, PretrainRecipe
from prunekit.runtime.precision import SLOW, UnscaledPrecision, has_native_bfloat16, resolve_precision, slowdown, why

R = TypeVar("R", bound=AnyRecipe)
AUTO = "auto"
SETTING = "precision"
UNSCALED: Any = UnscaledPrecision  # as pydantic keeps a field's annotation
BEFORE_AUTO = "float32"  # the default of runs and cells that were recorded before there was `auto`


def precisions(recipe: AnyRecipe) -> dict[str, str]:
    """Return the precision of forward passes in every section of a recipe, by dotted name."""
    return {".".join(place): value for place, _, value in _precisions_of(recipe)}


def resolve_recipe(
    recipe: R, device: str | torch.device, recorded: AnyRecipe | None = None, meaning: str | None = None
) -> R:
    """Return a recipe with `auto` replaced in all precisions and in the dtype of frozen weights.

    Args:
        recipe: a recipe as it was written.
        device: the device that the recipe will run on.
        recorded: the recipe that an earlier start wrote; its precisions replace `auto`.
        meaning: meaning of `auto` on a device that this machine does not have; None: by `device`.

    """
    earlier = {} if recorded is None else precisions(recorded)
    if isinstance(recipe, CommonRecipe):
        memory = _memory(recipe, device, recorded, meaning)
        recipe = cast(R, recipe.model_copy(update={"memory": memory}))
        meaning = "bfloat16" if memory.weights == "bfloat16" else meaning  # forward passes take the weights' dtype

    def choose(name: str, scaled: bool) -> str:
        return earlier.get(name) or resolve_precision(AUTO, device, scaled, meaning)

    resolved = to_record(_replaced(recipe, choose))
    assert isinstance(resolved, type(recipe))
    return resolved


def _memory(
    recipe: CommonRecipe, device: str | torch.device, recorded: AnyRecipe | None, meaning: str | None
) -> MemoryConfig:
    """Return a recipe's section `memory` with a dtype in place of `auto`; arguments as in `resolve_recipe`."""
    if recipe.memory.weights != AUTO:
        return recipe.memory
    if isinstance(recorded, CommonRecipe):
        return recorded.memory
    if resolve_precision(AUTO, device, False, meaning) != "bfloat16":
        return MemoryConfig()
    return recipe.memory.model_copy(update={"weights": "bfloat16"})


def load_recorded(path: str | Path) -> AnyRecipe:
    """Read the recipe that a run wrote; a setting that an older run did not write has its default of that time."""
    path = Path(path)
    recipe = load_recipe(path, missing_settings(path) if path.is_file() else ())
    return _replaced(as_recorded_now(recipe), lambda name, scaled: BEFORE_AUTO)


def precision_lines(recipe: AnyRecipe, device: str | torch.device) -> list[str]:
    """Return log lines about a resolved recipe: its precisions, and a warning for each that is slow on the device."""
    values = precisions(recipe)
    lines = [f"precision: {precision_text(values)} (auto means {resolve_precision(AUTO, device)} here: {why(device)})"]
    kind = torch.device(device).type
    if not has_native_bfloat16(kind):
        for value, names in _by_value(values).items():
            if (factor := slowdown(value, kind)) > SLOW:
                lines.append(
                    f"warning: {value} takes {factor:.0f} times as long as float32 on this processor (a convolution "
                    f"with its backward pass, measured now); set {names[0]}.{SETTING} to auto or float32"
                )
    return lines


def precision_text(values: dict[str, str]) -> str:
    """Return precisions by name as text, "float32 in fine_tune, evaluation"."""
    return "; ".join(f"{value} in {', '.join(names)}" for value, names in _by_value(values).items())


def _by_value(values: dict[str, str]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name, value in values.items():
        names.setdefault(value, []).append(name.removesuffix(f".{SETTING}"))
    return names


def _precisions_of(recipe: AnyRecipe) -> Iterator[tuple[tuple[str, ...], bool, str]]:
    """Yield each precision's place (names of sections and setting), whether its gradients are scaled, and its value."""
    yield from _of_model(recipe, ())
    for label, config in _methods(recipe):
        yield from _of_model(config, ("methods", label))


def _methods(recipe: AnyRecipe) -> Iterator[tuple[str, BaseModel]]:
    """Yield each method's label and settings."""
    if not isinstance(recipe, PretrainRecipe):
        for label in recipe.methods:
            yield label, recipe.method_of(label).config


def _of_model(model: BaseModel, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], bool, str]]:
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from _of_model(value, (*place, name))
        elif name == SETTING and AUTO in getattr(field.annotation, "__args__", ()):
            yield (*place, name), field.annotation != UNSCALED, value


def _replaced(recipe: AnyRecipe, choose: Callable[[str, bool], str]) -> AnyRecipe:
    """Return a recipe in which `choose(name, whether gradients are scaled)` replaces every precision that is `auto`."""
    content = recipe.model_dump(mode="json")
    _replace_in(content, recipe, (), choose)
    for label, config in _methods(recipe):
        content["methods"][label] = dict(content["methods"][label] or {})
        _replace_in(content["methods"][label], config, ("methods", label), choose)
    return parse_recipe(content)


def _replace_in(
    content: dict[str, Any], model: BaseModel, prefix: tuple[str, ...], choose: Callable[[str, bool], str]
) -> None:
    """Replace every `auto` of one model in its content; a section that the content lacks gets the model's values."""
    for place, scaled, value in _of_model(model, ()):
        if value != AUTO:
            continue
        section, defaults = content, model.model_dump(mode="json")
        for part in place[:-1]:
            defaults = defaults[part]
            section[part] = section.get(part) or defaults
            section = section[part]
        section[place[-1]] = choose(".".join((*prefix, *place)), scaled)
