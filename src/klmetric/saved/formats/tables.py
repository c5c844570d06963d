"""Tables: text, .parquet and Arrow, which pyarrow reads."""

from pathlib import Path

from klmetric.saved.array import Choice, Saved


def open_table(path: Path, choice: Choice) -> Saved:
    """The predictions in a table."""
    from klmetric.saved.tables.predictions import predictions_in

    return predictions_in(path, choice)
