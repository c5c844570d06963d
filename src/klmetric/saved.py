"""Saved predictions as rows of classes: what a file or a folder holds, and how a stretch of its rows is read.

Every reading maps the file anew and lets go of it, or reads on where the one before has ended, so memory does not grow
with its size. (A .pt file of the old kind alone has to be held.)
"""

import re
import zipfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import accumulate
from json import JSONDecodeError, loads
from pathlib import Path
from pickle import UnpicklingError
from shutil import copyfileobj
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from klmetric.input_error import InputError as InputError
from klmetric.input_error import check_is_there
from klmetric.options import Format


class HeaderError(InputError):
    """The first row of a table may name its columns, or be the first of the data."""


@dataclass(frozen=True)
class Saved:
    """An array on disk, of (rows, classes) or (samples, positions, classes).

    Attributes:
        name: where it is, for messages.
        shape: of the array; where samples differ in their positions, with those of the longest.
        dtype: of its numbers.
        read: gives the rows from one number to another, shape (rows, classes).
        columns: of a table: the column of each class, by what names the class in every table.
        source: of a table: which columns the classes are, for the report.
        ids: of the rows, where there are any.
        input_format: where the file says what its numbers are.
        tokens: that the predictions are of, where the file says so.
        others: gives the values of the columns of a table that are no classes.
        is_sequential: whether it is read from the beginning on, by one thread.
        grid: gives, where log-probabilities are rounded to an even grid, for each of a stretch of rows the distance
            between neighbours and the edge, shape (rows, 2). A class that is only known to be at the edge or below it
            is read as -inf.
        starts: the first row of each sample, and the end, where samples differ in their positions.
        arrays: the device and the number of the file, and the name in it, of each array that this is made of.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]
    columns: Mapping[str, str] | None = None
    source: str | None = None
    ids: "np.ndarray[Any, Any] | None" = None
    input_format: Format | None = None
    tokens: "np.ndarray[Any, Any] | None" = None
    others: Mapping[str, Callable[[], "np.ndarray[Any, Any]"]] = field(default_factory=dict)
    is_sequential: bool = False
    grid: Callable[[int, int], Tensor] | None = None
    starts: "np.ndarray[Any, Any] | None" = None
    arrays: tuple[tuple[int, int, str], ...] = ()

    @property
    def classes(self) -> int:
        """The length of the last axis."""
        return self.shape[-1]

    @property
    def positions(self) -> int:
        """The rows in a sample, or in the longest."""
        return int(np.prod(self.shape[1:-1]))

    @property
    def rows(self) -> int:
        """The number of rows."""
        if self.starts is not None:
            return int(self.starts[-1])
        return int(np.prod(self.shape[:-1])) if len(self.shape) > 1 else self.shape[0]

    def first_row(self, sample: int) -> int:
        """The number of the first row of a sample."""
        return sample * self.positions if self.starts is None else int(self.starts[sample])

    def sample_at(self, row: int) -> int:
        """The number of the sample that a row is in."""
        return row // self.positions if self.starts is None else int(self.starts.searchsorted(row, "right")) - 1

    def lengths(self, first: int, last: int) -> Tensor:
        """The rows of the samples from one number to another."""
        if self.starts is None:
            return torch.full((last - first,), self.positions)
        return torch.from_numpy(np.diff(self.starts[first : last + 1]))


@dataclass(frozen=True)
class Choice:
    """What to take of a file that holds more.

    Attributes:
        key: the name of the array, or a pattern of names of arrays that follow one another.
        columns: of a table: names and patterns, with commas between; None for those that are recognised.
        id: of a table: the column that names the rows.
        header: of a table of text: whether its first row names the columns; None to see.
        classes: of a table: the classes of another one (its `Saved.columns`), to be taken in the same order.
        documents: whether an array of (rows, classes) is one sample; None for each row, if that is clear.
    """

    key: str | None = None
    columns: str | None = None
    id: str | None = None
    header: bool | None = None
    classes: Mapping[str, str] | None = None
    documents: bool | None = None


def open_saved(path: Path, choice: Choice) -> Saved:
    """Look at a file, or at all files of a folder as one array after the other.

    Raises:
        InputError: if there is no array in it that can be read.
    """
    check_is_there(path)
    if index := _index_of(path):
        files = _shards_of_index(index)
    else:
        files = _shards_of_folder(path) if path.is_dir() else [path]
    parts: list[Saved] = []
    for file in files:
        parts += _open_file(file, choice, in_folder=len(files) > 1)
        if parts and parts[0].columns is not None:  # the classes of the other shards, in this order
            choice = replace(choice, classes=parts[0].columns)
    if not parts:
        raise InputError(f"`--key` must match an array. Got {choice.key!r}, and no shard of {path} has one.")
    return replace(_one_after_the_other(_in_order(parts), choice.documents), name=str(path))


def _index_of(path: Path) -> Path | None:
    """The index of the shards, if there is one."""
    if not path.is_dir():
        return path if path.name.endswith(".index.json") else None
    state = path / "state.json"
    if state.exists() and (path / "dataset_info.json").exists():  # as a Dataset's save_to_disk writes them
        return state
    if (path / "dataset_dict.json").exists():
        splits = listed(sorted(folder.name for folder in path.iterdir() if folder.is_dir()))
        raise InputError(
            f"A folder must hold one dataset. Got {path} with the splits {splits}. Name the folder of one."
        )
    indices = sorted(path.glob("*.index.json"))
    if len(indices) > 1:
        raise InputError(f"A folder must have one index. Got {', '.join(i.name for i in indices)} in {path}. Name one.")
    return indices[0] if indices else None


def _shards_of_folder(folder: Path) -> list[Path]:
    files = [file for file in folder.iterdir() if ending(file) in SUFFIXES and not file.name.startswith(".")]
    kinds = {ending(file) for file in files}
    if not files or len(kinds) > 1:
        what = "none" if not files else f"some of each of {sorted(kinds)}"
        raise InputError(
            f"A folder must hold shards of one kind ({', '.join(SUFFIXES)}). Got {what} in {folder}. Name a file?"
        )
    files.sort(key=lambda file: _natural(file.name))
    for file in files:  # part-00002-of-00005
        if numbers := re.search(r"(\d+)-of-(\d+)\D*$", file.stem):
            expected, width = int(numbers[2]), len(numbers[1])
            there = {int(m[1]) for f in files if (m := re.search(r"(\d+)-of-(\d+)\D*$", f.stem))}
            first = 0 if 0 in there else 1
            if missing := [i for i in range(first, first + expected) if i not in there]:
                raise InputError(
                    f"Every shard must be there: {folder} has {len(there)} of {expected}. Missing is"
                    f" number {str(missing[0]).zfill(width)}. Was it not copied?"
                )
            break
    return files


def _shards_of_index(index: Path) -> list[Path]:
    is_dataset = index.name == "state.json"
    try:
        content = loads(index.read_text())
        if is_dataset:
            names = [file["filename"] for file in content["_data_files"]]
        else:
            names = sorted(set(content["weight_map"].values()), key=_natural)
    except (JSONDecodeError, KeyError, AttributeError, TypeError, UnicodeDecodeError) as error:
        what = "_data_files, a list of files" if is_dataset else "a weight_map of names to files"
        raise InputError(f"An index must have {what}. Got {index}: {error!r}.") from error
    if is_dataset and (content.get("_indices_data_files") or content.get("_indices_files")):
        raise InputError(
            f"A dataset must hold its rows in their order. Got {index} with indices of rows. Save it once more, after"
            " flatten_indices()."
        )
    if not names:
        raise InputError(f"An index must name files. Got {index} with none.")
    files = [index.parent / name for name in names]
    if missing := [file.name for file in files if not file.exists()]:
        raise InputError(f"Every shard must be there. Got {index} that names {missing[0]}, and no such file.")
    return files


def _in_order(parts: list[Saved]) -> list[Saved]:
    """By the numbers of the arrays, over all files; or file by file, where each file begins anew."""
    of_files: dict[tuple[int, int], list[str]] = {}
    for part in parts:
        device, number, name = part.arrays[0]
        of_files.setdefault((device, number), []).append(name)
    longest = max(of_files.values(), key=len)
    if all(names == longest[: len(names)] for names in of_files.values()):
        return parts
    keys = [_natural(part.arrays[0][2]) for part in parts]
    order = sorted(range(len(parts)), key=keys.__getitem__)
    is_clear = len({tuple(text for _, text in key) for key in keys}) == 1 or order == sorted(order)
    if not is_clear or len({tuple(key) for key in keys}) < len(keys):
        raise InputError(
            "Arrays of several files must have numbers that run on over the files, or begin anew in each. Got"
            f" {listed(part.name for part in parts)}. Choose some with --key, or save them under other names."
        )
    return [parts[k] for k in order]


def ending(path: Path) -> str:
    """What a name ends in: .csv, .CSV as well, and .csv.gz; .kld of any file that begins as one of llama.cpp."""
    from klmetric.llama import is_kld

    if path.is_file() and is_kld(path):
        return ".kld"
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix + (".gz" if name.endswith(".gz") else "")


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts part-10 after part-2."""
    return [(int(x), "") if x.isdecimal() else (-1, x) for x in re.split(r"(\d+)", name)]


