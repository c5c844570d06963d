"""A file of columns, whatever its format."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from klmetric.saved.tables.kinds import is_tensor


@dataclass(frozen=True)
class Table:
    """A file of columns.

    Attributes:
        path: of the file.
        schema: the names of the columns, and what they hold.
        batches: gives the columns with these names, at most so many rows at once (of text: blocks of some MiB); as
            floats, where it is text and they have been whole numbers so far, or else numbers as they are written.
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
        return kind.storage_type if isinstance(kind, pa.BaseExtensionType) and not is_tensor(kind) else kind
