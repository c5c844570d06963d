"""Tensors of any number of axes as matrices of rows and classes."""

from collections.abc import Iterator

from torch import Tensor


def matrices_of(*xs: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors with an axis of classes as matrices of (rows, classes), the others as vectors, without a copy."""
    try:
        yield tuple(x.view(-1, x.shape[-1]) if x.ndim == xs[0].ndim else x.view(-1) for x in xs)
    except RuntimeError:  # the axes before the last are not one in memory
        for each in zip(*xs, strict=True):
            yield from matrices_of(*each)
