"""The rows of predictions in the order of those of others, by the ids of both."""

from collections.abc import Callable
from dataclasses import replace
from tempfile import TemporaryFile

import numpy as np
import torch
from torch import Tensor

from klmetric.saved.array import Array, Saved
from klmetric.saved.errors import InputError


def in_the_order_of(ids: Array, saved: Saved) -> Saved:
    """The same rows, in the order of these ids.

    Raises:
        InputError: if the ids are not the same, each once.
    """
    own = saved.ids
    assert own is not None
    if ids.dtype.kind != own.dtype.kind:
        ids, own = ids.astype(str), own.astype(str)
    for name, some in (("the reference", ids), (saved.name, own)):
        values, times = np.unique(some, return_counts=True)
        if len(values) < len(some):
            raise InputError(f"Each `--id` must name one row. Got {values[times > 1][0]} twice in {name}.")
    if len(ids) != len(own) or not np.array_equal(np.sort(ids), np.sort(own)):
        odd = np.setxor1d(ids, own)
        raise InputError(
            f"Both must have the same ids. Got {len(ids)} in the reference and {len(own)} in {saved.name};"
            f" {len(odd)} are in one of them only, as {odd[0]}."
        )
    if np.array_equal(ids, own):
        return saved
    order = np.argsort(own)[np.argsort(np.argsort(ids))]
    lengths = saved.lengths(0, len(own)).numpy()
    before = lengths.cumsum() - lengths
    lengths, before = lengths[order], before[order]
    starts = np.concatenate([[0], lengths.cumsum()])
    rows = np.repeat(before - starts[:-1], lengths) + np.arange(starts[-1])
    starts_if_uneven = None if saved.starts is None else starts
    indices = saved.indices
    return replace(
        saved,
        read=_at_random(saved, saved, rows),
        ids=ids,
        is_sequential=True,
        starts=starts_if_uneven,
        indices=None if indices is None else replace(indices, read=_at_random(indices, saved, rows)),
    )


def _at_random(array: Saved, saved: Saved, order: Array) -> Callable[[int, int], Tensor]:
    """Rows of an array of what is saved, in another order. It is kept in a temporary file.

    (A table is read from its beginning only.)
    """
    kept: Array | None = None
    step = max(1, 2**22 // saved.width)

    def read(start: int, stop: int) -> Tensor:
        nonlocal kept
        if kept is None:
            with TemporaryFile() as file:  # which is there as long as it is mapped
                for begin in range(0, saved.rows, step):
                    array.read(begin, min(begin + step, saved.rows)).numpy().tofile(file)
                file.flush()
                dtype = np.dtype(str(array.dtype).removeprefix("torch."))
                kept = np.memmap(file, dtype, "r", shape=(saved.rows, saved.width))
        return torch.from_numpy(kept[order[start:stop]])

    return read
