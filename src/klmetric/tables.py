"""Tables of predictions: text, .parquet and Arrow, with a column for each class or one that holds lists of them.

pyarrow reads them from the beginning on, in batches of a few MiB.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from klmetric.columns import described, in_the_order_of, named, recognised, unclear
from klmetric.delimited import look_at
from klmetric.saved import Choice, InputError, Saved, _as_bad_input, ending, listed

Array = np.ndarray[Any, Any]

# Numbers of a table that are held at once.
NUMBERS = 2**21
# Rows to look at for columns that do not go with the others.
ROWS = 100


@dataclass(frozen=True)
class _Table:
    """A file of columns.

    Attributes:
        path: of the file.
        schema: the names of the columns, and what they hold.
        batches: gives the columns with these names, at most so many rows at once (of text: blocks of some MiB); as
            floats, where it is text and they have been whole numbers so far.
        rows: how many; None where they have to be counted.
        has_header: whether its columns have names of their own.
    """

    path: Path
    schema: Any
    batches: Callable[[list[str], int, bool], Iterator[Any]]
    rows: int | None = None
    has_header: bool = True

    def kind(self, name: str) -> Any:
        """What a column holds; of an extension type that is not known here, as it is stored."""
        kind = self.schema.field(name).type
        return kind.storage_type if isinstance(kind, pa.BaseExtensionType) and not _is_tensor(kind) else kind

    def column(self, name: str) -> Array:
        """All values of a column as they are."""
        batches = self.batches([name], NUMBERS, False)
        parts = [batch.column(name).to_numpy(zero_copy_only=False) for batch in batches]
        values = np.concatenate(parts) if parts else np.empty(0)
        return values.astype(str) if values.dtype == object else values


def open_table(path: Path, choice: Choice) -> Saved:
    """Look at the columns, count the rows and read their ids.

    Raises:
        InputError: if the columns are not there, or are not clear.
    """
    table = _look_at(path, choice.header)
    names = table.schema.names
    if choice.id is not None and choice.id not in names:
        raise InputError(f"`--id` must be a column. Got {choice.id!r}, and {path} has {listed(names)}.")
    columns = _classes(table, choice)
    taken = list(columns.values())
    ids = None if choice.id is None else table.column(choice.id)
    rows = table.rows if ids is None else len(ids)
    if rows is None:
        rows = sum(batch.num_rows for batch in table.batches(taken[:1], NUMBERS, False))
    shape: tuple[int, ...] = (rows, len(taken))
    dtype, starts = torch.float64, None
    of_lists = len(taken) == 1 and not _is_number_or_bool(table.kind(taken[0]))
    if of_lists:
        shape, dtype, starts = _shape_of_lists(table, taken[0], rows)
    used = {*taken, choice.id}
    others = {
        name: partial(table.column, name)
        for name in names
        if name not in used and not pa.types.is_nested(table.kind(name))
    }
    source = f"the lists in {taken[0]}" if of_lists else described(taken)
    at_once = max(1, NUMBERS // max(1, int(np.prod(shape[1:]))))
    return Saved(
        str(path),
        shape,
        dtype,
        _Reader(table, taken, at_once, shape[1:] if starts is None else shape[-1:]).read,
        columns=None if of_lists else columns,
        source=source if table.has_header else f"{source} (no header)",
        ids=ids,
        others=others,
        is_sequential=True,
        starts=starts,
    )


def _shape_of_lists(table: _Table, name: str, rows: int) -> tuple[tuple[int, ...], torch.dtype, Array | None]:
    """The shape and the dtype of an array of lists, and the first row of each where lists of lists differ in length."""
    first = next(_arrays(table, [name], 1), np.empty((0, 0)))
    shape, dtype = (rows, *first.shape[1:]), torch.from_numpy(np.empty(0, first.dtype)).dtype
    if len(shape) != 3 or not rows:
        return shape, dtype, None
    batches = table.batches([name], max(1, NUMBERS // max(1, first.size)), True)
    lengths = np.concatenate([_lengths(batch.column(name), name, table.path) for batch in batches])
    if not lengths.all():
        raise InputError(f"Every document must have rows. Got none in row {lengths.argmin()} of {table.path}.")
    if (lengths == lengths[0]).all():
        return shape, dtype, None
    return (rows, int(lengths.max()), shape[-1]), dtype, np.concatenate([[0], lengths.cumsum()])


def labels(path: Path, id_column: str | None, samples: int) -> tuple[Array, Array | None]:
    """The values of a table of one column besides that of the ids, and the ids."""
    with _as_bad_input(path):
        table = _look_at(path, header=True)
        if len(table.schema.names) == 1:  # a label may be any word: the number of rows says whether the first is one
            without = _look_at(path, header=False)
            if len(without.column(without.schema.names[0])) == samples:
                table = without
        names = table.schema.names
        ids = table.column(id_column) if id_column is not None and id_column in names else None
        others = [name for name in names if name != id_column]
        if len(others) != 1:
            raise InputError(
                f"It must be clear which column has the groups. Got {path} with {listed(names)}. Leave one, and that"
                " of --id."
            )
        return table.column(others[0]), ids


# --- The kinds of tables


def _look_at(path: Path, header: bool | None) -> _Table:
    kind = ending(path)
    table = _parquet(path) if kind == ".parquet" else _text(path, header) if kind in TEXT else _arrow(path)
    if doubled := [name for name, times in Counter(table.schema.names).items() if times > 1]:
        raise InputError(f"Columns must have names of their own. Got {doubled[0]!r} twice in {path}.")
    return table


TEXT = (".csv", ".csv.gz", ".tsv", ".tsv.gz")


def _text(path: Path, header: bool | None) -> _Table:
    file = look_at(path, header)
    with file.open() as reader:
        schema = reader.schema
    floats = {field.name: pa.float64() for field in schema if _is_number(field.type)}

    def batches(columns: list[str], rows: int, as_floats: bool) -> Iterator[Any]:
        with file.open(include_columns=columns, column_types=floats if as_floats else None) as reader:
            yield from reader

    return _Table(path, schema, batches, has_header=file.has_header)


def _parquet(path: Path) -> _Table:
    def batches(columns: list[str], rows: int, as_floats: bool) -> Iterator[Any]:
        # Without these, pyarrow holds the whole file.
        buffer_size = max(2**12, min(2**16, 2**24 // len(columns)))
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=buffer_size) as file:
            yield from file.iter_batches(batch_size=rows, columns=columns)

    with pq.ParquetFile(path) as file:
        return _Table(path, file.schema_arrow, batches, file.metadata.num_rows)


def _arrow(path: Path) -> _Table:
    """Either of Arrow's two formats: .arrow and .feather files, and the streams that Hugging Face's datasets write."""

    @contextmanager
    def opened(columns: list[int] | None = None) -> Iterator[tuple[Any, Iterator[Any]]]:
        options = pa.ipc.IpcReadOptions(included_fields=columns)
        with pa.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            if is_file:
                with pa.ipc.open_file(source, options=options) as file:
                    yield file.schema, (file.get_batch(k) for k in range(file.num_record_batches))
            else:
                with pa.ipc.open_stream(source, options=options) as stream:
                    yield stream.schema, iter(stream)

    with opened() as (schema, _):
        pass

    def batches(columns: list[str], rows: int, as_floats: bool) -> Iterator[Any]:
        with opened([schema.get_field_index(name) for name in columns]) as (_, parts):
            for batch in parts:
                for start in range(0, batch.num_rows, rows):
                    yield batch.slice(start, rows)

    return _Table(path, schema, batches)


# --- Which columns


def _classes(table: _Table, choice: Choice) -> dict[str, str]:
    """The columns of the classes by what names them, or the one that holds lists of them."""
    path = table.path
    names = [name for name in table.schema.names if name != choice.id]
    if choice.columns is not None:
        columns = named(choice.columns, names, path)
        chosen = list(columns.values())
        are_lists = [name for name in chosen if _is_of_lists(table.kind(name), _is_number_or_bool)]
        bad = [name for name in chosen if not _is_number_or_bool(table.kind(name))]
        if bad and not (are_lists and len(chosen) == 1):
            raise InputError(f"Classes must be numbers. Got column {bad[0]!r} of {table.kind(bad[0])} in {path}.")
    else:
        are_lists = [name for name in names if _is_of_lists(table.kind(name), pa.types.is_floating)]
        if len(are_lists) > 1:
            raise unclear(path, f"{len(are_lists)} columns of lists, {listed(are_lists)}")
        if are_lists:
            columns = {are_lists[0]: are_lists[0]}
            floats = [name for name in names if pa.types.is_floating(table.kind(name))]
            if len(floats) > 1:
                raise unclear(path, f"lists in {are_lists[0]}, and {listed(floats)} besides")
        else:
            columns = recognised({name: pa.types.is_floating(table.kind(name)) for name in names}, path)
            if bad := [name for name in columns.values() if not _is_number(table.kind(name))]:
                raise unclear(path, f"{bad[0]} of {table.kind(bad[0])}")
            _check_values(table, columns)
    if not columns:
        raise unclear(path, "no columns")
    return columns if choice.classes is None or are_lists else in_the_order_of(choice.classes, columns, path)


def _check_values(table: _Table, columns: Mapping[str, str]) -> None:
    """Ask about columns that cannot be told by their names, and have values of another kind: an index, a label, a loss.

    Whole numbers that change while others have fractions; or what is left over where each row adds up to 1 without it.
    """
    if any(name != key and not name.isdecimal() for key, name in columns.items()):  # running numbers after a stem
        return
    names = list(columns.values())
    rows = min(ROWS, NUMBERS // max(1, len(names)))
    x = next(_arrays(table, names, rows), np.empty((0, len(names))))[:rows]
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
            table.path,
            f"{described(names)}, of which {listed(np.array(names)[odd])} has values unlike those of the others",
        )


def _is_number(kind: Any) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind))


def _is_number_or_bool(kind: Any) -> bool:
    return _is_number(kind) or bool(pa.types.is_boolean(kind))


def _is_tensor(kind: Any) -> bool:
    return isinstance(kind, pa.FixedShapeTensorType)


def _is_of_lists(kind: Any, of: Callable[[Any], bool]) -> bool:
    """Whether it holds lists of these, or lists of lists."""
    if _is_tensor(kind):
        return of(kind.value_type)
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and (of(kind.value_type) or _is_of_lists(kind.value_type, of))


# --- Reading


def _arrays(table: _Table, columns: list[str], rows: int) -> Iterator[Array]:
    """Batches as arrays of (rows, classes), of lists in lists with more axes."""
    for batch in table.batches(columns, rows, True):
        if not batch.num_rows:
            continue
        if len(columns) == 1 and not _is_number_or_bool(table.kind(columns[0])):
            yield _of_lists(batch.column(columns[0]), columns[0], table.path)
        else:
            parts = [batch.column(name).cast(pa.float64()) for name in columns]
            yield np.column_stack([part.to_numpy(zero_copy_only=False) for part in parts])


def _of_lists(array: Any, name: str, path: Path) -> Array:
    """Lists of the same length as one array. Lists of lists of other lengths: as one of (rows, classes)."""
    shape = [len(array)]
    while True:
        if _is_tensor(array.type):
            return array.to_numpy_ndarray()  # type: ignore[no-any-return]
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        if not pa.types.is_nested(array.type):
            return array.to_numpy(zero_copy_only=False).reshape(shape)  # type: ignore[no-any-return]
        lengths = _lengths(array, name, path)
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


def _lengths(array: Any, name: str, path: Path) -> Array:
    """How long each of the lists is."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if array.null_count:
        raise InputError(f"Every row must have a list of classes. Got one without in column {name!r} of {path}.")
    if pa.types.is_fixed_size_list(array.type):
        return np.full(len(array), array.type.list_size)
    return array.value_lengths().to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]


class _Reader:
    """Gives stretches of rows, one after the other; it starts over to go back."""

    def __init__(self, table: _Table, columns: list[str], at_once: int, shape: tuple[int, ...]) -> None:
        self.table, self.columns, self.at_once, self.shape = table, columns, at_once, shape
        self.at = 0
        self.rest = np.empty((0, shape[-1]))
        self.batches: Iterator[Array] = iter(())
        self.is_open = False

    def read(self, start: int, stop: int) -> Tensor:
        if not self.is_open or start < self.at:
            self.batches, self.is_open = _arrays(self.table, self.columns, self.at_once), True
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

    def _rows(self, batch: Array) -> Array:
        if batch.shape[-len(self.shape) :] != self.shape:
            raise InputError(
                f"Every row must have the same classes. Got lists of shape {self.shape} and {batch.shape[1:]} in column"
                f" {self.columns[0]!r} of {self.table.path}."
            )
        return batch.reshape(-1, self.shape[-1])
