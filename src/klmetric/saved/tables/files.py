"""The files that hold tables: text, .parquet and Arrow. pyarrow reads them from the beginning on, in batches."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from klmetric.saved.errors import InputError
from klmetric.saved.names import suffix_of
from klmetric.saved.tables.delimited import look_at_text
from klmetric.saved.tables.kinds import is_number
from klmetric.saved.tables.table import Table

TEXT = (".csv", ".csv.gz", ".tsv", ".tsv.gz")


def look_at(path: Path, header: bool | None) -> Table:
    """What is in the file.

    Args:
        path: of the file.
        header: of text: whether the first row names the columns, where that is known.

    Raises:
        InputError: if two columns have the same name.
    """
    kind = suffix_of(path)
    table = _parquet(path) if kind == ".parquet" else _text(path, header) if kind in TEXT else _arrow(path)
    if doubled := [name for name, times in Counter(table.schema.names).items() if times > 1]:
        raise InputError(f"Columns must have names of their own. Got {doubled[0]!r} twice in {path}.")
    return table


def _text(path: Path, header: bool | None) -> Table:
    file = look_at_text(path, header)
    with file.open() as reader:
        schema = reader.schema
    numbers = [field.name for field in schema if is_number(field.type)]

    def batches(columns: list[str], rows: int, as_floats: bool) -> Iterator[Any]:
        types = dict.fromkeys(numbers, pa.float64() if as_floats else pa.string())
        with file.open(include_columns=columns, column_types=types) as reader:
            yield from reader

    return Table(path, schema, batches, has_header=file.has_header)


def _parquet(path: Path) -> Table:
    def batches(columns: list[str], rows: int, as_floats: bool) -> Iterator[Any]:
        # Without these, pyarrow holds the whole file.
        buffer_size = max(2**12, min(2**16, 2**24 // len(columns)))
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=buffer_size) as file:
            yield from file.iter_batches(batch_size=rows, columns=columns)

    with pq.ParquetFile(path) as file:
        return Table(path, file.schema_arrow, batches, file.metadata.num_rows)


def _arrow(path: Path) -> Table:
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

    return Table(path, schema, batches)
