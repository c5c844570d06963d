"""Columns of lists, and of lists of lists, as arrays."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from klmetric.saved.array import Array
from klmetric.saved.errors import InputError
from klmetric.saved.tables.kinds import is_tensor


def of_lists(array: Any, name: str, path: Path) -> Array:
    """Lists of the same length as one array. Lists of lists of other lengths: as one of (rows, classes)."""
    shape = [len(array)]
    while True:
        if is_tensor(array.type):
            return array.to_numpy_ndarray()  # type: ignore[no-any-return]
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        if not pa.types.is_nested(array.type):
            return array.to_numpy(zero_copy_only=False).reshape(shape)  # type: ignore[no-any-return]
        lengths = lengths_of(array, name, path)
        array = array.flatten()
        if (lengths == lengths[:1]).all():
            shape.append(int(lengths[0]) if len(lengths) else 0)
        elif len(shape) == 1 and pa.types.is_nested(array.type):
            shape = [len(array)]
        else:
            raise InputError(
                f"Every row must have the same classes. Got lists of {lengths.min()} and {lengths.max()} numbers in"
                f" column {name!r} of {path}."
            )


def padded(array: Any, name: str, path: Path, width: int, value: float) -> Array:
    """Lists of numbers, or lists of these, one below the other: as rows of so many numbers, filled up with a value."""
    if is_tensor(array.type):
        return array.to_numpy_ndarray().reshape(-1, width)  # type: ignore[no-any-return]
    *_, (lengths, numbers) = levels(array, name, path)
    if numbers.null_count and not pa.types.is_floating(numbers.type):
        raise InputError(f"The numbers of classes must be there. Got one missing in column {name!r} of {path}.")
    flat = numbers.to_numpy(zero_copy_only=False)
    rows = np.full((len(lengths), width), value, flat.dtype)
    rows[np.arange(width) < lengths[:, None]] = flat
    return rows


def levels(array: Any, name: str, path: Path) -> Iterator[tuple[Array, Any]]:
    """From the outer lists to the inner ones: how long they are, and what is in them."""
    if is_tensor(array.type):
        count = len(array)
        for size in array.type.shape:
            yield np.full(count, size), array
            count *= size
        return
    while pa.types.is_nested(array.type) or isinstance(array, pa.ExtensionArray):
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
            continue
        lengths, array = lengths_of(array, name, path), array.flatten()
        yield lengths, array


def lengths_of(array: Any, name: str, path: Path) -> Array:
    """How long each of the lists is."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if array.null_count:
        raise InputError(f"Every row must have a list of classes. Got one without in column {name!r} of {path}.")
    if pa.types.is_fixed_size_list(array.type):
        return np.full(len(array), array.type.list_size)
    return array.value_lengths().to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]
