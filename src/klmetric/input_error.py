"""What the command says of input that cannot be measured."""

import os
from pathlib import Path


class InputError(Exception):
    """Input that cannot be measured: the rule, what arrived, and what to do."""


def check_is_there(path: Path, option: str | None = None) -> None:
    """Raise unless there is a file or a folder at the path that this option names."""
    try:
        os.stat(path)
    except OSError as error:
        is_missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        got = "nothing" if is_missing else f"{error.strerror}"
        where = "" if option is None else f"{option}: "
        raise InputError(f"{where}There must be a file or a folder at {path}. Got {got}.") from error
