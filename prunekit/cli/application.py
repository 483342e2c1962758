"""The application: shared arguments, output, and errors as one line and an exit status."""

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from prunekit.runtime.errors import UserError, plain_line

PACKAGE = __name__.partition(".")[0]
INTERRUPTED = 130
_BASES: tuple[Any, ...] = typer.BadParameter.__mro__
UsageError, ClickException = _BASES[1:3]  # classes of click, which newer versions of typer bundle
Recipe = Annotated[
    Path,
    typer.Argument(metavar="RECIPE", help="Recipe: a YAML file, or a name that `prunekit recipes` lists."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Settings that replace those of the file, such as fine_tune.steps=100."
    ),
]
Engine = Annotated[
    list[str] | None, typer.Argument(metavar="[engine=ENGINE]", help="Engine that does the work: local or ray.")
]
Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="emoji, a diffusers directory, or a known shape: sd-2.1, sdxl, flux.1-dev, …"),
]


class Commands(TyperGroup):
    """The group that turns errors into one line and an exit status."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command line; always leaves by SystemExit."""
        given = extra.get("args")
        arguments = list(sys.argv[1:] if given is None else given)
        debug = "--debug" in arguments or os.environ.get("PRUNEKIT_DEBUG", "") not in ("", "0")
        try:
            status = super().main(*args, **{**extra, "standalone_mode": False})
        except ClickException as error:
            hint = f" (see `{error.ctx.command_path} --help`)" if isinstance(error, UsageError) and error.ctx else ""
            _fail(error.format_message() + hint, error.exit_code)
        except (KeyboardInterrupt, typer.Abort):
            _interrupted()
        except Exception as error:
            if debug or not is_users(error):
                raise
            _fail(str(error) or type(error).__name__, 1)
        if status == INTERRUPTED:
            _interrupted()
        sys.exit(status if isinstance(status, int) else 0)


def is_users(error: Exception) -> bool:
    """Return whether an error is for the user: its class is prunekit's, or it is an OSError.

    Any other error is a fault of prunekit or of a library, and its traceback is shown.
    """
    return isinstance(error, UserError | OSError) or type(error).__module__.partition(".")[0] == PACKAGE


def _fail(message: str, status: int) -> NoReturn:
    typer.echo(f"prunekit: {plain_line(message)}", err=True)
    sys.exit(status)


def _interrupted() -> NoReturn:
    _fail("interrupted; finished work is kept: `prunekit resume RUN` resumes a run", INTERRUPTED)


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of every error.")] = False,
) -> None:
    """Prune text-to-image diffusion denoisers, recover them, and route prompts to pruned experts.

    Start with `prunekit run quickstart`, which prunes the embedded model on this machine in minutes. For your own
    model, `prunekit recipes` lists recipes, and `prunekit plan RECIPE` shows the time and memory that a recipe takes.
    """
    for library in ("transformers", "diffusers"):
        os.environ.setdefault(f"{library.upper()}_VERBOSITY", "error")
        if library in sys.modules:  # an imported library has read its variable already
            importlib.import_module(f"{library}.utils.logging").set_verbosity_error()


def console() -> Any:
    """Return a console on stdout; see `stdout_console`."""
    from prunekit.runtime.screen import stdout_console

    return stdout_console()


def print_table(
    header: Sequence[str], lines: Sequence[Sequence[str]], numeric: Sequence[str] = (), title: str | None = None
) -> None:
    """Print a table on stdout; see `screen.print_table`."""
    from prunekit.runtime import screen

    screen.print_table(console(), header, lines, numeric, title)


def say(text: str) -> None:
    """Print a line on stdout."""
    typer.echo(text)
