"""Run commands as a user types them, in this process; one function for valid commands, and one for invalid ones."""

from typer.testing import CliRunner

from prunekit.cli import app


def ok(*arguments) -> str:
    """Run a command that must succeed, and return its output."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


def refused(*arguments) -> str:
    """Run a command that must fail, and return its only line on stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code not in (0, None)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("prunekit: "), result.stderr
    assert "Traceback" not in result.output
    return lines[0]