def _open_file(path: Path, choice: Choice, in_folder: bool) -> list[Saved]:
    if ending(path) not in SUFFIXES:
        raise InputError(f"A file must be one of {', '.join(SUFFIXES)}. Got {path}. Save the array in one of these.")
    if path.stat().st_size == 0:
        raise InputError(f"A file must hold an array. Got {path}, which is empty. Was it written to the end?")
    with _as_bad_input(path):
        arrays = SUFFIXES[ending(path)](path, choice)
    key = choice.key
    if ending(path) in SINGLE or (key is None and len(arrays) == 1):
        names = list(arrays)
    elif key is None:
        raise InputError(f"`--key` must say which array to take. Got {path} with {listed(arrays)}.")
    else:
        names = sorted((name for name in arrays if fnmatchcase(name, key)), key=_natural)
        if not names and not in_folder:  # where another shard may have it
            raise InputError(f"`--key` must match an array. Got {key!r}, and {path} has {listed(arrays)}.")
    with _as_bad_input(path):
        opened = [arrays[name]() for name in names]
    file = path.stat()
    return [
        replace(
            saved,
            name=f"{path}[{name}]" if name else str(path),
            read=_guarded(saved.read, path),
            arrays=((file.st_dev, file.st_ino, name),),
        )
        for name, saved in zip(names, opened, strict=True)
    ]


