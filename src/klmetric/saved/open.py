"""From a path to what is saved there. A new format is a file in `formats`, and a line here in FORMATS."""

from collections.abc import Callable, Iterable
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
from klmetric.saved.topk import check_no_indices, paired

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
        opened = [("", found)] if isinstance(found, Saved) else _chosen(found, choice, path, in_folder)

    def guarded(saved: Saved) -> Saved:
        return replace(saved, read=_guarded(saved.read, path, kind))

    return [
        replace(
            guarded(saved),
            name=f"{path}[{name}]" if name else str(path),
            arrays=((file.st_dev, file.st_ino, name),),
            indices=None if saved.indices is None else guarded(saved.indices),
        )
        for name, saved in opened
    ]


def _chosen(arrays: Arrays, choice: Choice, path: Path, in_folder: bool) -> list[tuple[str, Saved]]:
    """The arrays that are chosen of a file, each with the numbers of its classes if it is top-k."""
    asked, named = _indices_in(arrays, choice, path)
    rest = [(name, opens) for name, opens in arrays if name not in dict(named)]
    chosen = _matching(rest, choice, path, in_folder)
    if asked is None:
        if len(chosen) < len(rest) and choice.is_checked:
            check_no_indices(path, rest, dict(chosen))
        return [(name, opens()) for name, opens in chosen]
    if len(named) != len(chosen):
        raise InputError(
            f"--indices must match an array for each one of values. Got {listed(dict(named))} for"
            f" {listed(dict(chosen))} in {path}. Choose both: --key 'values.*' --indices 'ids.*'."
        )
    pairs = zip(chosen, named, strict=True)
    return [
        (name, paired(replace(opens(), name=f"{path}[{name}]"), replace(ids(), name=f"{path}[{other}]"), asked))
        for (name, opens), (other, ids) in pairs
    ]


def _indices_in(arrays: Arrays, choice: Choice, path: Path) -> tuple[str | None, Arrays]:
    """The name or pattern of `--indices` of which the file has arrays, and these in their order."""
    found = {asked: _fitting(arrays, asked) for asked in choice.indices}
    there = [(asked, fitting) for asked, fitting in found.items() if fitting]
    if len(there) > 1:
        raise InputError(f"One of --indices must be in a file. Got {listed(asked for asked, _ in there)} in {path}.")
    return there[0] if there else (None, [])


def _fitting(arrays: Iterable[tuple[str, Callable[[], Saved]]], pattern: str | None) -> Arrays:
    fitting = [pair for pair in arrays if pattern is None or fnmatchcase(pair[0], pattern)]
    return sorted(fitting, key=lambda pair: natural(pair[0]))


def _matching(arrays: Arrays, choice: Choice, path: Path, in_folder: bool) -> Arrays:
    """Those that `--key` names."""
    by_name, key = dict(arrays), choice.key
    if len(by_name) < len(arrays):
        names = [name for name, _ in arrays]
        doubled = next(name for name in names if names.count(name) > 1)
        raise InputError(
            f"Arrays must have names of their own. Got two that read {doubled!r} in {path}. Save one under another."
        )
    if key is None and len(arrays) != 1:
        if choice.is_checked:
            check_no_indices(path, arrays, by_name)
        raise InputError(f"`--key` must say which array to take. Got {path} with {listed(by_name)}.")
    chosen = _fitting(arrays, key)
    if not chosen and not in_folder:  # where another shard may have it
        raise InputError(f"`--key` must match an array. Got {key!r}, and {path} has {listed(by_name)}.")
    return chosen


def _guarded(read: Callable[[int, int], Tensor], path: Path, kind: str) -> Callable[[int, int], Tensor]:
    def guarded(start: int, stop: int) -> Tensor:
        with as_bad_input(path, kind):
            return read(start, stop)

    return guarded
