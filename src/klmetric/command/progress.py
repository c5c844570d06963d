"""How far the measuring or recording is, where there is somebody to see it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Task as Bar,
)
from rich.text import Text


class _Rate(ProgressColumn):
    def render(self, task: Bar) -> Text:
        return Text(f"{task.speed:,.0f} rows/s" if task.speed else "")


@contextmanager
def progress(total: int, rank: int, processes: int, doing: str = "Measuring") -> Iterator[Callable[[int], None]]:
    """A bar of the rows of this process, `total` in number; what it gives is called with the rows that are done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(
        *columns, console=Console(stderr=True), transient=True, disable=rank > 0 or not sys.stderr.isatty()
    ) as bar:
        of_rows = bar.add_task(doing if processes == 1 else f"{doing} (1 of {processes} processes)", total=total)
        yield lambda rows: bar.advance(of_rows, rows)
