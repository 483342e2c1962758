"""What the commands share: the application, arguments that several take, and the ways to print."""

import importlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from prunekit.cli.errors import Commands

app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Recipe = Annotated[
    Path,
    typer.Argument(metavar="RECIPE", help="a recipe's YAML file, or a name that `prunekit recipes` lists"),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings to change, such as fine_tune.steps=100")
]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help='"emoji", a diffusers directory, sd-1.4, sd-1.5, sd-2.1, sdxl, …')
]


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of every error")] = False,
) -> None:
    """Prune text-to-image diffusion UNets, recover them, and route prompts to pruned experts."""
    for library in ("transformers", "diffusers"):
        os.environ.setdefault(f"{library.upper()}_VERBOSITY", "error")
        if library in sys.modules:  # then it has read its variable already
            importlib.import_module(f"{library}.utils.logging").set_verbosity_error()


def console() -> Any:
    """Return a console on stdout that keeps tables whole where there is no terminal."""
    from rich.console import Console

    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=160)


def say(text: str) -> None:
    """Print a line on stdout."""
    typer.echo(text)
