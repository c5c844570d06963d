"""From a path to what is saved there. A new format is a file in `formats`, and a line here in FORMATS."""

from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor

from klmetric.saved.array import Arrays, Choice, Saved
from klmetric.saved.errors import InputError, as_bad_input, check_is_there
from klmetric.saved.formats.llama import is_kld, open_kld
from klmetric.saved.formats.numpy import open_npy, open_npz
from klmetric.saved.formats.recording import open_recording
from klmetric.saved.formats.safetensors import open_safetensors
from klmetric.saved.formats.tables import open_table
from klmetric.saved.formats.torch import open_torch
from klmetric.saved.joined import in_order, joined
from klmetric.saved.names import RECORDING, listed, natural, suffix_of
from klmetric.saved.shards import files_of

# What opens a file of each kind: as the one array that it holds, or as several that have names. A library that may be
# missing is imported when a file is opened.
FORMATS: dict[str, Callable[[Path, Choice], Saved | Arrays]] = {
    ".npy": open_npy,
    ".npz": open_npz,
    ".safetensors": open_safetensors,
    ".pt": open_torch,
    ".pth": open_torch,
    ".parquet": open_table,
    ".csv": open_table,
    ".csv.gz": open_table,
    ".tsv": open_table,
    ".tsv.gz": open_table,
    ".arrow": open_table,
    ".feather": open_table,
    ".kld": open_kld,
    RECORDING: open_recording,
}
TABLES = tuple(kind for kind, opened in FORMATS.items() if opened is open_table)


def kind_of(path: Path) -> str:
    """The key in FORMATS, if it is there: what the name ends in, but .kld of any file that begins as one."""
    if path.name == RECORDING:
        return RECORDING
    return ".kld" if path.is_file() and is_kld(path) else suffix_of(path)


def open_saved(path: Path, choice: Choice) -> Saved:
    """Look at a file, or at all files of a folder as one array after the other.

    Raises:
        InputError: if there is no array in it that can be read.
    """
    check_is_there(path)
    files = files_of(path, kind_of, FORMATS)
    parts: list[Saved] = []
    for file in files:
        parts += _arrays_of(file, choice, in_folder=len(files) > 1)
        if parts and parts[0].columns is not None:  # the classes of the other shards, in this order
            choice = replace(choice, classes=parts[0].columns)
    if not parts:
        raise InputError(f"`--key` must match an array. Got {choice.key!r}, and no shard of {path} has one.")
    return replace(joined(in_order(parts), choice.documents), name=str(path))


def _arrays_of(path: Path, choice: Choice, in_folder: bool) -> list[Saved]:
    """The arrays of a file that are chosen, in their order."""
    kind = kind_of(path)
    if kind not in FORMATS:
        raise InputError(f"A file must be one of {', '.join(FORMATS)}. Got {path}. Save the array in one of these.")
    file = path.stat()
    if file.st_size == 0:
        raise InputError(f"A file must hold an array. Got {path}, which is empty. Was it written to the end?")
    with as_bad_input(path, kind):
        found = FORMATS[kind](path, choice)
        if isinstance(found, Saved):
            opened = [("", found)]
        else:
            opened = [(name, opens()) for name, opens in _chosen(found, choice.key, path, in_folder)]
    return [
        replace(
            saved,
            name=f"{path}[{name}]" if name else str(path),
            read=_guarded(saved.read, path, kind),
            arrays=((file.st_dev, file.st_ino, name),),
        )
        for name, saved in opened
    ]


def _chosen(arrays: Arrays, key: str | None, path: Path, in_folder: bool) -> Arrays:
    by_name = dict(arrays)
    if len(by_name) < len(arrays):
        names = [name for name, _ in arrays]
        doubled = next(name for name in names if names.count(name) > 1)
        raise InputError(
            f"Arrays must have names of their own. Got two that read {doubled!r} in {path}. Save one under another."
        )
    if key is None and len(arrays) != 1:
        raise InputError(f"`--key` must say which array to take. Got {path} with {listed(by_name)}.")
    chosen = sorted((name for name in by_name if key is None or fnmatchcase(name, key)), key=natural)
    if not chosen and not in_folder:  # where another shard may have it
        raise InputError(f"`--key` must match an array. Got {key!r}, and {path} has {listed(by_name)}.")
    return [(name, by_name[name]) for name in chosen]


def _guarded(read: Callable[[int, int], Tensor], path: Path, kind: str) -> Callable[[int, int], Tensor]:
    def guarded(start: int, stop: int) -> Tensor:
        with as_bad_input(path, kind):
            return read(start, stop)

    return guarded
