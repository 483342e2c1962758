"""Errors in recipes: one line that names the setting, the allowed values and the nearest valid name."""

import typing
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from prunekit.runtime.errors import UserError, nearest


class RecipeError(UserError):
    """A recipe that cannot be used; the message is one line that says what to change."""


def explain(
    error: ValidationError,
    model: type[BaseModel],
    prefix: str = "",
    kinds: Iterable[str] = (),
    more: Iterable[str] = (),
) -> str:
    """Return the first fault as one line.

    model: model that checked the settings. prefix: text before the setting's name. kinds: names of a union's members,
    which pydantic puts first in a location. more: top-level settings that are allowed in addition to the model's.
    """
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    if len(place) > 1 and place[0] in kinds:
        place = place[1:]
    key = prefix + ".".join(place)
    if first["type"] == "extra_forbidden":
        allowed = sorted({*_fields(model, place[:-1]), *(more if len(place) == 1 else ())})
        return f"unknown setting {key!r}{nearest(place[-1], allowed)} (allowed: {', '.join(allowed)})"
    if first["type"] == "missing":
        return f"setting {key!r} is missing"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return one_line(message)
    return f"{key}={first['input']!r}: {message[0].lower()}{message[1:]}"


def one_line(error: Any) -> str:
    """Return a message without line breaks."""
    return " ".join(str(error).split())


def _fields(model: type[BaseModel], place: list[str]) -> set[str]:
    """Return the settings of the section at `place` in a model."""
    for part in place:
        if part not in model.model_fields:  # an index of a list, or a union's member
            continue
        annotation = model.model_fields[part].annotation
        options = [
            a for a in (annotation, *typing.get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)
        ]
        if not options:
            return set()
        model = options[0]
    return set(model.model_fields)
