r"""The arithmetic in plain torch: the KL divergence of each row, on any device.

Written as a Bregman divergence, every term of the sum is non-negative, so nothing cancels and no row can come out
below zero:

.. math:: KL(p \| q) = \sum_c p_c \log\frac{p_c}{q_c} = \sum_c \left( p_c \log\frac{p_c}{q_c} + q_c - p_c \right)

With :math:`u = (q_c - p_c) / p_c` a term is :math:`p_c (u - \log(1 + u))`, the form to take where q is near p.
(Banerjee, Merugu, Dhillon, Ghosh: Clustering with Bregman Divergences, JMLR 6, 2005.) What rounding leaves in the
normalisers of p and q is of no account: there the sum of the terms is at its minimum.

All is done in float64, where u has digits enough for 1e-13 nats whatever the formats of p and q. The kernel
(`klmetric.arithmetic.native`) is faster. This is what can be differentiated, compiled, and run on any device that has
float64; `klmetric.arithmetic.choose` says which of them measures what.

A row that is no pair of distributions gives NaN, and no other row does.
"""

import math
from collections.abc import Iterable, Iterator
from functools import cached_property, reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from klmetric.options import Format, Options

# The divergences that make up a direction: whether that of p from q. (Jensen-Shannon is made of others.)
SWAPPED = {"forward": (False,), "reverse": (True,), "jeffreys": (False, True)}
# Least p to divide by: the gradient has its square. What is lost below it is less than any divergence.
TINY = 1e-100
# Classes that are taken at once: fewer than those from which on torch splits one sum over several threads, in which
# case a row would depend on whether there are other rows to split.
WIDTH = 2**14
# Up to so many classes, rows are turned, so that the classes come one after the other: sums over a short last axis are
# what torch does slowly.
FEW = 4
# Elements that are taken at once: what fits the cache of a processor, so many for each thread; or what keeps an
# accelerator busy. Up to twenty copies of them are alive, of 8 bytes each.
OF_A_THREAD, MOST = 2**15, 2**18


def result_dtype(p: Tensor, q: Tensor) -> torch.dtype:
    """The dtype that the divergences of p and q are given in: the one they promote to, at least float32."""
    if p.dtype is q.dtype is torch.float32:  # as nearly always
        return p.dtype
    return torch.promote_types(torch.promote_types(p.dtype, q.dtype), torch.float32)