def _guarded(read: Callable[[int, int], Tensor], path: Path) -> Callable[[int, int], Tensor]:
    def guarded(start: int, stop: int) -> Tensor:
        with _as_bad_input(path):
            return read(start, stop)

    return guarded


def listed(names: Iterable[str]) -> str:
    """Some of the names, for a message."""
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "none"


@contextmanager
def _as_bad_input(path: Path) -> Iterator[None]:
    """Any error in reading a file as one of its input. The libraries have no common kind of error."""
    try:
        yield
    except InputError:
        raise
    except ModuleNotFoundError as error:
        raise InputError(f"{path} needs {error.name}: pip install 'klmetric[compare]'.") from error
    except UnpicklingError as error:
        raise InputError(
            f"A .pt file must hold a tensor, or a dict of tensors. Got {path} with something else, which is not loaded:"
            " it could run code. Save the tensor alone."
        ) from error
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{path} cannot be read as {ending(path)}: {reason}. Is it whole, and of that kind?"
        ) from error


def _one_after_the_other(parts: list[Saved], documents: bool | None) -> Saved:
    """Arrays of the same kind of rows as one."""
    first = parts[0]
    for part in parts:
        if not part.shape:
            raise InputError(f"An array must have an axis. Got a single number in {part.name}.")
        # Of three axes, the second may differ: samples of so many positions each.
        alike = [(len(x.shape), x.shape[1:] if len(x.shape) != 3 else x.shape[2:], x.dtype) for x in (part, first)]
        if alike[0] != alike[1]:
            raise InputError(
                "Shards must have rows of the same shape and dtype. Got"
                f" {first.name} {first.shape} {first.dtype} and {part.name} {part.shape} {part.dtype}."
            )
    if len(first.shape) == 2 and documents is None:
        _check_rows_are_samples(parts)
    if len(first.shape) == 2 and documents:
        if first.ids is not None:
            raise InputError(f"--id must name rows, which --documents makes parts of a sample. Got both, {first.name}.")
        parts = [replace(part, shape=(1, *part.shape)) for part in parts]
        first = parts[0]
    if len(parts) == 1:
        return first
    starts = None
    samples = sum(part.shape[0] for part in parts)
    if len({part.shape[1:] for part in parts}) > 1 or any(part.starts is not None for part in parts):
        lengths = np.concatenate([part.lengths(0, part.shape[0]).numpy() for part in parts])
        if empty := [part.name for part in parts if not part.rows]:
            raise InputError(f"Every document must have rows. Got {empty[0]} with none. Leave it out, on both sides.")
        starts = np.concatenate([[0], lengths.cumsum()])
        first = replace(first, shape=(samples, int(lengths.max()), first.classes))
    ends = list(accumulate(part.rows for part in parts))

    def read(start: int, stop: int) -> Tensor:
        return torch.cat([part.read(a, b) for part, a, b in _stretches(parts, ends, start, stop)])

    def grid(start: int, stop: int) -> Tensor:
        return torch.cat([part.grid(a, b) for part, a, b in _stretches(parts, ends, start, stop) if part.grid])

    return replace(
        first,
        shape=(samples, *first.shape[1:]),
        read=read,
        others={name: partial(_joined, name, parts) for name in first.others if all(name in p.others for p in parts)},
        ids=None if first.ids is None else np.concatenate([part.ids for part in parts if part.ids is not None]),
        tokens=None if first.tokens is None else np.concatenate([x.tokens for x in parts if x.tokens is not None]),
        grid=None if first.grid is None else grid,
        starts=starts,
        arrays=tuple(array for part in parts for array in part.arrays),
    )


