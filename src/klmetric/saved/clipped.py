r"""Log-probabilities that a file has clipped: what is known of them, and the least divergence that this allows.

Of the classes below the edge of a row a file says nothing, but that none of them is above the edge, and that with the
others they add up to 1. The divergence is a lower bound if they are taken to be as near to the other row as that
allows. Among all p_c of one sum R and below one edge e, those with

.. math:: p_c = \min(e, \lambda q_c), \qquad \sum_c p_c = R

are nearest, in either direction (the divergence is convex in p, and its derivatives by p_c agree where p_c / q_c does).
Where the edge is not in the way this makes them one class: KL within them is 0. (The chain rule of KL.)

What the others leave of 1 is known to their rounding alone, which is not small beside what is left. So R is an
interval, and of it, too, the nearest is taken: what rounding makes of the rest is no divergence.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# What a row's step and edge, saved in float32, and float32 in reading them, put into every log-probability of it, in
# units of the edge.
OFFSET = 2.0**-22
# Stands for 0 where something is divided by it.
TINY = 1e-300
# To which the sum of the clipped classes is met.
PRECISION = 1e-9


@dataclass(frozen=True)
class Rest:
    """The clipped classes of some rows.

    Attributes:
        is_clipped: which they are, shape (rows, classes).
        least: what they add up to at least, shape (rows, 1), in float64.
        most: and at most.
        likely: and as the others have it.
        edge: logarithm of what each of them is at most, likewise.
    """

    is_clipped: Tensor
    least: Tensor
    most: Tensor
    likely: Tensor
    edge: Tensor


def rest_of(x: Tensor, grid: Tensor, classes: int | None) -> Rest | None:
    """What is known of the clipped classes; None where there are none.

    Args:
        x: log-probabilities of all classes, shape (rows, classes), -inf for those that were clipped.
        grid: of each row, the step that the others are rounded to and the edge, shape (rows, 2).
        classes: how many of the first classes are asked about; None for all.
    """
    is_clipped = x == -math.inf
    if not bool(is_clipped.any()):
        return None
    step, edge = grid[:, :1], grid[:, 1:]
    known, largest = x.exp().sum(-1, keepdim=True, dtype=torch.float64), x.amax(-1, keepdim=True).double().exp()
    # The largest is at the end of the grid, and is not rounded.
    doubt = torch.expm1(step / 2) * (known - largest).clamp_min(0) + OFFSET * edge.abs() * known
    edge = edge + step / 2
    kept = is_clipped[:, :classes]
    count = kept.sum(-1, keepdim=True)
    elsewhere = (is_clipped.sum(-1, keepdim=True) - count) * edge.exp()
    rest = (1 - known).clamp_min(0)
    most = torch.minimum(rest + doubt, count * edge.exp())
    least = torch.minimum((rest - doubt - elsewhere).clamp_min(0), most)
    return Rest(kept, least, most, rest.clamp(least, most), edge)


def nearest(p: Tensor, q: Tensor, rest_of_p: Rest | None, rest_of_q: Rest | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities with clipped classes as near to those of the other as what is known of them allows.

    Args:
        p: logits or log-probabilities of the first, shape (rows, classes).
        q: those of the second.
        rest_of_p: what is known of the clipped classes of p, which must be log-probabilities then.
        rest_of_q: likewise.
    """
    if rest_of_p is None or rest_of_q is None:
        return (
            p if rest_of_p is None else _filled(p, rest_of_p, q),
            q if rest_of_q is None else _filled(q, rest_of_q, p),
        )
    # Each in turn comes nearer to the other. Of the classes that both have clipped all are alike.
    count = rest_of_p.is_clipped.sum(-1, keepdim=True)
    first = torch.where(rest_of_p.is_clipped, (rest_of_p.likely / count).log().to(p.dtype), p)
    second = _filled(q, rest_of_q, first)
    first = _filled(p, rest_of_p, second)
    return first, _filled(q, rest_of_q, first)


def _filled(x: Tensor, rest: Rest, other: Tensor) -> Tensor:
    """`x` with its clipped classes in proportion to `other`, but for the edge."""
    other = other.to(torch.promote_types(x.dtype, other.dtype))
    other = other - other.amax(-1, keepdim=True)
    mass = other.double().exp()
    clipped = mass.masked_fill(~rest.is_clipped, 0)
    edge = rest.edge.exp()

    def total(scale: Tensor) -> Tensor:
        return torch.minimum(clipped * scale, edge).sum(-1, keepdim=True)

    # At the scale of the classes that are known, if the sum may be what it is then.
    known = x.exp().sum(-1, keepdim=True, dtype=torch.float64).clamp_min(TINY)
    scale = known / (mass - clipped).sum(-1, keepdim=True).clamp_min(TINY)
    alike = total(scale)
    wanted = torch.minimum(torch.maximum(alike, rest.least), rest.most)
    scale = torch.where(wanted == alike, scale, wanted / clipped.sum(-1, keepdim=True).clamp_min(TINY))
    while True:  # Newton's method from below: the sum is concave in the scale, of straight pieces
        missing = wanted - total(scale)
        slope = clipped.masked_fill(clipped * scale >= edge, 0).sum(-1, keepdim=True)
        is_short = (missing > PRECISION * wanted) & (slope > TINY)
        if not bool(is_short.any()):
            break
        scale = torch.where(is_short, (scale + missing / slope).clamp_max(1 / TINY), scale)
    filled = torch.minimum(other + scale.log(), rest.edge)
    # All are at the edge where the other has anything; what is missing must be where it has nothing.
    is_empty = rest.is_clipped & (mass == 0) & (missing > PRECISION * wanted)
    even = (missing.clamp_min(TINY) / is_empty.sum(-1, keepdim=True)).log()
    filled = torch.where(is_empty, even, filled)
    return torch.where(rest.is_clipped, filled.to(other.dtype), x)
