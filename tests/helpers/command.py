"""The command `klmetric compare` as tests run it."""

import json

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


def report_of(*arguments: object, **options: object) -> dict:
    return json.loads(run(*arguments, "--json", "-", **options).stdout)
