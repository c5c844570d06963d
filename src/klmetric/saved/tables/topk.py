"""Top-k predictions in a table: a column of lists of values, and one of lists of the numbers of their classes."""

from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np
import pyarrow as pa
import torch

from klmetric.saved.array import Array, Choice, Saved
from klmetric.saved.errors import InputError
from klmetric.saved.names import listed
from klmetric.saved.tables.kinds import is_of_lists, number_in
from klmetric.saved.tables.lists import levels, padded
from klmetric.saved.tables.reading import NUMBERS, Reader
from klmetric.saved.tables.table import Table
from klmetric.saved.topk import ROWS, are_indices, ask_for_indices, paired


def indices_in(table: Table, choice: Choice) -> str | None:
    """The column that `--indices` names, if it is there."""
    there = [name for name in table.schema.names if any(fnmatchcase(name, asked) for asked in choice.indices)]
    if len(there) > 1:
        raise InputError(f"--indices must name one column of a table. Got {listed(there)} in {table.path}.")
    return there[0] if there else None


def with_indices(table: Table, choice: Choice, saved: Saved, columns: list[str], indices: str) -> Saved:
    """Top-k predictions of what would be rows in full without the numbers of their classes.

    Lists may have more or fewer classes, and are filled up; and those of a sample more or fewer rows.

    Raises:
        InputError: if the two columns do not go together.
    """
    path = table.path
    for name, kind, what in (
        (columns[0], pa.types.is_floating, "numbers with a point"),
        (indices, pa.types.is_integer, "whole numbers"),
    ):
        if len(columns) > 1 or not is_of_lists(table.kind(name), kind):
            raise InputError(
                f"Top-k predictions in a table must be a column of lists of values, and one of the numbers of their"
                f" classes. Got {listed(columns)} and {indices!r} in {path}, where {name!r} has no lists of {what}."
                " Name the values with --columns, and the numbers with --indices."
            )
    values = columns[0]
    shape, starts = _shape(table, values, indices, saved.rows)
    asked = next(asked for asked in choice.indices if fnmatchcase(indices, asked))

    def array(name: str, padding: float) -> Saved:
        dtype = torch.from_numpy(np.empty(0, number_in(table.kind(name)).to_pandas_dtype())).dtype
        read = Reader(table, [name], shape, starts is None, padding).read
        return replace(saved, shape=shape, dtype=dtype, read=read, starts=starts, name=f"{path}[{name}]")

    found = paired(array(values, np.nan), array(indices, -1), asked)
    return replace(found, name=saved.name)


def _lists(table: Table, names: list[str], rows: int) -> Iterator[list[pa.Array]]:
    for batch in table.batches(names, rows, True):
        if batch.num_rows:
            yield [batch.column(name) for name in names]


def _shape(table: Table, values: str, indices: str, rows: int) -> tuple[tuple[int, ...], Array | None]:
    """The shape of the longest lists, and the first row of each sample where these differ in length."""
    longest, of_samples = 0, []
    for columns in _lists(table, [values, indices], _at_once(table, values)):
        ours, theirs = (_lengths(x, name, table) for x, name in zip(columns, (values, indices), strict=True))
        if len(ours) > 2:
            raise InputError(
                f"Lists of top-k predictions must be of the k of a row, or lists of these. Got {len(ours)} levels of"
                f" lists in column {values!r} of {table.path}."
            )
        if not _are_same(ours, theirs):
            raise InputError(
                f"Each list of values must have as many numbers of classes. Got others in the columns {values!r} and"
                f" {indices!r} of {table.path}."
            )
        longest = max(longest, int(ours[-1].max(initial=0)))
        of_samples += ours[:-1]
    if not of_samples:
        return (rows, longest), None
    lengths = np.concatenate(of_samples)
    if not lengths.all():
        raise InputError(f"Every document must have rows. Got none in row {lengths.argmin()} of {table.path}.")
    is_even = (lengths == lengths[0]).all()
    return (rows, int(lengths.max()), longest), None if is_even else np.concatenate([[0], lengths.cumsum()])


def _at_once(table: Table, name: str) -> int:
    """How many rows of the table to read at once, by how much is in the first."""
    first = next(_lists(table, [name], 1), None)
    return NUMBERS if first is None else max(1, NUMBERS // max(1, int(_lengths(first[0], name, table)[-1].sum())))


def _lengths(array: pa.Array, name: str, table: Table) -> list[Array]:
    return [lengths for lengths, _ in levels(array, name, table.path)]


def check_no_indices(table: Table, values: str) -> None:
    """Ask where a column looks like the numbers of the classes of these lists, and is not named."""
    for name in table.schema.names:
        if name != values and is_of_lists(table.kind(name), pa.types.is_integer) and _are_indices(table, values, name):
            raise ask_for_indices(table.path, values, name)


def _are_indices(table: Table, values: str, name: str) -> bool:
    try:
        ours, theirs = next(_lists(table, [values, name], ROWS), (None, None))
        if ours is None:
            return False
        lengths = _lengths(ours, values, table)
        is_alike = _are_same(lengths, _lengths(theirs, name, table))
        return is_alike and are_indices(padded(theirs, name, table.path, int(lengths[-1].max(initial=0)), -1))
    except InputError:  # of lists that are not there, for which nobody has asked
        return False


def _are_same(ours: list[Array], theirs: list[Array]) -> bool:
    return len(ours) == len(theirs) and all(map(np.array_equal, ours, theirs))
