"""A report as Markdown."""

from typing import Any

from klmetric.command.fitting import PAGE, fits, turned
from klmetric.command.tables import notes_of, sections_of


def to_markdown(report: dict[str, Any]) -> str:
    """As tables of Markdown."""
    blocks = []
    for title, head, lines in sections_of(report):
        if not fits(head, lines, PAGE):
            head, lines = turned(head, lines)  # in one piece: what shows Markdown can scroll
        rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
        blocks.append(f"**{title}**\n\n{table}\n")
    return "\n".join([*blocks, *(f"{note}\n" for note in notes_of(report))])
