"""`--rows`: a file of the values of all rows, which takes its place when all that was measured is in it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NoReturn

import torch.distributed
from torch import Tensor

from klmetric.command.comparison import Batch, Task
from klmetric.command.ending import ctrl_c, leave
from klmetric.command.row_files import KINDS, RowFile
from klmetric.command.whole import UNCHANGED, name_beside, put_in_place, told_of
from klmetric.saved.errors import InputError


class KeptRows:
    """The rows that this process has measured, in a file of its own beside the place of the whole."""

    def __init__(self, path: Path) -> None:
        self.path, self.part = path, name_beside(path)
        self.fault: str | None = None
        self.stream: IO[bytes] | None = None
        self.file: RowFile | None = None

    def begin(self, task: Task, names: list[str]) -> None:
        """Make the file, for models of these names.

        Raises:
            InputError: if nothing can be written there.
        """
        with told_of(self.path, UNCHANGED):
            self.stream = self.part.open("xb")
            self.file = KINDS[self.path.suffix](self.stream, task, names)

    def add(self, rows: Batch, first: int, lengths: Tensor) -> None:
        """Write samples that are whole, from number `first` on, of so many rows each."""
        self._try(lambda file: file.add(rows, first, lengths))

    def _try(self, write: Callable[[RowFile], object]) -> None:
        """What is measured is to be shown even where this file has no room."""
        if self.file is not None and self.fault is None:
            try:
                with told_of(self.path, UNCHANGED):
                    write(self.file)
            except InputError as error:
                self.fault = str(error)
                self.discard()

    def finish(self, rank: int, processes: int) -> list[Exception]:
        """Put the rows of all processes into place, in the order of the ranks; and what is to be said of that."""
        if rank:
            self._try(self._close)
        parts: list[Any] = [(self.part, self.fault)]
        if processes > 1:
            parts = [None] * processes
            torch.distributed.all_gather_object(parts, (self.part, self.fault))
        if rank == 0:
            self.fault = next((fault for _, fault in parts if fault is not None), None)
            self._try(lambda file: self._put_together(file, [part for part, _ in parts[1:]]))
        if processes > 1:
            torch.distributed.barrier()  # until the parts are read
        return [] if rank or self.fault is None else [InputError(self.fault)]

    def _put_together(self, file: RowFile, parts: list[Path]) -> None:
        for part in parts:
            file.append(part)
        self._close(file)
        put_in_place(self.part, self.path)

    def _close(self, file: RowFile) -> None:
        file.close()
        if self.stream is not None:
            self.stream.flush()
            os.fsync(self.stream.fileno())
            self.stream.close()

    def discard(self) -> None:
        """Leave nothing, but for what has taken its place."""
        for file in (self.file, self.stream):
            with suppress(OSError, ValueError):  # there may be no room, and it may be closed
                if file is not None:
                    file.close()
        with suppress(OSError):
            self.part.unlink(missing_ok=True)

    def end(self, *_: object) -> NoReturn:
        """Leave nothing, and end the program."""
        with suppress(OSError):
            self.part.unlink(missing_ok=True)
        leave()


@contextmanager
def kept_rows(path: Path | None, task: Task, names: list[str]) -> Iterator[KeptRows | None]:
    """The rows that are to be kept, if any are. Unless they were put into place, nothing of them stays.

    Raises:
        InputError: if nothing can be written there.
    """
    if path is None:
        yield None
        return
    rows = KeptRows(path)
    with ctrl_c(rows.end):
        try:
            rows.begin(task, names)
            yield rows
        finally:
            rows.discard()
