"""The commands about the recipes that ship: recipes, recipes copy."""

from pathlib import Path
from typing import Annotated

import typer

from prunekit.cli.common import app, console, say
from prunekit.shipped import copy_recipe, shipped_recipes, summary

recipes = typer.Typer(help="List the recipes that ship with prunekit, or copy one.", invoke_without_command=True)
app.add_typer(recipes, name="recipes")


@recipes.callback()
def show(context: typer.Context) -> None:
    """List the recipes that ship with prunekit; `prunekit run NAME` and `prunekit compare NAME` run them."""
    if context.invoked_subcommand is not None:
        return
    terminal = console()
    for name, path in shipped_recipes().items():
        terminal.print(f"[bold]{name}[/bold]: {summary(path)}")
    say("Run one with: prunekit run NAME; copy one to change it with: prunekit recipes copy NAME [PATH]")


@recipes.command()
def copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="a shipped recipe")],
    path: Annotated[
        Path | None, typer.Argument(metavar="[PATH]", help="a file or a directory; here by default")
    ] = None,
) -> None:
    """Copy a shipped recipe together with the files that it extends."""
    for written in copy_recipe(name, path):
        say(f"{written} was written")
