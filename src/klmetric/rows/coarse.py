r"""Two rows of which not all classes are known, as two rows of those that are known in both and of one class more.

By the chain rule of KL, with P and Q the masses of the classes of a coarser partition,

.. math:: KL(p \| q) = KL(P \| Q) + \sum_j P_j \, KL(p_{|j} \| q_{|j}) \ge KL(P \| Q)

So whatever is merged, what is left is a lower bound, and it is the divergence itself where p and q are proportional
within what was merged. The same holds for every f-divergence, Jensen-Shannon among them. (Csiszár: Information-type
measures of difference of probability distributions and indirect observations, 1967.)

A class stays single where both sides know it. All others become one class, the tail: 1 less what is known in sum for a
`TopK`; for a row in full the sum of the classes themselves.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from klmetric.options import Format
from klmetric.rows.rest import taken_apart

if TYPE_CHECKING:
    from klmetric.rows.topk import Known, TopK


# How far what known probabilities leave of 1 may be off in float64.
OF_A_SUM = 8 * 2.0**-52


class Coarse(NamedTuple):
    """A pair in the classes that both sides know, and the tail in the last place.

    Attributes:
        p: shape (..., k + 1), in float64, and NaN where a row is no distribution.
        q: likewise.
        formats: of p and of q.
        tail: what p has in the tail; what q has there, if p is in full.
        known: of p, or of q if p is in full.
        agrees: whether p and q have the same most likely class, the first one of equals, among those that are known;
            None where nobody asked.
    """

    p: Tensor
    q: Tensor
    formats: tuple[Format, Format]
    tail: Tensor
    known: "Known"
    agrees: Tensor | None


class _Side(NamedTuple):
    """One side.

    Attributes:
        values: of the single classes, shape (..., k), in its format; of no weight where there is none.
        mass: the probability of the tail, shape (...).
        tail: the same in the format of the values, not normalised; None for that of `mass`.
        rounding: how much of the mass may be rounding.
        format: "probs" or "logits".
        invalid: rows that are no distributions; None for those that show it by themselves.
        likeliest: the most likely class, or -1 where that is none that the other side knows; None where nobody asked.
    """

    values: Tensor
    mass: Tensor
    tail: Tensor | None
    rounding: float
    format: Format
    invalid: Tensor | None
    likeliest: Tensor | None


def coarse(p: "Tensor | TopK", q: "Tensor | TopK", formats: tuple[Format, Format], agrees: bool = False) -> Coarse:
    """Make it.

    Args:
        p: reference.
        q: approximation, of the shape of p; one of the two at least is a `TopK`.
        formats: of p and q, of those that are tensors.
        agrees: whether to find out if the most likely class is the same.
    """
    known_p, known_q = (None if isinstance(x, Tensor) else x.known() for x in (p, q))
    leading = known_p or known_q
    assert leading is not None
    of_p, of_q = (
        _of_full(x, leading, form, agrees) if isinstance(x, Tensor) else _of_top(x, known, leading, other, agrees)
        for x, form, known, other in ((p, formats[0], known_p, known_q), (q, formats[1], known_q, known_p))
    )
    mass_p, mass_q = _settled(of_p, of_q)
    rows = [_row(of_p, mass_p), _row(of_q, mass_q)]
    invalid = torch.stack([side.invalid for side in (of_p, of_q) if side.invalid is not None]).any(0).unsqueeze(-1)
    a, b = (x.masked_fill(invalid, math.nan) for x in rows)
    tail = (mass_q if isinstance(p, Tensor) else mass_p).detach()
    same = None
    if of_p.likeliest is not None and of_q.likeliest is not None:
        same = of_p.likeliest == of_q.likeliest
    return Coarse(a, b, (of_p.format, of_q.format), tail, leading, same)


def _of_full(x: Tensor, known: "Known", input_format: Format, agrees: bool) -> _Side:
    """Rows in full, in the classes that the other side knows."""
    are_probs = input_format == "probs"
    apart = taken_apart(x, known.classes, are_probs, agrees)
    values = torch.where(known.kept, apart.values, 0 if are_probs else -math.inf)
    row = torch.cat([values, apart.others.unsqueeze(-1)], -1).detach()
    mass = (row / row.sum(-1, keepdim=True) if are_probs else row.softmax(-1))[..., -1]
    likeliest = _likeliest(x, known, values.detach(), apart.largest) if agrees else None
    return _Side(values, mass, apart.others, 0.0, "probs" if are_probs else "logits", None, likeliest)


def _likeliest(x: Tensor, known: "Known", values: Tensor, others: Tensor | None) -> Tensor:
    """The most likely class of a row in full; -1 where it is none of the known ones, if the largest other is known."""
    if others is None:
        return x.argmax(-1)
    most, place = values.max(-1, keepdim=True)
    found = torch.where(most.squeeze(-1) > others, known.classes.gather(-1, place).squeeze(-1), -1)
    if (ties := most.squeeze(-1) == others).any():  # of equals the first one counts, wherever it is
        found[ties] = x[ties].argmax(-1)
    return found


def _of_top(x: "TopK", known: "Known | None", leading: "Known", other: "Known | None", agrees: bool) -> _Side:
    """A `TopK` in the classes of `leading` (its own, or the other's) that both sides know."""
    assert known is not None
    nothing = 0.0 if x.input_format == "probs" else -math.inf
    values, mass = known.values, known.tail
    if other is not None:
        mass = mass + torch.where(known.kept & ~_find(known, other)[0], known.probs, 0).sum(-1)
        is_common, place = _find(leading, other if leading is known else known)
        values = values if leading is known else values.gather(-1, place)
        values = torch.where(is_common, values, nothing)
    form: Format = "probs" if x.input_format == "probs" else "logits"
    likeliest = known.classes.gather(-1, known.probs.argmax(-1, keepdim=True)).squeeze(-1) if agrees else None
    return _Side(values, mass, None, x.rounding, form, known.invalid, likeliest)


def _find(known: "Known", other: "Known") -> tuple[Tensor, Tensor]:
    """Which classes the other side knows, too, and at which place."""
    classes = other.classes.contiguous()
    place = torch.searchsorted(classes, known.classes.contiguous()).clamp_max(classes.shape[-1] - 1)
    return known.kept & (classes.gather(-1, place) == known.classes), place


def _settled(p: _Side, q: _Side) -> tuple[Tensor, Tensor]:
    """The masses of the tails, where rounding may have made all that there is of one.

    Then it is taken to be that of the other side, as far as rounding allows: the value stays a lower bound, and is not
    infinite only because one of two tails came out as 0. A larger one goes as far that way as the sum may be off in
    float64: the divergence from a tail next to nothing depends on its last digits.
    """
    is_lost_p, is_lost_q = p.mass <= p.rounding, q.mass <= q.rounding
    mass_p = torch.where(is_lost_p & (p.rounding > 0), q.mass.detach().clamp_max(p.rounding), p.mass)
    mass_q = torch.where(is_lost_q & (q.rounding > 0), p.mass.detach().clamp_max(q.rounding), q.mass)
    if p.rounding and q.rounding:
        both = is_lost_p & is_lost_q
        mass_p, mass_q = torch.where(both, q.mass, mass_p), torch.where(both, q.mass, mass_q)
    if p.rounding:
        mass_p = mass_p + (mass_q - mass_p).detach().clamp(-OF_A_SUM, OF_A_SUM)
    if q.rounding:
        mass_q = mass_q + (mass_p - mass_q).detach().clamp(-OF_A_SUM, OF_A_SUM)
    return mass_p, mass_q


def _row(side: _Side, mass: Tensor) -> Tensor:
    if side.tail is not None:
        tail = side.tail
    elif side.format == "probs":
        tail = mass
    else:  # log(0) has no finite gradient
        tail = torch.where(mass > 0, torch.where(mass > 0, mass, 1).log(), -math.inf)
    return torch.cat([side.values, tail.unsqueeze(-1)], -1)
