"""Which columns of a table are the classes: by names and kinds, and by values where these say too little."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from klmetric.saved.array import Array, Choice
from klmetric.saved.errors import InputError
from klmetric.saved.names import listed
from klmetric.saved.tables.columns import described, in_the_order_of, named, recognised, unclear
from klmetric.saved.tables.kinds import is_number, is_number_or_bool, is_of_lists
from klmetric.saved.tables.table import Table

# Rows to look at for columns that do not go with the others.
ROWS = 100


def classes_of(
    table: Table, choice: Choice, first_rows: Callable[[list[str], int], Array], others: Collection[str | None]
) -> dict[str, str]:
    """The columns of the classes by what names them, or the one that holds lists of them.

    Args:
        table: that has them.
        choice: what was said of them.
        first_rows: gives so many rows of some columns.
        others: columns that have something else, as ids.

    Raises:
        InputError: if they are not there, or are not clear.
    """
    path = table.path
    names = [name for name in table.schema.names if name not in others]
    if choice.columns is not None:
        columns = named(choice.columns, names, path)
        chosen = list(columns.values())
        are_lists = [name for name in chosen if is_of_lists(table.kind(name), is_number_or_bool)]
        bad = [name for name in chosen if not is_number_or_bool(table.kind(name))]
        if bad and not (are_lists and len(chosen) == 1):
            raise InputError(f"Classes must be numbers. Got column {bad[0]!r} of {table.kind(bad[0])} in {path}.")
    else:
        are_lists = [name for name in names if is_of_lists(table.kind(name), pa.types.is_floating)]
        if len(are_lists) > 1:
            raise unclear(path, f"{len(are_lists)} columns of lists, {listed(are_lists)}")
        if are_lists:
            columns = {are_lists[0]: are_lists[0]}
            floats = [name for name in names if pa.types.is_floating(table.kind(name))]
            if len(floats) > 1:
                raise unclear(path, f"lists in {are_lists[0]}, and {listed(floats)} besides")
        else:
            columns = recognised({name: pa.types.is_floating(table.kind(name)) for name in names}, path)
            if bad := [name for name in columns.values() if not is_number(table.kind(name))]:
                raise unclear(path, f"{bad[0]} of {table.kind(bad[0])}")
            _check_values(columns, first_rows, path)
    if not columns:
        raise unclear(path, "no columns")
    return columns if choice.classes is None or are_lists else in_the_order_of(choice.classes, columns, path)


def _check_values(columns: Mapping[str, str], first_rows: Callable[[list[str], int], Array], path: Path) -> None:
    """Ask about columns that cannot be told by their names, and have values of another kind: an index, a label, a loss.

    Whole numbers that change while others have fractions; or what is left over where each row adds up to 1 without it.
    """
    if any(name != key and not name.isdecimal() for key, name in columns.items()):  # running numbers after a stem
        return
    names = list(columns.values())
    x = first_rows(names, ROWS)
    if len(x) < 2:
        return
    with np.errstate(all="ignore"):
        are_whole = (x == np.rint(x)).all(0) & np.isfinite(x).all(0)
        odd = np.zeros_like(are_whole) if are_whole.all() else are_whole & (x != x[0]).any(0)
        for p in (x, np.exp(x)):
            total = p.sum(-1, keepdims=True)
            if (p >= 0).all() and (abs(total - 1) < 1e-3).all():
                return
            odd |= (p >= 0).all() & (abs(total - p - 1) < 1e-3).all(0)
    if odd.any():
        raise unclear(
            path,
            f"{described(names)}; not like the others in their values: {listed(np.array(names)[odd])}",
        )
