"""A user's mistake is one line on stderr and an exit status; anything else shows its traceback."""

import os
import sys
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from prunekit.errors import UserError, plain_line

PACKAGE = __name__.partition(".")[0]
INTERRUPTED = 130
_BASES: tuple[Any, ...] = typer.BadParameter.__mro__
UsageError, ClickException = _BASES[1:3]  # of click, which newer typers carry inside


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
    """Return whether the message is for the user: an error class of ours, or an operating system's error on a file.

    Any other error is a fault of prunekit or of a library, which the traceback helps to find.
    """
    return isinstance(error, UserError | OSError) or type(error).__module__.partition(".")[0] == PACKAGE


def _fail(message: str, status: int) -> NoReturn:
    typer.echo(f"prunekit: {plain_line(message)}", err=True)
    sys.exit(status)


def _interrupted() -> NoReturn:
    _fail("interrupted; what is finished stays: `prunekit resume RUN` goes on with a run", INTERRUPTED)