@torch.no_grad()
def plain_in_blocks(p: Tensor, q: Tensor, options: "Options") -> Tensor:
    """`plain` without gradients: in bounded memory, and a row has the same bits in any batch."""
    size = min(MOST, OF_A_THREAD * torch.get_num_threads()) if p.device.type == "cpu" else MOST
    rows = max(1, size // min(WIDTH, p.shape[-1]))
    # Many small results would lie between the blocks in memory, and let none of it be used again.
    kl = torch.empty(p.shape[:-1], dtype=torch.float64, device=p.device)
    for a, b, target in blocks(rows, p, q, kl):
        if p.shape[-1] <= FEW:
            target.copy_(plain(a.T.contiguous(), b.T.contiguous(), options, dim=0))
        else:
            target.copy_(plain(a, b, options, WIDTH))
    return kl


def blocks(rows: int, *xs: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """So many rows of each tensor at a time, without a copy: as matrices, and as vectors of those without classes."""
    try:
        views = [x.view(-1, x.shape[-1]) if x.ndim == xs[0].ndim else x.view(-1) for x in xs]
    except RuntimeError:  # the axes before the last are not one in memory
        for each in zip(*xs, strict=True):
            yield from blocks(rows, *each)
    else:
        yield from zip(*(torch.split(x, rows) for x in views), strict=True)


def plain(p: Tensor, q: Tensor, options: "Options", width: int | None = None, dim: int = -1) -> Tensor:
    """KL divergence of each row in float64, by operations that can be differentiated.

    Args:
        p: reference, shape (..., classes).
        q: approximation, of the shape of p.
        options: see `klmetric.kl_divergence`.
        width: how many classes to take at once; None for all.
        dim: the axis of classes, the first or the last.
    """
    a, b = (_Rows(x, f, options, width, dim) for x, f in zip((p, q), options.input_format, strict=True))
    # Rounding can leave a sum of denormal numbers below 0.
    value = _sum(_terms(a, b, options), dim).squeeze(dim).clamp_min(0)
    if options.direction != "jensen_shannon":
        return value
    return value - (value - math.log(2)).clamp_min(0).detach()  # and one of nothing in common above its limit


def _terms(a: "_Rows", b: "_Rows", options: "Options") -> Iterator[Tensor]:
    """What each class adds to the divergence, part by part."""
    for of_p, of_q in zip(a, b, strict=True):
        if options.direction == "jensen_shannon":
            yield jensen_shannon_terms(*a.floored(*of_p), *b.floored(*of_q))
            continue
        for swapped in SWAPPED[options.direction]:
            yield bregman_terms(*of_q, *a.floored(*of_p)) if swapped else bregman_terms(*of_p, *b.floored(*of_q))


def bregman_terms(log_p: Tensor, p: Tensor, log_q: Tensor, q: Tensor) -> Tensor:
    """What each class adds to KL(p‖q), never negative."""
    d = q - p  # exact where q is near p
    near = (d / p.clamp_min(TINY)).clamp_min(-0.5).log1p()
    # A class whose probability is 0 in float64 has none, whatever its logit: so a mask of -1e9 is a mask.
    far = torch.where(p > 0, log_q - log_p, 0)
    return d - p * torch.where(d.abs() < p * 0.5, near, far)


def jensen_shannon_terms(log_p: Tensor, p: Tensor, log_q: Tensor, q: Tensor) -> Tensor:
    """What each class adds to the Jensen-Shannon divergence."""
    both = (p + q).clamp_min(TINY)
    r = (q - p) / both
    log_middle = (both / 2).log()
    # It is (p log(p / m) + q log(q / m)) / 2, where m is the mean of p and q, p / m = 1 - r and q / m = 1 + r.
    near = [x.clamp(-0.5, 0.5).log1p() for x in (-r, r)]
    far = [torch.where(x > 0, log_x - log_middle, 0) for log_x, x in ((log_p, p), (log_q, q))]
    of_p, of_q = (torch.where(r.abs() < 0.5, *each) for each in zip(near, far, strict=True))
    return (p * of_p + q * of_q) / 2


class _Rows:
    """One side: rows of distributions, as logarithms and as probabilities, in parts of their classes."""

    def __init__(self, x: Tensor, input_format: "Format", options: "Options", width: int | None, dim: int) -> None:
        self.parts, self.dim = torch.split(x, width or x.shape[dim], dim), dim
        self.temperature, self.eps = options.temperature, options.eps
        self.are_probs = input_format == "probs"
        self.are_weights = self.are_probs and self.temperature == 1
        # Weights of fewer bits have no sum that overflows float64.
        self.peak = None
        if not self.are_weights or x.dtype is torch.float64:
            self.peak = self._read(x.amax(dim, keepdim=True).detach())
        self.whole = [self._apart(x)] if len(self.parts) == 1 else None
        mass = _sum((x if self.are_weights else x.exp() for x in self._all()), dim)
        # A negative weight has no logarithm to say so.
        self.mass = mass.masked_fill(x.amin(dim, keepdim=True) < 0, math.nan) if self.are_weights else mass.log()

    def _read(self, x: Tensor) -> Tensor:
        return _log(x.double()) if self.are_probs and not self.are_weights else x.double()

    def _apart(self, x: Tensor) -> Tensor:
        """Weights or logarithms apart from the largest.

        So the sum of large weights does not overflow, and a constant in all logits costs no digits.
        """
        x = self._read(x).contiguous()  # the order of a sum depends on how the rows lie in memory
        if self.peak is None:
            return x
        if self.are_weights:
            return x / self.peak
        return x - self.peak if self.temperature == 1 else (x - self.peak) / self.temperature

    def _all(self) -> Iterable[Tensor]:
        return self.whole or map(self._apart, self.parts)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self._normalised, self._all())

    def _normalised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.are_weights:
            p = x / self.mass
            return _log(p), p
        log_p = x - self.mass
        return log_p, log_p.exp()

    @cached_property
    def _floored_mass(self) -> Tensor:
        # 1 to the last bit where the floor changes nothing.
        return 1 + _sum(((self.eps - p).relu() for _, p in self), self.dim)

    def floored(self, log_p: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """A part with the floor under it, normalised again."""
        if not self.eps:
            return log_p, p
        log_p = log_p.clamp_min(math.log(self.eps)) - self._floored_mass.log()
        return log_p, p.clamp_min(self.eps) / self._floored_mass


def _log(x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return x.log()
    # log(0) has no finite gradient: take it of 1 instead, then put -inf in its place. A negative value gives NaN.
    zero = x == 0
    return x.masked_fill(zero, 1).log().masked_fill(zero, -math.inf)


def _sum(parts: Iterable[Tensor], dim: int) -> Tensor:
    if dim == 0:  # one class after the other: `sum` may take rows at the end of a block in another order than others
        return reduce(torch.add, (x for part in parts for x in torch.split(part, 1)))
    return reduce(torch.add, (x.sum(-1, keepdim=True) for x in parts))
