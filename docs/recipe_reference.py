"""Write docs/recipe_reference.md from the schema: `python docs/recipe_reference.py`. A test compares the two."""

import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from prunekit import methods
from prunekit.jobs.bench.bench_recipe import BenchRecipe
from prunekit.jobs.recipe.schema import KINDS, Row

PAGE = Path(__file__).parent / "recipe_reference.md"
HEAD = """# Recipe reference

At the end of this page you know every setting of every recipe. `python docs/recipe_reference.py` writes the page from
the schema. [Recipes](recipes.md) explains how to combine recipes (`extends`, `scale`, overrides). A setting without a
default is required.
"""
WHAT = {
    "job": "Kind of recipe; `prune` if it is not given.",
    "dtype": "Dtype of weights and inputs.",
    "mode": "Execution: eager, compiled by regions, or a captured CUDA graph.",
    "memory_format": "Memory layout of convolutions.",
}
JOBS = {
    "prune": "prune, recover and evaluate: `prunekit run`",
    "compare": "methods x budgets x seeds x protocols in one table: `prunekit compare`",
    "pretrain": "train the embedded model and its evaluator: `prunekit run`",
}


def page() -> str:
    """Return the page."""
    parts, sections = [HEAD], {}
    for job, model in KINDS.items():
        parts.append(f"## job: {job}\n\n{JOBS[job][0].upper()}{JOBS[job][1:]}.\n\n{table(model, sections)}")
    parts.append(f"## Benchmarks\n\nA file for `prunekit bench`; it has no `job`.\n\n{table(BenchRecipe, sections)}")
    shared = "Every method also has the settings of [`prune`](#prunesettings), which a recipe gives once."
    parts.append(f"## Methods\n\n{shared}\n")
    common = set(methods.PruneSettings.model_fields)
    for name in methods.names():
        method = methods.get(name)
        own = table(method.Config, sections, without=common)
        parts.append(f"### {name}\n\n{(method.__doc__ or '').strip().splitlines()[0]}\n\n{own}")
    sections.setdefault("Row", Row)
    parts.append("## Sections\n")
    shown: set[str] = set()
    while left := [model for name, model in sections.items() if name not in shown]:
        for model in left:
            shown.add(model.__name__)
            line = (model.__doc__ or "").strip().splitlines()[0]
            parts.append(f"### {model.__name__}\n\n{line}\n\n{table(model, sections)}")
    return "\n".join(parts)


def table(model: type[BaseModel], sections: dict[str, type[BaseModel]], without: set[str] = frozenset()) -> str:
    """Return a model's settings as a table; the models that they hold are added to `sections`."""
    rows = ["| Setting | Type | Default | Description |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if name in without:
            continue
        for held in models_in(field.annotation):
            sections.setdefault(held.__name__, held)
        held = next(models_in(field.annotation), None)
        text = field.description or (
            held.__doc__.strip().splitlines()[0] if held and held.__doc__ else WHAT.get(name, "")
        )
        text = " ".join(text.split()).replace("|", "\\|")
        kind = ", ".join([shown_type(field.annotation), *limits_of(field)])
        rows.append(f"| `{name}` | {kind} | {default(field)} | {text} |")
    return "\n".join(rows) + "\n" if len(rows) > 2 else "No further settings.\n"


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from models_in(part)


def shown_type(annotation: Any) -> str:
    """Return an annotation as a person would write it."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "unset"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    if origin is typing.Annotated:
        return shown_type(parts[0])
    if origin is typing.Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(shown_type(part) for part in parts)
    if origin is list:
        return f"list of {shown_type(parts[0])}"
    if origin is dict:
        return "mapping"
    if origin is tuple:
        return "(" + ", ".join(shown_type(part) for part in parts) + ")"
    return {"str": "text", "float": "number", "int": "whole number", "bool": "true or false"}.get(
        getattr(annotation, "__name__", str(annotation)), getattr(annotation, "__name__", str(annotation))
    )


def limits_of(field: FieldInfo) -> Iterator[str]:
    """Yield a number's bounds."""
    for limit in field.metadata:
        for name, sign in {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}.items():
            if (value := getattr(limit, name, None)) is not None:
                yield f"{sign} {value}" if isinstance(value, int) else f"{sign} {value:g}"


def default(field: FieldInfo) -> str:
    """Return a default as YAML would have it."""
    if field.is_required():
        return "–"
    value = field.default_factory() if field.default_factory is not None else field.default
    if isinstance(value, BaseModel):
        given = value.model_dump(exclude_defaults=True, mode="json")
        return f"`{given}`" if given else "its defaults"
    if value is None or value is PydanticUndefined:
        return "unset"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
