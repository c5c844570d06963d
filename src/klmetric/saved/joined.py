"""Arrays of one or more files as one: in which order, what a sample is, and the rows of one after the other."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from klmetric.saved.array import Array, Saved
from klmetric.saved.errors import InputError
from klmetric.saved.names import listed, natural
from klmetric.saved.topk import widened


def in_order(parts: list[Saved]) -> list[Saved]:
    """By the numbers of the arrays, over all files; or file by file, where each file begins anew."""
    of_files: dict[tuple[int, int], list[str]] = {}
    for part in parts:
        device, number, name = part.arrays[0]
        of_files.setdefault((device, number), []).append(name)
    longest = max(of_files.values(), key=len)
    if all(names == longest[: len(names)] for names in of_files.values()):
        return parts
    keys = [natural(part.arrays[0][2]) for part in parts]
    order = sorted(range(len(parts)), key=keys.__getitem__)
    is_clear = len({tuple(text for _, text in key) for key in keys}) == 1 or order == sorted(order)
    if not is_clear or len({tuple(key) for key in keys}) < len(keys):
        raise InputError(
            "Arrays of several files must have numbers that run on over the files, or begin anew in each. Got"
            f" {listed(part.name for part in parts)}. Choose some with --key, or save them under other names."
        )
    return [parts[k] for k in order]


def joined(parts: list[Saved], documents: bool | None) -> Saved:
    """Arrays of the same kind of rows as one."""
    for part in parts:
        if not part.shape:
            raise InputError(f"An array must have an axis. Got a single number in {part.name}.")
    parts = widened(parts)
    first = parts[0]
    for part in parts:
        # Of three axes, the second may differ: samples of so many positions each.
        alike = [(len(x.shape), x.shape[1:] if len(x.shape) != 3 else x.shape[2:], x.dtype) for x in (part, first)]
        if alike[0] != alike[1]:
            raise InputError(
                "Shards must have rows of the same shape and dtype. Got"
                f" {first.name} {first.shape} {first.dtype} and {part.name} {part.shape} {part.dtype}."
            )
    if len(first.shape) == 2 and documents is None:
        _check_rows_are_samples(parts)
    if len(first.shape) == 2 and documents:
        if first.ids is not None:
            raise InputError(f"--id must name rows, which --documents makes parts of a sample. Got both, {first.name}.")
        parts = [replace(part, shape=(1, *part.shape)) for part in parts]
        first = parts[0]
    if len(parts) == 1:
        return first
    starts = None
    samples = sum(part.shape[0] for part in parts)
    if len({part.shape[1:] for part in parts}) > 1 or any(part.starts is not None for part in parts):
        lengths = np.concatenate([part.lengths(0, part.shape[0]).numpy() for part in parts])
        if empty := [part.name for part in parts if not part.rows]:
            raise InputError(f"Every document must have rows. Got {empty[0]} with none. Leave it out, on both sides.")
        starts = np.concatenate([[0], lengths.cumsum()])
        first = replace(first, shape=(samples, int(lengths.max()), first.width))
    ends = list(accumulate(part.rows for part in parts))

    def read(start: int, stop: int) -> Tensor:
        return torch.cat([part.read(a, b) for part, a, b in _stretches(parts, ends, start, stop)])

    def indices(start: int, stop: int) -> Tensor:
        stretches = _stretches(parts, ends, start, stop)
        return torch.cat([part.indices.read(a, b) for part, a, b in stretches if part.indices])

    def grid(start: int, stop: int) -> Tensor:
        return torch.cat([part.grid(a, b) for part, a, b in _stretches(parts, ends, start, stop) if part.grid])

    return replace(
        first,
        shape=(samples, *first.shape[1:]),
        read=read,
        others={name: partial(_others, name, parts) for name in first.others if all(name in p.others for p in parts)},
        ids=_one_after_the_other([part.ids for part in parts]),
        tokens=_one_after_the_other([part.tokens for part in parts]),
        targets=_one_after_the_other([part.targets for part in parts]),
        grid=None if first.grid is None else grid,
        starts=starts,
        arrays=tuple(array for part in parts for array in part.arrays),
        indices=None if first.indices is None else replace(first.indices, read=indices),
    )


def _one_after_the_other(arrays: list[Array | None]) -> Array | None:
    """All of them, if every part has one."""
    there = [array for array in arrays if array is not None]
    return np.concatenate(there) if len(there) == len(arrays) else None


def _check_rows_are_samples(parts: list[Saved]) -> None:
    """Ask where arrays in one file look like documents: shards are of one length, but for the last."""
    files = {part.arrays[0][:2] for part in parts}
    other = next((part for part in parts[1:-1] if part.rows != parts[0].rows), parts[-1])
    if len(files) < len(parts) and (other is not parts[-1] or other.rows > parts[0].rows):
        raise InputError(
            f"It must be clear what a sample is. Got arrays of different lengths, {parts[0].name} {parts[0].shape} and"
            f" {other.name} {other.shape}. If each of them is one sample, as a document of tokens, say --documents;"
            " if each row is, --no-documents."
        )


def _others(name: str, parts: list[Saved]) -> Array:
    return np.concatenate([part.others[name]() for part in parts])


def _stretches(parts: list[Saved], ends: list[int], start: int, stop: int) -> Iterator[tuple[Saved, int, int]]:
    """The parts that rows from `start` to `stop` are in, and the rows of each."""
    for part, end in list(zip(parts, ends, strict=True))[bisect_right(ends, start) :]:
        begin = end - part.rows
        if begin >= stop:
            return
        if part.rows:
            yield part, max(start, begin) - begin, min(stop, end) - begin
