"""The values of single rows in a file: as an array, or as a table. Each is written as it comes, in constant memory.

A row that does not count, because its weight is 0 or it is no distribution, has no values there.
"""

import json
from pathlib import Path
from shutil import copyfileobj
from typing import IO, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from klmetric.command.comparison import Batch, Task
from klmetric.command.fields import OF_LLAMA
from klmetric.options import check_base, unit_name
from klmetric.rows.fields import OF_CLASSES, OF_TAILS
from klmetric.saved.errors import InputError
from klmetric.totals.estimates import IN_NATS

# Rows of a table that are held until they are written together.
ROWS = 2**17


def values_of(task: Task, rows: Batch) -> dict[str, Tensor]:
    """The values of each row, shape (models, rows), by their names; NaN where it does not count."""
    unit = check_base(task.base)
    fields = dict(zip(task.fields, rows.fields.unbind(1), strict=True))
    values = {"kl": rows.kl / unit, "agreement": rows.agrees}
    if "nll" in fields:
        nll, delta_p = fields["nll"], fields["delta_p"]
        # Where p is 0, the difference of the logarithms is infinite, and that of the probabilities is q.
        log_q = torch.where(nll.isinf(), delta_p.log(), -nll - fields["ln_ratio"])
        values |= {"log_p": -nll, "log_q": log_q, "delta_p": delta_p}
    for name in (*OF_CLASSES, *OF_TAILS, *OF_LLAMA):
        if name in fields and name != "agreement_1":  # which is the agreement
            values[name] = fields[name] / (unit if name in IN_NATS else 1)
    counts = (rows.weight > 0) & ~rows.kl.isnan()
    return {name: torch.where(counts, x.float(), torch.nan) for name, x in values.items()}


class Array:
    """The divergences in a .npy file, float32 of shape (models, rows).

    On disk the values of one row follow one another (the array is in Fortran order), so that rows can be added.
    """

    def __init__(self, file: IO[bytes], task: Task, names: list[str]) -> None:
        self.file, self.task, self.models, self.rows = file, task, len(names), 0
        self._write_header()
        self.begin = file.tell()

    def _write_header(self) -> None:
        # Of one length whatever the number of rows: numpy leaves room for it to grow.
        header = {"descr": "<f4", "fortran_order": True, "shape": (self.models, self.rows)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def add(self, rows: Batch, first: int, lengths: Tensor) -> None:
        """Write samples that are whole, from number `first` on, of so many rows each."""
        kl = values_of(self.task, rows)["kl"]
        self.file.write(kl.T.contiguous().numpy().astype("<f4", copy=False).tobytes())
        self.rows += len(rows)

    def append(self, part: Path) -> None:
        """Write the rows of a file of the same kind, which is closed."""
        with part.open("rb") as file:
            file.seek(self.begin)
            self.rows += (part.stat().st_size - self.begin) // (4 * self.models)
            copyfileobj(file, self.file, 2**24)

    def close(self) -> None:
        """Write what is missing; the stream stays open."""
        self.file.seek(0)
        self._write_header()
        assert self.file.tell() == self.begin


class Table:
    """All that is known of the rows in a .parquet file: a line for each row of each model."""

    def __init__(self, file: IO[bytes], task: Task, names: list[str]) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ModuleNotFoundError as error:
            raise InputError(f"--rows into .parquet needs {error.name}: pip install 'klmetric[compare]'.") from error
        self.task, self.names, self.pa, self.pq = task, names, pa, pq
        self.waiting: list[Any] = []
        # The schema is that of no rows.
        one = {name: torch.zeros(0, dtype=torch.int64) for name in ("weight", "labels", "bands", "targets")}
        of_models = torch.zeros(len(names), 0)
        fields = torch.zeros(len(names), len(task.fields), 0)
        clipped = torch.zeros(len(names), 2, 0)
        nothing = Batch(of_models, of_models, fields, clipped, **one, steps=[])
        about = {"reference": task.reference.name, "unit": unit_name(task.base), "direction": task.options.direction}
        metadata = {"klmetric": json.dumps({**about, "temperature": task.options.temperature})}
        no_rows = torch.zeros(0, dtype=torch.int64)
        self.schema = self._table(nothing, no_rows, no_rows).schema.with_metadata(metadata)
        # Of values that are all different a dictionary saves nothing, and takes long.
        few = [field.name for field in self.schema if not pa.types.is_floating(field.type)]
        self.writer = pq.ParquetWriter(file, self.schema, use_dictionary=[*few, "weight", "agreement"])

    def _table(self, rows: Batch, samples: Tensor, positions: Tensor) -> Any:
        pa, task, models = self.pa, self.task, len(self.names)

        def named(numbers: Any, names: list[str]) -> Any:
            text = [name.encode("utf-8", "backslashreplace") for name in names]  # those of files may be anything
            return pa.DictionaryArray.from_arrays(
                pa.array(numbers, pa.int32()), pa.array(text, pa.string())
            ).dictionary_decode()

        def of_each(x: Tensor) -> Any:
            return np.tile(x.numpy(), models)

        columns = {
            "model": named(np.arange(models).repeat(len(samples)), self.names),
            "sample": pa.array(of_each(samples), pa.int64()),
        }
        if len(task.reference.shape) > 2:
            columns["position"] = pa.array(of_each(positions), pa.int32())
        if task.reference.ids is not None:
            columns["id"] = pa.array(np.tile(task.reference.ids[samples.numpy()], models))
        if task.labels is not None:
            columns["group"] = named(of_each(rows.labels), task.label_names)
        if task.targets is not None:
            columns["target"] = pa.array(of_each(rows.targets), pa.int32())
        columns["weight"] = pa.array(of_each(rows.weight.float()), pa.float32())
        for name, x in values_of(task, rows).items():
            columns[name] = pa.array(x.flatten().numpy(), pa.float32(), from_pandas=True)  # without NaN: as missing
        return pa.table(columns)

    def add(self, rows: Batch, first: int, lengths: Tensor) -> None:
        """Write samples that are whole, from number `first` on, of so many rows each."""
        samples = torch.arange(first, first + len(lengths)).repeat_interleave(lengths)
        positions = torch.arange(len(samples)) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        for some in range(0, len(samples), ROWS):
            part = slice(some, some + ROWS)
            self.waiting.append(self._table(rows.part(part), samples[part], positions[part]))
            if sum(table.num_rows for table in self.waiting) >= ROWS:
                self._write()

    def _write(self) -> None:
        if self.waiting:
            self.writer.write_table(self.pa.concat_tables(self.waiting).cast(self.schema))
            self.waiting = []

    def append(self, part: Path) -> None:
        """Write the rows of a file of the same kind, which is closed."""
        self._write()
        with self.pq.ParquetFile(part) as file:
            for group in range(file.num_row_groups):
                self.writer.write_table(file.read_row_group(group).cast(self.schema))

    def close(self) -> None:
        """Write what is missing; the stream stays open."""
        self._write()
        self.writer.close()


RowFile: TypeAlias = Array | Table
KINDS: dict[str, type[Array] | type[Table]] = {".npy": Array, ".parquet": Table}
