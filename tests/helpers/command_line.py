"""Commands as a user types them, in this process: those that must work, and those that must be refused."""

from typer.testing import CliRunner

from prunekit.cli import app


def ok(*arguments) -> str:
    """Return what a command that must work prints."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


def refused(*arguments) -> str:
    """Return the one line on stderr of a command that must fail."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code not in (0, None)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("prunekit: "), result.stderr
    assert "Traceback" not in result.output
    return lines[0]