def _check_rows_are_samples(parts: list[Saved]) -> None:
    """Ask where arrays in one file look like documents: shards are of one length, but for the last."""
    files = {part.arrays[0][:2] for part in parts}
    other = next((part for part in parts[1:-1] if part.rows != parts[0].rows), parts[-1])
    if len(files) < len(parts) and (other is not parts[-1] or other.rows > parts[0].rows):
        raise InputError(
            f"It must be clear what a sample is. Got arrays of different lengths, {parts[0].name} {parts[0].shape} and"
            f" {other.name} {other.shape}. If each of them is one sample, as a document of tokens, say --documents;"
            " if each row is, --no-documents."
        )


def _joined(name: str, parts: list[Saved]) -> "np.ndarray[Any, Any]":
    return np.concatenate([part.others[name]() for part in parts])


def _stretches(parts: list[Saved], ends: list[int], start: int, stop: int) -> Iterator[tuple[Saved, int, int]]:
    """The parts that rows from `start` to `stop` are in, and the rows of each."""
    for part, end in list(zip(parts, ends, strict=True))[bisect_right(ends, start) :]:
        begin = end - part.rows
        if begin >= stop:
            return
        if part.rows:
            yield part, max(start, begin) - begin, min(stop, end) - begin


def in_the_order_of(ids: "np.ndarray[Any, Any]", saved: Saved) -> Saved:
    """The same rows, in the order of these ids.

    Raises:
        InputError: if the ids are not the same, each once.
    """
    own = saved.ids
    assert own is not None
    if ids.dtype.kind != own.dtype.kind:
        ids, own = ids.astype(str), own.astype(str)
    for name, some in (("the reference", ids), (saved.name, own)):
        values, times = np.unique(some, return_counts=True)
        if len(values) < len(some):
            raise InputError(f"Each `--id` must name one row. Got {values[times > 1][0]} twice in {name}.")
    if len(ids) != len(own) or not np.array_equal(np.sort(ids), np.sort(own)):
        odd = np.setxor1d(ids, own)
        raise InputError(
            f"Both must have the same ids. Got {len(ids)} in the reference and {len(own)} in {saved.name};"
            f" {len(odd)} are in one of them only, as {odd[0]}."
        )
    if np.array_equal(ids, own):
        return saved
    order = np.argsort(own)[np.argsort(np.argsort(ids))]
    lengths = saved.lengths(0, len(own)).numpy()
    before = lengths.cumsum() - lengths
    lengths, before = lengths[order], before[order]
    starts = np.concatenate([[0], lengths.cumsum()])
    rows = np.repeat(before - starts[:-1], lengths) + np.arange(starts[-1])
    starts_if_uneven = None if saved.starts is None else starts
    return replace(saved, read=_at_random(saved, rows), ids=ids, is_sequential=True, starts=starts_if_uneven)


