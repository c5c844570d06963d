"""A report on the terminal."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from klmetric.command.fitting import fitted
from klmetric.command.tables import notes_of, sections_of


def show(report: dict[str, Any], console: Console) -> None:
    """Print the tables, so that they fit."""
    for title, head, lines in sections_of(report):
        for part, (names, values) in enumerate(fitted(head, lines, console.width)):
            has_blocks = any("\n" in cell for line in values for cell in line)
            table = Table(title=None if part else escape(title), title_justify="left", show_lines=has_blocks)
            for k, text in enumerate(names):
                table.add_column(escape(text), justify="left" if k == 0 else "right", overflow="fold")
            for line in values:
                table.add_row(*map(escape, line))
            console.print(table)
    for note in notes_of(report):
        console.print(Text(note))
