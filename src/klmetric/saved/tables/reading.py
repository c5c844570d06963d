"""The columns of a table as arrays, a few at once, and as stretches of rows."""

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from klmetric.saved.array import Array
from klmetric.saved.errors import InputError
from klmetric.saved.tables.kinds import is_number, is_number_or_bool
from klmetric.saved.tables.lists import lengths_of, of_lists, padded
from klmetric.saved.tables.table import Table

# Numbers of a table that are held at once.
NUMBERS = 2**21


def arrays(table: Table, columns: list[str], rows: int) -> Iterator[Array]:
    """Batches as arrays of (rows, classes), of lists in lists with more axes."""
    for batch in table.batches(columns, rows, True):
        if not batch.num_rows:
            continue
        if len(columns) == 1 and not is_number_or_bool(table.kind(columns[0])):
            yield of_lists(batch.column(columns[0]), columns[0], table.path)
        else:
            parts = [batch.column(name).cast(pa.float64()) for name in columns]
            yield np.column_stack([part.to_numpy(zero_copy_only=False) for part in parts])


def padded_lists(table: Table, name: str, rows: int, width: int, value: float) -> Iterator[Array]:
    """Batches of a column of lists as arrays of (rows, width), filled up with a value."""
    for batch in table.batches([name], rows, True):
        if batch.num_rows:
            yield padded(batch.column(name), name, table.path, width, value)


def first_rows(table: Table, columns: list[str], most: int) -> Array:
    """So many of the first rows at most, of columns of numbers."""
    rows = min(most, NUMBERS // max(1, len(columns)))
    return next(arrays(table, columns, rows), np.empty((0, len(columns))))[:rows]


def values_of(table: Table, name: str) -> Array:
    """All values of a column as they are; as text, "" for one that is missing, where numpy has no kind for them."""
    parts = [_with_text(batch.column(name)) for batch in table.batches([name], NUMBERS, False)]
    if any(part.dtype.kind == "U" for part in parts):
        parts = [part.astype(str) for part in parts]
    values = np.concatenate(parts) if parts else np.empty(0)
    return _as_numbers(values) if is_number(table.kind(name)) and values.dtype.kind == "U" else values


def _with_text(column: Any) -> Array:
    present: Array = column.drop_null().to_numpy(zero_copy_only=False)
    if not column.null_count:
        return present.astype(str) if present.dtype == object else present
    values = np.full(len(column), "", object)
    values[column.is_valid().to_numpy(zero_copy_only=False)] = present.astype(str)
    return values.astype(str)


def _as_numbers(values: Array) -> Array:
    """Numbers that are written as they are said: 5, and not 05, which is another name than 5."""
    for dtype in (np.int64, np.float64):
        try:
            numbers = values.astype(dtype)
        except (ValueError, OverflowError):
            continue
        if np.array_equal(numbers.astype(str), values):
            return numbers
    return values


def rows_in(table: Table, name: str) -> int:
    """How many rows there are, counted in this column where the file does not say."""
    if table.rows is not None:
        return table.rows
    return sum(batch.num_rows for batch in table.batches([name], NUMBERS, False))


def shape_of_lists(table: Table, name: str, rows: int) -> tuple[tuple[int, ...], torch.dtype, Array | None]:
    """The shape and the dtype of an array of lists, and the first row of each where lists of lists differ in length."""
    first = next(arrays(table, [name], 1), np.empty((0, 0)))
    shape, dtype = (rows, *first.shape[1:]), torch.from_numpy(np.empty(0, first.dtype)).dtype
    if len(shape) != 3 or not rows:
        return shape, dtype, None
    batches = table.batches([name], max(1, NUMBERS // max(1, first.size)), True)
    lengths = np.concatenate([lengths_of(batch.column(name), name, table.path) for batch in batches])
    if not lengths.all():
        raise InputError(f"Every document must have rows. Got none in row {lengths.argmin()} of {table.path}.")
    if (lengths == lengths[0]).all():
        return shape, dtype, None
    return (rows, int(lengths.max()), shape[-1]), dtype, np.concatenate([[0], lengths.cumsum()])


class Reader:
    """Gives stretches of rows, one after the other; it starts over to go back."""

    def __init__(
        self, table: Table, columns: list[str], shape: tuple[int, ...], are_even: bool, padding: float | None = None
    ) -> None:
        """Of an array of this shape; where its samples are not even, they may have fewer positions.

        With `padding`, rows may have fewer numbers, too, and are filled up with it.
        """
        self.table, self.columns, self.padding = table, columns, padding
        self.at_once = max(1, NUMBERS // max(1, prod(shape[1:])))
        self.shape = shape[1:] if are_even and padding is None else shape[-1:]
        self.at = 0
        self.rest = np.empty((0, shape[-1]))
        self.batches: Iterator[Array] = iter(())
        self.is_open = False

    def read(self, start: int, stop: int) -> Tensor:
        """The rows from one number to another."""
        if not self.is_open or start < self.at:
            self.batches, self.is_open = self._arrays(), True
            self.at, self.rest = 0, self.rest[:0]
        taken = []
        while self.at < stop:
            if not len(self.rest):
                self.rest = self._rows(next(self.batches))
            skipped = min(len(self.rest), max(0, start - self.at))
            part = self.rest[skipped : skipped + stop - max(start, self.at)]
            if len(part):
                taken.append(part)
            self.at += skipped + len(part)
            self.rest = self.rest[skipped + len(part) :]
        # A copy: Arrow's memory cannot be written to, of which torch warns.
        return torch.from_numpy(np.concatenate(taken) if taken else np.empty_like(self.rest[:0]))

    def _arrays(self) -> Iterator[Array]:
        if self.padding is None:
            return arrays(self.table, self.columns, self.at_once)
        return padded_lists(self.table, self.columns[0], self.at_once, self.shape[-1], self.padding)

    def _rows(self, batch: Array) -> Array:
        if batch.shape[-len(self.shape) :] != self.shape:
            raise InputError(
                f"Every row must have the same classes. Got lists of shape {self.shape} and {batch.shape[1:]} in column"
                f" {self.columns[0]!r} of {self.table.path}."
            )
        return batch.reshape(-1, self.shape[-1])