def _at_random(saved: Saved, order: "np.ndarray[Any, Any]") -> Callable[[int, int], Tensor]:
    """Rows in another order. A table is read from its beginning only, so it is kept in a temporary file."""
    from tempfile import TemporaryFile

    kept: Any = None
    step = max(1, 2**22 // saved.classes)

    def read(start: int, stop: int) -> Tensor:
        nonlocal kept
        if kept is None:
            with TemporaryFile() as file:  # which is there as long as it is mapped
                for begin in range(0, saved.rows, step):
                    saved.read(begin, min(begin + step, saved.rows)).numpy().tofile(file)
                file.flush()
                dtype = np.dtype(str(saved.dtype).removeprefix("torch."))
                kept = np.memmap(file, dtype, "r", shape=(saved.rows, saved.classes))
        return torch.from_numpy(kept[order[start:stop]])

    return read


# --- The kinds of files. Each function gives the arrays in one by name: what opens one, when it is asked for.

Arrays = dict[str, Callable[[], Saved]]


def _npy(path: Path, choice: Choice) -> Arrays:
    def opened() -> Saved:
        with path.open("rb") as file:
            shape, order, dtype = _header(file)
            offset = file.tell()
        number = _dtype_of(dtype, path)
        if path.stat().st_size < offset + int(np.prod(shape)) * dtype.itemsize:
            _truncated(path)

        def read(start: int, stop: int) -> Tensor:
            # A mapping anew, so that its pages are not counted as memory of this process for long.
            return _tensor(_rows_of(np.memmap(path, dtype, "c", offset, shape, order), start, stop))

        return Saved(str(path), shape, number, read)

    return {"": opened}


def _rows_of(array: Any, start: int, stop: int) -> Any:
    """Rows of an array of samples, in whatever order it is."""
    if array.ndim < 3:
        return array[start:stop]
    # The samples that these rows are in, first: what is not contiguous is copied.
    inner = max(int(np.prod(array.shape[1:-1])), 1)
    first = start // inner
    samples = array[first : (stop - 1) // inner + 1]
    return samples.reshape(-1, array.shape[-1])[start - first * inner :][: stop - start]


def _header(file: Any) -> tuple[tuple[int, ...], Literal["C", "F"], "np.dtype[Any]"]:
    """Shape, order and dtype of an array in numpy's format, of which the numbers follow."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(file)
    if dtype.hasobject:
        raise InputError("An array must hold numbers. Got one of objects, which is not loaded: it could run code.")
    return shape, "F" if is_fortran and len(shape) > 1 else "C", dtype


def _npz(path: Path, choice: Choice) -> Arrays:
    with zipfile.ZipFile(path) as file:
        names = [name.removesuffix(".npy") for name in file.namelist()]
    _check_names(names, path)
    return {name: lambda name=name: _member_of_npz(path, name) for name in names}  # type: ignore[misc]


def _check_names(names: list[str], path: Path) -> None:
    if doubled := [name for name, times in Counter(names).items() if times > 1]:
        raise InputError(
            f"Arrays must have names of their own. Got two that read {doubled[0]!r} in {path}. Save one under another."
        )


def _member_of_npz(path: Path, name: str) -> Saved:
    """Read from the beginning on: what is compressed can be read no other way."""

    def at_header() -> Any:
        return zipfile.ZipFile(path).open(name + ".npy")

    with at_header() as file:
        shape, order, dtype = _header(file)
        offset = file.tell()
    number = _dtype_of(dtype, path)
    if order == "F":
        return Saved(name, shape, number, _unpacked(at_header, dtype, offset, shape, path), is_sequential=True)
    width = int(np.prod(shape[-1:])) if len(shape) > 1 else 1
    rows, size = int(np.prod(shape)) // max(width, 1), width * dtype.itemsize
    is_open, at = None, 0

    def read(start: int, stop: int) -> Tensor:
        nonlocal is_open, at
        if is_open is None or start < at:
            if is_open is not None:
                is_open.close()
            is_open, at = at_header(), 0
            is_open.read(offset)
        while at < start:
            at += len(is_open.read(min(2**24 // size + 1, start - at) * size)) // size or _truncated(path)
        numbers = np.frombuffer(bytearray(is_open.read((stop - start) * size)), dtype)
        if numbers.size != (stop - start) * width:
            _truncated(path)
        at = stop
        if at == rows:  # of many shards, one is open
            is_open.close()
            is_open = None
        return _tensor(numbers.reshape(-1, width) if len(shape) > 1 else numbers)

    return Saved(name, shape, number, read, is_sequential=True)


def _unpacked(
    opened: Callable[[], Any], dtype: "np.dtype[Any]", offset: int, shape: tuple[int, ...], path: Path
) -> Callable[[int, int], Tensor]:
    """Reads rows of a compressed array in Fortran order, over which they are spread: it is kept in a temporary file."""
    from tempfile import TemporaryFile

    kept: Any = None

    def read(start: int, stop: int) -> Tensor:
        nonlocal kept
        if kept is None:
            with TemporaryFile() as file, opened() as packed:  # which is there as long as it is mapped
                copyfileobj(packed, file, 2**24)
                if file.tell() < offset + int(np.prod(shape)) * dtype.itemsize:
                    _truncated(path)
                file.flush()
                kept = np.memmap(file, dtype, "c", offset, shape, "F")
        return _tensor(_rows_of(kept, start, stop))

    return read


def _truncated(path: Path) -> int:
    raise InputError(f"{path} ends before its last row. Was it written, or copied, to the end?")


def _safetensors(path: Path, choice: Choice) -> Arrays:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names = list(file.keys())

    def opened(name: str) -> Saved:
        def whole() -> Tensor:
            with safe_open(path, "pt") as file:
                tensor: Tensor = file.get_tensor(name)
            return tensor

        return _of_tensor(name, whole)

    return {name: lambda name=name: opened(name) for name in names}  # type: ignore[misc]


def _pt(path: Path, choice: Choice) -> Arrays:
    try:
        held = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
        is_mapped = True
    except RuntimeError as error:
        if "mmap can only be used with files saved with" not in str(error):
            raise
        held = torch.load(path, weights_only=True, map_location="cpu")  # of the old kind, which has to be held
        is_mapped = False
    tensors: Any = {None: held} if isinstance(held, Tensor) else held
    if not isinstance(tensors, Mapping) or not any(isinstance(x, Tensor) for x in tensors.values()):
        raise InputError(f"A .pt file must hold a tensor, or a dict of tensors. Got a {type(held).__name__} in {path}.")

    _check_names([str(name) for name, x in tensors.items() if isinstance(x, Tensor)], path)

    def again(name: Any) -> Tensor:
        again = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
        tensor: Tensor = again if name is None else again[name]
        return tensor.detach()

    return {
        "" if name is None else str(name): lambda name=name, x=x: _of_tensor(
            str(name), (lambda: again(name)) if is_mapped else lambda: x
        )  # type: ignore[misc]
        for name, x in tensors.items()
        if isinstance(x, Tensor)
    }


def _of_tensor(name: str, whole: Callable[[], Tensor]) -> Saved:
    tensor = whole()
    return Saved(
        name, tuple(tensor.shape), tensor.dtype, lambda start, stop: cast(Tensor, _rows_of(whole(), start, stop))
    )


def _dtype_of(dtype: "np.dtype[Any]", path: Path) -> torch.dtype:
    try:
        return _tensor(np.empty(0, dtype)).dtype
    except TypeError as error:
        raise InputError(
            f"The numbers must be of a dtype that torch has. Got {dtype} in {path}. Is it bfloat16? Save it as"
            " .safetensors."
        ) from error


def _tensor(array: "np.ndarray[Any, Any]") -> Tensor:
    return torch.from_numpy(array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("=")))


def _table(path: Path, choice: Choice) -> Arrays:
    from klmetric.tables import open_table

    return {"": lambda: open_table(path, choice)}


def _kld(path: Path, choice: Choice) -> Arrays:
    from klmetric.llama import open_kld

    return {"": lambda: open_kld(path)}


SUFFIXES: dict[str, Callable[[Path, Choice], Arrays]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".safetensors": _safetensors,
    ".pt": _pt,
    ".pth": _pt,
    ".parquet": _table,
    ".csv": _table,
    ".csv.gz": _table,
    ".tsv": _table,
    ".tsv.gz": _table,
    ".arrow": _table,
    ".feather": _table,
    ".kld": _kld,
}
TABLES = tuple(suffix for suffix, opened in SUFFIXES.items() if opened is _table)
# Files of one array, which has no name.
SINGLE = (".npy", ".kld", *TABLES)
