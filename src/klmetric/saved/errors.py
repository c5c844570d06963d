"""What is said of input that cannot be measured."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
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
        where = "" if option is None else f"{option}: "
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise InputError(f"{where}{path} does not exist.{_near_to(path)}") from error
        raise InputError(f"{where}There must be a file or a folder at {path}. Got {error.strerror}.") from error


def _near_to(path: Path) -> str:
    """What else may have been meant, of what is there."""
    if not path.parent.is_dir():
        return f" Nor is there a folder {path.parent}."
    try:
        near = get_close_matches(path.name, os.listdir(path.parent), n=1, cutoff=0.7)
    except OSError:
        near = []
    return f" Did you mean {path.parent / near[0]}?" if near else ""


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
