"""What numpy saves: an array in a .npy file, and several in an .npz file, which may be compressed."""

from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from shutil import copyfileobj
from tempfile import TemporaryFile
from typing import IO, Any, TypeAlias
from zipfile import ZipFile

import numpy as np
import torch
from torch import Tensor

from klmetric.saved.array import Array, Arrays, Choice, Saved, rows_of
from klmetric.saved.errors import InputError, check_is_whole
from klmetric.saved.kept import Kept

Dtype: TypeAlias = "np.dtype[Any]"


def open_npy(path: Path, choice: Choice) -> Saved:
    """The array, which stays in the file until its rows are read."""
    with path.open("rb") as file:
        shape, _, dtype = _header(file)
        begin = file.tell()
    number = _dtype_of(dtype, path)
    check_is_whole(path, path.stat().st_size, begin + prod(shape) * dtype.itemsize)

    def read(start: int, stop: int) -> Tensor:
        # A mapping anew, so that its pages are not counted as memory of this process for long.
        return _tensor(rows_of(np.lib.format.open_memmap(path, "c"), start, stop))

    return Saved(str(path), shape, number, read)


def open_npz(path: Path, choice: Choice) -> Arrays:
    """The arrays by their names. What is compressed can be read from its beginning on only."""
    file = Kept(partial(ZipFile, path), lambda archive: archive.close())

    def member(name: str) -> IO[bytes]:
        return file.get().open(f"{name}.npy")

    names = [name.removesuffix(".npy") for name in file.get().namelist()]
    return [(name, partial(_of_member, name, partial(member, name), path)) for name in names]


def _of_member(name: str, opened: Callable[[], IO[bytes]], path: Path) -> Saved:
    with opened() as file:
        shape, is_fortran, dtype = _header(file)
        begin = file.tell()
    number = _dtype_of(dtype, path)
    way = _unpacked if is_fortran and len(shape) > 1 else _streamed
    return Saved(name, shape, number, way(opened, begin, shape, dtype, path), is_sequential=True)


def _streamed(
    opened: Callable[[], IO[bytes]], begin: int, shape: tuple[int, ...], dtype: Dtype, path: Path
) -> Callable[[int, int], Tensor]:
    """Reads rows one after the other, and starts over to go back."""
    width = shape[-1] if len(shape) > 1 else 1
    rows, size = prod(shape) // max(width, 1), width * dtype.itemsize
    file: IO[bytes] | None = None
    at = 0

    def read(start: int, stop: int) -> Tensor:
        nonlocal file, at
        if file is None or start < at:
            if file is not None:
                file.close()
            file, at = opened(), 0
            file.read(begin)
        while at < start:
            passed = len(file.read(min(2**24 // size + 1, start - at) * size)) // size
            check_is_whole(path, passed, 1)
            at += passed
        numbers = np.frombuffer(bytearray(file.read((stop - start) * size)), dtype)
        check_is_whole(path, numbers.size, (stop - start) * width)
        at = stop
        if at == rows:  # of many shards, one is open
            file.close()
            file = None
        return _tensor(numbers.reshape(-1, width) if len(shape) > 1 else numbers)

    return read


def _unpacked(
    opened: Callable[[], IO[bytes]], begin: int, shape: tuple[int, ...], dtype: Dtype, path: Path
) -> Callable[[int, int], Tensor]:
    """Reads rows of an array in Fortran order, over which they are spread: it is kept in a temporary file."""
    kept: Array | None = None

    def read(start: int, stop: int) -> Tensor:
        nonlocal kept
        if kept is None:
            with TemporaryFile() as file, opened() as packed:  # which is there as long as it is mapped
                copyfileobj(packed, file, 2**24)
                check_is_whole(path, file.tell(), begin + prod(shape) * dtype.itemsize)
                file.flush()
                kept = np.memmap(file, dtype, "c", begin, shape, "F")
        return _tensor(rows_of(kept, start, stop))

    return read


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, Dtype]:
    """Shape, whether it is in Fortran order, and dtype of an array, of which the numbers follow."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(file)
    if dtype.hasobject:
        raise InputError("An array must hold numbers. Got one of objects, which is not loaded: it could run code.")
    return shape, is_fortran, dtype


def _dtype_of(dtype: Dtype, path: Path) -> torch.dtype:
    try:
        return _tensor(np.empty(0, dtype)).dtype
    except TypeError as error:
        raise InputError(
            f"The numbers must be of a dtype that torch has. Got {dtype} in {path}. Is it bfloat16? Save it as"
            " .safetensors."
        ) from error


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("=")))
