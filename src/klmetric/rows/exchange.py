"""What the processes that share rows say to each other: what each has found, and whether all measure the same.

Processes that part, in their rows, their options, or by an error on one of them, would wait for each other, or end by
what the backend says. So a few numbers go before all else, by which everyone finds out.
"""

import math
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from klmetric.options import Options
from klmetric.rows.head import Head
from klmetric.rows.shards import Shards

MARKS = 6


def gather(x: Tensor, group: Any) -> Tensor:
    """One tensor of every process, in their order, in one collective."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group)
    return torch.stack(parts)


def exchange(
    found: Tensor | None, width: int, numbers: int, shards: Shards, options: Options, asks: object, at_once: bool
) -> tuple[Tensor, list[int]]:
    """What all have found, shape (processes, numbers, rows), and how many classes each has.

    Args:
        found: by this process, shape (numbers, rows); None if it could not look, which all learn.
        width: how many classes it has.
        numbers: of each row.
        shards: what it has.
        options: of all.
        asks: what else has to be the same everywhere, by its `repr`.
        at_once: in one collective and not in two. Then processes whose rows lie on two sides of a power of two, for so
            many is there room, find out by an error of the backend.

    Raises:
        ValueError: where not all measure the same, on every process that has found something.
    """
    shape, device = _shape_and_device(shards, options)
    rows = math.prod(shape)
    dtypes = [x.dtype for x in (shards.p, shards.q) if hasattr(x, "dtype")]
    about = crc32(repr((shape, dtypes, options, options.classes, options.ignore_index, asks, at_once)).encode())
    marks = torch.tensor([about, found is not None, width, shards.width, 0, 0], dtype=torch.float64).to(device)
    if found is not None:
        marks[4], marks[5] = _mark(shards.weight, device), _mark(shards.targets, device)
    room = torch.zeros(
        numbers, 1 << max(rows - 1, 0).bit_length() if at_once else 0, dtype=torch.float64, device=device
    )
    if at_once and found is not None:
        room[:, :rows] = found
    gathered = gather(torch.cat([marks, room.flatten()]), shards.group)
    if found is None:  # what is wrong is raised by who calls
        return gathered, []
    widths = _check_marks(gathered[:, :MARKS], shape, options)
    if not at_once:
        return gather(found, shards.group), widths
    return gathered[:, MARKS:].view(-1, *room.shape)[..., :rows], widths


def _check_marks(marks: Tensor, shape: list[int], options: Options) -> list[int]:
    """Raise where processes differ in what has to be the same; and return how many classes each has."""
    same, done, widths, steps, *others = (column.tolist() for column in marks.long().T)
    if failed := [rank for rank, is_done in enumerate(done) if not is_done]:
        raise ValueError(
            "All processes of `class_group` must measure their classes. Got an error on the ranks"
            f" {failed} of the group: see what was raised there."
        )
    named = zip(("rows, and measure with the same options", "weights", "targets"), (same, *others), strict=True)
    for what, column in named:
        if wrong := [rank for rank, mark in enumerate(column) if mark != column[0]]:
            raise ValueError(
                f"All processes of `class_group` must have the same {what}. Got others on the ranks {wrong} of the"
                f" group than on its rank 0. This one has batch shape {tuple(shape)}."
            )
    if options.classes is not None and (len(set(steps)) > 1 or sum(widths) < options.classes):
        raise ValueError(
            "`classes` must be no more than there are, and with `class_group` every process must have as many classes."
            f" Got classes={options.classes} and {steps} classes. Give a DTensor, or leave the padding out of the last."
        )
    return list(widths)


def _shape_and_device(shards: Shards, options: Options) -> tuple[list[int], torch.device]:
    """Of the rows, as far as can be told if there is something wrong."""
    x = next((x for x in (shards.p, shards.q) if isinstance(x, (Tensor, Head))), torch.empty(0, 0))
    dim = options.dim % max(len(x.shape), 1)
    return [size for axis, size in enumerate(x.shape) if axis != dim], x.device


def _mark(x: Tensor | None, device: torch.device) -> Tensor | float:
    """A number that tells tensors apart, without waiting for them; exact in float64."""
    if x is None:
        return 0.0
    bits = (x.double() + 0.0).flatten().view(torch.int64)  # of -0.0 those of 0.0
    mixed = (bits ^ (bits >> 17)) * (2 * torch.arange(len(bits), device=bits.device) + 1)
    return (mixed.sum() & (2**50 - 1)).to(device, torch.float64)
