"""What is said of input that cannot be measured."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(Exception):
    """Input that cannot be measured: the rule, what arrived, and what to do."""


class HeaderError(InputError):
    """The first row of a table may name its columns, or be the first of the data."""


def said_of(error: Exception) -> str:
    """What a user reads of an error."""
    is_expected = isinstance(error, InputError)
    return f"{error}" if is_expected else f"{type(error).__name__}: {error} (Unexpected: --debug shows where.)"


def check_is_there(path: Path, option: str | None = None) -> None:
    """Raise unless there is a file or a folder at the path that this option names."""
    try:
        os.stat(path)
    except OSError as error:
        is_missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        got = "nothing" if is_missing else f"{error.strerror}"
        where = "" if option is None else f"{option}: "
        raise InputError(f"{where}There must be a file or a folder at {path}. Got {got}.") from error


@contextmanager
def as_bad_input(path: Path, kind: str) -> Iterator[None]:
    """Any error in reading a file of this kind as one of its input. The libraries have no common kind of error."""
    try:
        yield
    except InputError:
        raise
    except ModuleNotFoundError as error:
        raise InputError(f"{path} needs {error.name}: pip install 'klmetric[compare]'.") from error
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"{path} cannot be read as {kind}: {reason}. Is it whole, and of that kind?") from error


def check_is_whole(path: Path, has: int, needs: int) -> None:
    """Raise where there are fewer bytes, or numbers, than the header says."""
    if has < needs:
        raise InputError(f"{path} ends before its last row. Was it written, or copied, to the end?")
