"""Readers of YAML files that others wrote: any fault is a one-line error; references can read only other settings."""

import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prunekit.runtime.errors import UserError

FAULTS = (  # errors of the YAML readers and of OmegaConf, which resolves references
    *(OmegaConfBaseException, yaml.YAMLError, OSError, RecursionError),
    *(ArithmeticError, AttributeError, LookupError, TypeError, ValueError),
)
BRACKET = re.compile(r"[\[\]{}]")
MOST_OPEN = 100
ENTRY = re.compile(r"^[ ]*#.*$|^[ ]*- |,", re.MULTILINE)  # list entry, or a whole comment with its commas
MOST_ENTRIES = 500
REFERENCE = re.compile(r"\$\{[\w.\[\]-]*\}")  # a reference to another setting


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file as it stands, without references; UserError where it holds none."""
    try:
        content = yaml.safe_load(_text(path))
    except FAULTS as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a mapping of settings")
    return content


def load_settings(path: Path) -> DictConfig:
    """Return the mapping in a YAML file with its references; UserError where it holds none."""
    try:
        content = OmegaConf.load(io.StringIO(_text(path)))
    except FAULTS as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, DictConfig):
        raise UserError(f"{path} does not hold a mapping of settings")
    return content


def load_overrides(overrides: Iterable[str]) -> DictConfig:
    """Return the settings in `key=value` texts with dotted keys; UserError if they cannot be read."""
    given = list(overrides)
    try:
        return OmegaConf.from_dotlist(given)
    except FAULTS as error:
        raise UserError(f"settings {' '.join(given)} cannot be read: {error}") from error


def resolved(config: DictConfig, where: Any) -> dict[str, Any]:
    """Return settings with their references resolved.

    Args:
        config: the settings.
        where: source of the settings, for the error.

    Raises:
        UserError: a reference to a setting that does not exist, or to something other than a setting, such as
            ${oc.env:NAME}, with which a stranger's file could read this process's environment.

    """
    try:
        _refuse_resolvers(OmegaConf.to_container(config, resolve=False))
        content: Any = OmegaConf.to_container(config, resolve=True)
    except UserError:
        raise
    except FAULTS as error:
        raise UserError(f"{where} cannot be read: {error}") from error
    return content


def merged(*configs: DictConfig) -> DictConfig:
    """Return the configs merged into one; later ones override earlier ones."""
    whole = OmegaConf.merge(*configs)
    assert isinstance(whole, DictConfig)
    return whole


def _text(path: Path) -> str:
    """Return a file's text; ValueError for more than 100 open brackets or 500 list entries, which no settings need.

    The limits bound the parser's time: it is quadratic in open brackets, and about 0.1 ms per list entry.
    """
    text, depth = path.read_text(encoding="utf-8"), 0
    if sum(not entry.lstrip().startswith("#") for entry in ENTRY.findall(text)) > MOST_ENTRIES:
        raise ValueError(f"more than {MOST_ENTRIES} entries in lists")
    for bracket in BRACKET.findall(text):
        depth = depth + 1 if bracket in "[{" else max(0, depth - 1)
        if depth > MOST_OPEN:
            raise ValueError(f"more than {MOST_OPEN} brackets are open at once")
    return text


def _refuse_resolvers(node: Any) -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            _refuse_resolvers(key)
            _refuse_resolvers(value)
    elif isinstance(node, list):
        for value in node:
            _refuse_resolvers(value)
    elif isinstance(node, str) and "${" in node:
        rest = node
        while (shorter := REFERENCE.sub("", rest)) != rest:  # repeated for references within references
            rest = shorter
        if "${" in rest:
            raise UserError(f"{node!r}: only references to other settings, ${{section.setting}}, are allowed")
