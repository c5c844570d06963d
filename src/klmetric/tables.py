"""Tables of predictions, one column for each class: .parquet and .csv, read from the beginning on."""

from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from klmetric.saved import Choice, InputError, Saved, listed


def open_table(path: Path, choice: Choice) -> Saved:
    """Look at the columns, count the rows and read their ids.

    Raises:
        InputError: if the columns are not there, or are not clear.
    """
    schema = _schema(path)
    if choice.id is not None and choice.id not in schema.names:
        raise InputError(f"`--id` must be a column. Got {choice.id!r}, and {path} has {listed(schema.names)}.")
    columns = _columns(path, schema, choice)
    ids = None
    if choice.id is not None:
        ids = _column(path, choice.id)
        rows = len(ids)
    else:
        rows = sum(len(batch) for batch in _batches(path, columns[:1]))
    others = {name: partial(_column, path, name) for name in schema.names if name not in (*columns, choice.id)}
    reader = _Reader(path, columns)
    shape = (rows, len(columns))
    return Saved(
        str(path), shape, torch.float64, reader.read, tuple(columns), ids=ids, others=others, is_sequential=True
    )


def _column(path: Path, name: str) -> "np.ndarray[Any, Any]":
    """The values of one column as they are."""
    parts = [batch.column(0).to_numpy(zero_copy_only=False) for batch in _batches(path, [name], False)]
    values = np.concatenate(parts) if parts else np.empty(0)
    return values.astype(str) if values.dtype == object else values


# Numbers of a table that are held at once.
NUMBERS = 2**21


class _Reader:
    """Gives stretches of rows, one after the other; it starts over to go back."""

    def __init__(self, path: Path, columns: list[str]) -> None:
        self.path, self.columns = path, columns
        self.at = 0
        self.rest = np.empty((0, len(columns)))
        self.batches: Iterator[Any] = iter(())
        self.is_open = False

    def read(self, start: int, stop: int) -> Tensor:
        if not self.is_open or start < self.at:
            self.batches, self.is_open = _batches(self.path, self.columns), True
            self.at, self.rest = 0, self.rest[:0]
        taken = []
        while self.at < stop:
            if not len(self.rest):
                self.rest = self._matrix(next(self.batches))
            skipped = min(len(self.rest), max(0, start - self.at))
            part = self.rest[skipped : skipped + stop - max(start, self.at)]
            if len(part):
                taken.append(part)
            self.at += skipped + len(part)
            self.rest = self.rest[skipped + len(part) :]
        return torch.from_numpy(np.concatenate(taken) if taken else self.rest[:0])

    def _matrix(self, batch: Any) -> "np.ndarray[Any, np.dtype[np.float64]]":
        columns = [batch.column(name).cast(pa.float64()) for name in self.columns]
        return np.column_stack([column.to_numpy(zero_copy_only=False) for column in columns])


def _schema(path: Path) -> Any:
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
    else:
        with pc.open_csv(path, _reading(path)) as reader:
            schema = reader.schema
    if doubled := [name for name, times in Counter(schema.names).items() if times > 1]:
        raise InputError(f"Columns must have names of their own. Got {doubled[0]!r} twice in {path}.")
    return schema


def _reading(path: Path) -> Any:
    """Blocks that hold some rows, however wide."""
    with path.open("rb") as file:
        columns = file.readline().count(b",") + 1
    return pc.ReadOptions(block_size=max(2**20, 256 * columns))


def _batches(path: Path, columns: list[str], as_floats: bool = True) -> Iterator[Any]:
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=max(1, NUMBERS // len(columns)), columns=columns)
    else:
        # A column of whole numbers so far may go on otherwise.
        types = {field.name: pa.float64() for field in _schema(path) if as_floats and _is_number(field.type)}
        convert = pc.ConvertOptions(include_columns=columns, column_types=types)
        with pc.open_csv(path, _reading(path), convert_options=convert) as reader:
            yield from reader


def _columns(path: Path, schema: Any, choice: Choice) -> list[str]:
    """The classes."""
    names = [name for name in schema.names if name != choice.id]
    if choice.columns is not None:
        if isinstance(choice.columns, tuple):  # of another table
            if missing := sorted(set(choice.columns) - set(names)):
                raise InputError(f"Every table must have the same classes. Got no column {missing[0]!r} in {path}.")
            return list(choice.columns)
        patterns = [pattern.strip() for pattern in choice.columns.split(",")]
        chosen = [name for pattern in patterns for name in names if fnmatchcase(name, pattern)]
        if unmatched := [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]:
            raise InputError(f"`--columns` must be of the table. Got {unmatched[0]!r}, and {path} has {listed(names)}.")
        if bad := [name for name in chosen if not _is_number(schema.field(name).type)]:
            raise InputError(
                f"Classes must be numbers. Got column {bad[0]!r} of {schema.field(bad[0]).type} in {path}."
            )
        return list(dict.fromkeys(chosen))
    floats = [name for name in names if pa.types.is_floating(schema.field(name).type)]
    if others := sorted(set(names) - set(floats)):
        raise InputError(
            f"It must be clear which columns are classes. Got {path} with {len(floats)} columns of floats, and"
            f" {listed(others)} besides. Name the classes with --columns, and one that names the rows with --id."
        )
    return floats


def _is_number(kind: Any) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind))


def labels(path: Path, id_column: str | None) -> "tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]":
    """The values of a table of one column besides that of the ids, and the ids."""
    try:
        names = _schema(path).names
        ids = _column(path, id_column) if id_column is not None and id_column in names else None
        others = [name for name in names if name != id_column]
        if len(others) != 1:
            raise InputError(
                f"It must be clear which column has the groups. Got {path} with {listed(names)}. Leave one, and that"
                " of --id."
            )
        return _column(path, others[0]), ids
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} cannot be read as {path.suffix}: {error}") from error
