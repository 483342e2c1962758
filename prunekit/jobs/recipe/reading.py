"""Reading a recipe: the files that it extends, `key=value` overrides, the check; and writing one, resolved."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from pydantic import TypeAdapter, ValidationError

from prunekit.jobs.recipe.faults import RecipeError, explain
from prunekit.jobs.recipe.schema import KINDS, AnyRecipe, Recipe
from prunekit.jobs.recipe.smoke import smoke
from prunekit.jobs.shipped import EXTENDS, find_recipe
from prunekit.runtime.errors import UserError, nearest
from prunekit.runtime.yaml_files import FAULTS, load_overrides, load_settings, merged, resolved

SCALE = "scale"  # in a file or an override: size to which the recipe is shrunk before it is checked
SCALES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"full": dict, "smoke": smoke}
HIDDEN = "_"  # prefix of top-level settings for ${...} in the same file or in files that extend it


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> AnyRecipe:
    """Read a YAML recipe, or the shipped recipe of that name, and apply `key=value` overrides (dotted keys).

    The files that `extends` names come first, in order, then the recipe, then the overrides; later values win.
    `scale=smoke` shrinks the values in the files, but not the overrides. Raises a one-line RecipeError: a missing file,
    a cycle of `extends`, bad YAML, an unknown key (with the nearest valid one), a wrong value (with the allowed ones).
    """
    overrides = list(overrides)
    try:
        path = find_recipe(path)
    except UserError as error:
        raise RecipeError(str(error)) from error
    try:
        changes = load_overrides(overrides)
        if wrong := next((str(key) for key in changes if _is_for_files(str(key))), None):
            raise RecipeError(f"{wrong} is for recipe files: write it in the file, and override the setting itself")
        files = _merged(path, ())
        scale = changes.pop(SCALE, files.pop(SCALE, "full"))
        shrunk = OmegaConf.create(_scaled(_resolved(files, path), scale, str(path)))
        content = _resolved(merged(shrunk, changes) if overrides else shrunk, path)
    except RecipeError:
        raise
    except UserError as error:
        raise RecipeError(str(error)) from error
    except FAULTS as error:
        raise RecipeError(f"{path} with {overrides} cannot be read: {error}") from error
    return parse_recipe(content, str(path))


def parse_recipe(content: dict[str, Any], where: str = "recipe") -> AnyRecipe:
    """Check the settings of a recipe; errors as in `load_recipe`."""
    content = {"job": "prune", **content}
    if not isinstance(content["job"], str) or content["job"] not in KINDS:
        raise RecipeError(f"{where}: job={content['job']!r}; allowed: {', '.join(KINDS)}")
    content = _scaled(content, content.pop(SCALE, "full"), where)
    if not all(isinstance(key, str) for key in content):
        raise RecipeError(
            f"{where}: names of settings must be text; got {next(k for k in content if not isinstance(k, str))!r}"
        )
    try:
        return TypeAdapter(Recipe).validate_python(content)
    except ValidationError as error:
        more = (SCALE, EXTENDS)
        raise RecipeError(f"{where}: {explain(error, KINDS[content['job']], kinds=KINDS, more=more)}") from error


def dump_recipe(recipe: AnyRecipe) -> str:
    """Return a recipe as YAML, every setting written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _merged(path: Path, above: tuple[Path, ...]) -> DictConfig:
    """Return a file's content merged over the files that it extends; above: the chain of files that extend this one."""
    if path.resolve() in (file.resolve() for file in above):
        raise RecipeError(f"{above[0]} extends itself: {' -> '.join(map(str, (*above, path)))}")
    if not path.is_file():
        known = sorted(map(str, path.parent.glob("*.yaml"))) if path.parent.is_dir() else []
        raise RecipeError(f"{above[-1]} extends a missing file: no recipe at {path}{nearest(str(path), known)}")
    settings = load_settings(path)
    given: Any = settings.pop(EXTENDS, None)
    given = OmegaConf.to_container(given) if OmegaConf.is_config(given) else given
    bases: list[Any] = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(base, str) for base in bases):
        raise RecipeError(
            f"{path}: {EXTENDS}={given!r}; give a file, or a list of files, relative to the recipe's folder"
        )
    extended = [_merged(path.parent / base, (*above, path)) for base in bases]
    return merged(*extended, settings) if extended else settings


def _resolved(config: DictConfig, path: Path) -> dict[str, Any]:
    return {key: value for key, value in resolved(config, path).items() if not str(key).startswith(HIDDEN)}


def _scaled(content: dict[str, Any], scale: Any, where: str) -> dict[str, Any]:
    if not isinstance(scale, str) or scale not in SCALES:
        raise RecipeError(f"{where}: {SCALE}={scale!r}; allowed: {', '.join(SCALES)}")
    return SCALES[scale](content)


def _is_for_files(key: str) -> bool:
    return key == EXTENDS or key.startswith(HIDDEN)
