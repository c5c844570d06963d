"""Predictions in a table: a column for each class, or one that holds lists of them."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import torch

from klmetric.saved.array import Choice, Saved
from klmetric.saved.errors import InputError
from klmetric.saved.names import listed
from klmetric.saved.tables.classes import classes_of
from klmetric.saved.tables.columns import described
from klmetric.saved.tables.files import look_at
from klmetric.saved.tables.kinds import is_number_or_bool
from klmetric.saved.tables.reading import Reader, first_rows, rows_in, shape_of_lists, values_of
from klmetric.saved.tables.topk import check_no_indices, indices_in, with_indices


def predictions_in(path: Path, choice: Choice) -> Saved:
    """Look at the columns, count the rows and read their ids.

    Raises:
        InputError: if the columns are not there, or are not clear.
    """
    table = look_at(path, choice.header)
    names = table.schema.names
    if choice.id is not None and choice.id not in names:
        if not choice.needs_id:
            return predictions_in(path, replace(choice, id=None))
        raise InputError(f"`--id` must be a column. Got {choice.id!r}, and {path} has {listed(names)}.")
    indices = indices_in(table, choice)
    columns = classes_of(table, choice, partial(first_rows, table), {choice.id, indices})
    taken = list(columns.values())
    ids = None if choice.id is None else values_of(table, choice.id)
    rows = rows_in(table, taken[0]) if ids is None else len(ids)
    shape: tuple[int, ...] = (rows, len(taken))
    dtype, starts = torch.float64, None
    are_lists = len(taken) == 1 and not is_number_or_bool(table.kind(taken[0]))
    if are_lists and indices is None:
        if choice.is_checked:
            check_no_indices(table, taken[0])
        shape, dtype, starts = shape_of_lists(table, taken[0], rows)
    source = f"the lists in {taken[0]}" if are_lists else described(taken)
    saved = Saved(
        str(path),
        shape,
        dtype,
        Reader(table, taken, shape, are_even=starts is None).read,
        columns=None if are_lists else columns,
        source=source if table.has_header else f"{source} (no header)",
        ids=ids,
        others={
            name: partial(values_of, table, name)
            for name in names
            if name not in {*taken, choice.id, indices} and not pa.types.is_nested(table.kind(name))
        },
        is_sequential=True,
        starts=starts,
    )
    return saved if indices is None else with_indices(table, choice, saved, taken, indices)
