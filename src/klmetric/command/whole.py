"""Files that are written whole or not at all: beside their place, and then put into it."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

from klmetric.command.ending import ctrl_c
from klmetric.saved.errors import InputError

# As much as a report may take, or its picture.
TRIED = 2**18
# What is said of the place of a file that could not be written.
UNCHANGED = "It is as it was before."


def try_place(path: Path) -> None:
    """Write beside a place as much as a report takes, and take it away again.

    Raises:
        InputError: if nothing can be written there.
    """
    place = _place_of(path)
    with told_of(path, "Name another file."):
        if place.is_file():
            place.open("r+b").close()  # may it be written over?
        if is_replaced(place):
            with _beside(place, bytes(TRIED)):
                pass


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, in the place of what is there. If that fails, what is there stays as it is.

    Raises:
        InputError: if it cannot be written.
    """
    place = _place_of(path)
    with told_of(path, UNCHANGED):
        if not is_replaced(place):
            place.write_bytes(data)
            return
        with _beside(place, data) as new:
            put_in_place(new, place)


def put_in_place(new: Path, path: Path) -> None:
    """Have a file take the place of what is there, with its owner and its rights."""
    place = _place_of(path)
    if place.exists():
        before = place.stat()
        if hasattr(os, "chown"):
            with suppress(PermissionError):
                os.chown(new, before.st_uid, before.st_gid)
        new.chmod(before.st_mode & 0o7777)
    os.replace(new, place)


def is_replaced(path: Path) -> bool:
    """Not a device or a pipe, into which one can only write."""
    return path.is_file() or not path.exists()


def name_beside(path: Path) -> Path:
    """A name that no file has, in the folder of this one."""
    return _place_of(path).with_name(f".klmetric-{token_hex(8)}.tmp")


def _place_of(path: Path) -> Path:
    return Path(os.path.realpath(path))  # where it is a link, it stays one


@contextmanager
def _beside(place: Path, data: bytes) -> Iterator[Path]:
    """A file with these data in the same folder, for a while."""
    new = name_beside(place)
    with ctrl_c(signal.default_int_handler):  # an exception, so that it is taken away
        try:
            with new.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # where room is given only now, it may lack only now
            yield new
        finally:
            new.unlink(missing_ok=True)


@contextmanager
def told_of(path: Path, hint: str) -> Iterator[None]:
    """Errors of the system as those of a place that was named.

    Raises:
        InputError: for any of them.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"A report must go where it can be written. Got {path}: {reason}. {hint}") from error
