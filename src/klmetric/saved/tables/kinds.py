"""What a column of a table holds, by its type in Arrow."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa


def is_number(kind: Any) -> bool:
    """Floats, whole numbers, or nothing at all."""
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind))


def is_number_or_bool(kind: Any) -> bool:
    """Numbers, or true and false."""
    return is_number(kind) or bool(pa.types.is_boolean(kind))


def is_tensor(kind: Any) -> bool:
    """Arrays of one shape, as an extension type that pyarrow has."""
    return isinstance(kind, pa.FixedShapeTensorType)


def is_of_lists(kind: Any, of: Callable[[Any], bool]) -> bool:
    """Whether it holds lists of these, or lists of lists."""
    if is_tensor(kind):
        return of(kind.value_type)
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and (of(kind.value_type) or is_of_lists(kind.value_type, of))


def number_in(kind: Any) -> Any:
    """The type of the numbers in lists, or in lists of these."""
    while not is_number_or_bool(kind):
        kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) and not is_tensor(kind) else kind.value_type
    return kind
