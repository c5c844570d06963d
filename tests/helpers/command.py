"""The command `klmetric` as tests run it."""

import json
from pathlib import Path

from click.testing import Result
from typer.testing import CliRunner

from klmetric.command.cli import app


def run(*arguments: object, code: int = 0, formats: str | None = "logits") -> Result:
    given = [str(argument) for argument in arguments]
    if formats:
        given += ["--input-format", formats]
    done = CliRunner().invoke(app, ["compare", *given])
    assert done.exit_code == code, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done


def record(model: Path, text: Path, out: Path, *arguments: object, code: int = 0) -> Result:
    """Run `klmetric record`."""
    given = ["record", model, "--text", text, "--out", out, *arguments]
    done = CliRunner().invoke(app, [str(argument) for argument in given])
    assert done.exit_code == code, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done


def report_of(*arguments: object, **options: object) -> dict:
    return json.loads(run(*arguments, "--json", "-", **options).stdout)
