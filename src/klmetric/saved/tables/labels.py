"""Labels in a table, one in each row."""

from pathlib import Path

from klmetric.saved.array import Array
from klmetric.saved.errors import InputError
from klmetric.saved.names import listed
from klmetric.saved.tables.files import look_at
from klmetric.saved.tables.reading import values_of


def labels_in(path: Path, id_column: str | None, samples: int) -> tuple[Array, Array | None]:
    """The values of a table of one column besides that of the ids, and the ids."""
    table = look_at(path, header=True)
    if len(table.schema.names) == 1:  # a label may be any word: the number of rows says whether the first is one
        without = look_at(path, header=False)
        labels = values_of(without, without.schema.names[0])
        if len(labels) == samples:
            table = without
        elif len(labels) == samples + 1 and str(labels[-1]) == "" and not without.has_header:
            raise InputError(
                f"It must be clear which lines are labels. Got {samples + 1} in {path}, whose first line may be a"
                " header, and whose last is empty. Leave out the empty line, or give the label that is missing a name."
            )
    names = table.schema.names
    ids = values_of(table, id_column) if id_column is not None and id_column in names else None
    others = [name for name in names if name != id_column]
    if len(others) != 1:
        raise InputError(
            f"It must be clear which column has the groups. Got {path} with {listed(names)}. Leave one, and that"
            " of --id."
        )
    return values_of(table, others[0]), ids
