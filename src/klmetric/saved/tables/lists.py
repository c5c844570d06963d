"""Columns of lists, and of lists of lists, as arrays."""

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


def lengths_of(array: Any, name: str, path: Path) -> Array:
    """How long each of the lists is."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if array.null_count:
        raise InputError(f"Every row must have a list of classes. Got one without in column {name!r} of {path}.")
    if pa.types.is_fixed_size_list(array.type):
        return np.full(len(array), array.type.list_size)
    return array.value_lengths().to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]
