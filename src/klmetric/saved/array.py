"""Saved predictions as rows of classes: the value that every kind of file is read as, and what to take of a file.

Every reading maps the file, or reads on where the one before has ended, and lets go of it soon, so memory does not grow
with its size. (A .pt file of the old kind alone has to be held.)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from klmetric.options import Format

Array: TypeAlias = np.ndarray[Any, Any]

# Stands for the target of a row that does not count, as in `torch.nn.functional.cross_entropy`.
IGNORED = -100


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
        targets: the class that came true in each row, where the file says so; `IGNORED` where none counts.
        others: gives the values of the columns of a table that are no classes.
        is_sequential: whether it is read from the beginning on, by one thread.
        grid: gives, where log-probabilities are rounded to an even grid, for each of a stretch of rows the distance
            between neighbours and the edge, shape (rows, 2). A class that is only known to be at the edge or below it
            is read as -inf.
        at_once: how many rows to read at once, by all threads together, where they are computed as they are read.
        starts: the first row of each sample, and the end, where samples differ in their positions.
        arrays: the device and the number of the file, and the name in it, of each array that this is made of.
        indices: of top-k predictions: which class each of the numbers of a row is of, negative for padding; an array of
            the same shape. Without it, a row has all classes.
        all_classes: of top-k predictions: how many classes there are, once that is known.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]
    columns: Mapping[str, str] | None = None
    source: str | None = None
    ids: Array | None = None
    input_format: Format | None = None
    tokens: Array | None = None
    targets: Array | None = None
    others: Mapping[str, Callable[[], Array]] = field(default_factory=dict)
    is_sequential: bool = False
    grid: Callable[[int, int], Tensor] | None = None
    at_once: int | None = None
    starts: Array | None = None
    arrays: tuple[tuple[int, int, str], ...] = ()
    indices: "Saved | None" = None
    all_classes: int | None = None

    @property
    def width(self) -> int:
        """How many numbers a row has: the length of the last axis."""
        return self.shape[-1]

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return self.all_classes or self.width

    @property
    def positions(self) -> int:
        """The rows in a sample, or in the longest."""
        return prod(self.shape[1:-1])

    @property
    def rows(self) -> int:
        """The number of rows."""
        if self.starts is not None:
            return int(self.starts[-1])
        return prod(self.shape[:-1]) if len(self.shape) > 1 else self.shape[0]

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
        needs_id: whether a table must have the column of the ids.
        indices: names, and patterns of names, of arrays or columns that say which classes the values are of.
        is_checked: whether to ask about what looks like such an array, and is not named.
    """

    key: str | None = None
    columns: str | None = None
    id: str | None = None
    header: bool | None = None
    classes: Mapping[str, str] | None = None
    documents: bool | None = None
    needs_id: bool = True
    indices: tuple[str, ...] = ()
    is_checked: bool = True


# The arrays of a file that may hold several: the name of each, and what opens it when it is asked for.
Arrays: TypeAlias = list[tuple[str, Callable[[], Saved]]]


def rows_of(array: Any, start: int, stop: int) -> Any:
    """Rows of an array of samples, in whatever order it is."""
    if array.ndim < 3:
        return array[start:stop]
    # The samples that these rows are in, first: what is not contiguous is copied.
    inner = max(prod(array.shape[1:-1]), 1)
    first = start // inner
    samples = array[first : (stop - 1) // inner + 1]
    return samples.reshape(-1, array.shape[-1])[start - first * inner :][: stop - start]


def of_tensor(name: str, opened: Callable[[int], Tensor]) -> Saved:
    """A tensor that is in a file.

    Args:
        name: of it.
        opened: gives the tensor, without reading it, for so many bytes of it to be read.
    """
    tensor = opened(0)
    shape, dtype = tuple(tensor.shape), tensor.dtype
    of_a_row = dtype.itemsize * (shape[-1] if len(shape) > 1 else 1)

    def read(start: int, stop: int) -> Tensor:
        rows: Tensor = rows_of(opened((stop - start) * of_a_row), start, stop)
        return rows

    return Saved(name, shape, dtype, read)
