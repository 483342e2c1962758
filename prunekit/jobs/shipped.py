"""The recipes that ship with prunekit: found by name, listed, and copied; imports nothing heavy."""

import itertools
import re
from pathlib import Path

from prunekit.runtime.errors import UserError, nearest
from prunekit.runtime.files import replacing

PACKAGE = Path(__file__).parent.parent
FOLDERS = (PACKAGE / "recipes", PACKAGE.parent / "recipes")  # in an installed wheel, and in a checkout
SUFFIX = ".yaml"
EXTENDS = "extends"  # in a recipe: the file, or list of files, whose settings it changes
LIST_THEM = "; `prunekit recipes` lists the shipped ones"
SENTENCE = re.compile(r"(?<=[.?])\s|:\s")  # where the first sentence of a comment ends


def shipped_recipes() -> dict[str, Path]:
    """Return the files of the shipped recipes by name, sorted, without the files that recipes only extend."""
    folder = next((folder for folder in FOLDERS if folder.is_dir()), None)
    return {} if folder is None else {path.stem: path for path in sorted(folder.glob(f"*{SUFFIX}"))}


def summary(path: Path) -> str:
    """Return the first sentence of the comment at the top of a recipe, up to a colon."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("# "), lines)
    return SENTENCE.split(" ".join(line.removeprefix("# ").strip() for line in comment), maxsplit=1)[0].rstrip(".")


def find_recipe(given: str | Path) -> Path:
    """Return a recipe's file: the one at a path, or the shipped recipe of that name.

    Raises:
        UserError: there is neither; the message has the nearest name.

    """
    path = Path(given)
    if path.is_file():
        return path
    known = shipped_recipes()
    if path.parent == Path() and path.name.removesuffix(SUFFIX) in known:
        return known[path.name.removesuffix(SUFFIX)]
    beside = [str(other) for other in path.parent.glob(f"*{SUFFIX}")] if path.parent.is_dir() else []
    raise UserError(f"no recipe at {given}{nearest(str(given), [*beside, *known]) or LIST_THEM}")


def copy_recipe(name: str, target: str | Path | None = None) -> list[Path]:
    """Copy a shipped recipe with the files that it extends, so that it runs from its new place.

    Args:
        name: name of a shipped recipe.
        target: file to write, or its directory; the working directory by default.

    Returns:
        The files that were written, the recipe first.

    Raises:
        UserError: no such recipe, or a file of another content is in the way.

    """
    source = shipped_recipes().get(name.removesuffix(SUFFIX))
    if source is None:
        raise UserError(f"no shipped recipe {name!r}{nearest(name, shipped_recipes()) or LIST_THEM}")
    place = Path(target or ".")
    path = place if place.suffix in (SUFFIX, ".yml") else place / source.name
    files = {path: source}
    for base in _extended(source):
        files[path.parent / base.relative_to(source.parent)] = base
    for written, original in files.items():
        if written.exists() and written.read_bytes() != original.read_bytes():
            raise UserError(f"{written} exists with different content; remove it, or give another PATH")
    for written, original in reversed(files.items()):  # extended files first: an existing recipe is complete
        with replacing(written) as new:
            new.write_bytes(original.read_bytes())
    return list(files)


def _extended(path: Path) -> list[Path]:
    """Return all files that a recipe extends, directly or not."""
    import yaml

    given = yaml.safe_load(path.read_text(encoding="utf-8")).get(EXTENDS) or []
    extended: list[Path] = []
    for base in [given] if isinstance(given, str) else given:
        extended += [path.parent / base, *_extended(path.parent / base)]
    return list(dict.fromkeys(extended))
