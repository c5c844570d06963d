"""A report as Markdown."""

import re
from typing import Any

from klmetric.command.fitting import PAGE, fits, turned
from klmetric.command.tables import notes_of, sections_of

# What means something in a table of Markdown. An underscore does not, between letters.
_SPECIAL = re.compile(r"[\\|*`<\[\]~]|(?<![^\W_])_|_(?![^\W_])")


def to_markdown(report: dict[str, Any]) -> str:
    """As tables of Markdown."""
    blocks = []
    for title, head, lines in sections_of(report):
        if not fits(head, lines, PAGE):
            head, lines = turned(head, lines)  # in one piece: what shows Markdown can scroll
        rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
        table = "\n".join("| " + " | ".join(map(_plain, row)) + " |" for row in rows)
        blocks.append(f"**{title}**\n\n{table}\n")
    return "\n".join([*blocks, *(f"{note}\n" for note in notes_of(report))])


def _plain(cell: str) -> str:
    """Text that is shown as it stands."""
    return _SPECIAL.sub(r"\\\g<0>", cell).replace("\n", "<br>")
