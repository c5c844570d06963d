r"""Rows of whose classes each process has some: what it finds in its own, and what all that was found comes to.

It takes two rounds. In the first one, every process finds the largest value of each row and the sum of the exponentials
below it, for p and for q. What all have found gives the normalisers. In the second one, each adds up the terms of its
classes, of the normalised probabilities:

.. math:: KL(p \| q) = \sum_j \sum_{c \in j} \left( p_c \log\frac{p_c}{q_c} + q_c - p_c \right)

No term is negative (`klmetric.arithmetic.plain`), so that nothing cancels between the shards j either. All is in
float64, and what came from the shards is added up in their order: every process gets the same bits.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from klmetric.arithmetic.plain import MOST, OF_A_THREAD, SWAPPED, WIDTH, blocks, bregman_terms, jensen_shannon_terms
from klmetric.arithmetic.statistics import Statistics, most_likely

if TYPE_CHECKING:
    from klmetric.options import Format, Options

# What each class adds, of log p, p, log q and q.
TERMS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "forward": bregman_terms,
    "reverse": lambda log_p, p, log_q, q: bregman_terms(log_q, q, log_p, p),
    "jensen_shannon": jensen_shannon_terms,
    "total_variation": lambda log_p, p, log_q, q: (q - p).abs() / 2,
}


class Whole(NamedTuple):
    """What is known of each row as a whole, after the first round; of p and of q, shape (2, rows).

    Attributes:
        peak: the largest logit.
        log_mass: logarithm of the sum of the exponentials below it, at the temperature.
        top: the numbers of the most likely classes in order, shape (2, rows, k).
    """

    peak: Tensor
    log_mass: Tensor
    top: Tensor


def look(p: Tensor, q: Tensor, options: "Options", k: int) -> Tensor:
    """The first round: of each row, for p and then for q, a sum, k values and k places; shape (2 (1 + 2k), rows).

    Args:
        p: some classes of the reference, at least one, shape (..., classes).
        q: the same classes of the approximation.
        options: see `klmetric.kl_divergence`.
        k: how many of the most likely classes to find.
    """
    found = [
        [x for side in zip(sides, options.input_format, strict=True) for x in _look(*side, options, k)]
        for sides in blocks(_rows_at_once(p), p, q)
    ]
    return torch.stack([torch.cat(column) for column in zip(*found, strict=True)])


def _look(x: Tensor, input_format: "Format", options: "Options", k: int) -> list[Tensor]:
    a = _logits(x, input_format)
    peak = a.amax(-1, keepdim=True)
    # Of no class that counts, there is no largest; and the sum is 0.
    mass = _sum(((a - torch.where(peak == -math.inf, 0, peak)) / options.temperature).exp())
    n = min(k, x.shape[-1])
    places = x.argmax(-1, keepdim=True) if n == 1 else most_likely(x, n)
    values = torch.nn.functional.pad(x.gather(-1, places).double(), (0, k - n), value=-math.inf)
    places = torch.nn.functional.pad(places, (0, k - n), value=-1)
    return [mass, *values.unbind(-1), *places.double().unbind(-1)]


def look_together(found: Tensor, first: Sequence[int], options: "Options") -> Whole:
    """What the first rounds of all shards come to.

    Args:
        found: by each of them, in the order of their classes, shape (shards, 2 (1 + 2k), rows).
        first: the number of the first class of each.
        options: as there.
    """
    shards, n, rows = found.shape
    k = (n // 2 - 1) // 2
    mass, values, places = torch.split(found.view(shards, 2, 1 + 2 * k, rows), [1, k, k], 2)
    starts = torch.tensor(first, dtype=torch.float64).to(found.device).view(-1, 1, 1, 1)
    places = torch.where(places < 0, -1, places + starts)
    peaks = torch.stack([_logits(values[:, i, 0], form) for i, form in enumerate(options.input_format)], 1)
    peak = peaks.amax(0)
    parts = mass.squeeze(2) * ((peaks - peak) / options.temperature).exp()
    total = sum(parts.unbind(0), start=torch.zeros_like(peak))
    # Of equals the first one comes first: the shards are in order, and so are the places in each.
    values, places = (x.permute(1, 3, 0, 2).reshape(2 * rows, shards * k) for x in (values, places))
    best = values.argmax(-1, keepdim=True) if k == 1 else most_likely(values, k)
    return Whole(peak, total.log(), places.gather(-1, best).view(2, rows, k))


def terms(p: Tensor, q: Tensor, options: "Options", whole: Whole, names: Sequence[str]) -> Tensor:
    """The second round: of each row, what these classes add to its sums by these names of `TERMS`."""
    size, of_rows = p.shape[:-1], torch.stack([*whole.peak, *whole.log_mass])
    sums = []
    for a, b, *numbers in blocks(_rows_at_once(p), p, q, *(x.view(size) for x in of_rows)):
        sides = []
        for x, form, peak, log_mass in zip((a, b), options.input_format, numbers[:2], numbers[2:], strict=True):
            log = (_logits(x, form) - peak.unsqueeze(-1)) / options.temperature - log_mass.unsqueeze(-1)
            sides += [log, log.exp()]
        sums.append(torch.stack([_sum(TERMS[name](*sides)) for name in names]))
    return torch.cat(sums, -1)


def terms_together(found: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """What the second rounds of all shards come to, by name; found by each, shape (shards, names, rows)."""
    sums = sum(found.unbind(0), start=torch.zeros_like(found[0]))
    most = {"jensen_shannon": math.log(2), "total_variation": 1.0}
    # Rounding can leave a sum below 0, and above what it can be.
    return {name: _clamp(x, most.get(name)) for name, x in zip(names, sums, strict=True)}


def _clamp(x: Tensor, most: float | None) -> Tensor:
    return x.clamp(0, most)


def divergence(sums: dict[str, Tensor], direction: str) -> Tensor:
    """Of each row, in a direction, of the sums that `names_for` names."""
    if direction == "jensen_shannon":
        return sums["jensen_shannon"]
    forward, *both = [sums["reverse" if swapped else "forward"] for swapped in SWAPPED[direction]]
    return forward + both[0] if both else forward


def names_for(direction: str, measures: bool) -> list[str]:
    """The sums that a direction takes, and the other measures of a row."""
    swapped = () if direction == "jensen_shannon" else SWAPPED[direction]
    wanted = {"reverse" if x else "forward" for x in swapped} or {"jensen_shannon"}
    return [name for name in TERMS if name in wanted or (measures and name != "forward")]


def statistics_of(
    sums: dict[str, Tensor], whole: Whole, kl: Tensor, temperature: float, ks: Sequence[int]
) -> Statistics:
    """The same as `klmetric.arithmetic.statistics`, of rows as a whole; what was not asked for is NaN."""
    same = (whole.top[0] == whole.top[1]).cumprod(-1).bool() & ~kl.isnan().unsqueeze(-1)
    masses = whole.peak / temperature + whole.log_mass
    unknown = torch.full_like(kl, math.nan)
    others = (sums.get(name, unknown) for name in ("reverse", "jensen_shannon", "total_variation"))
    agree = torch.stack([same[:, k - 1] for k in ks], -1)
    return Statistics._make([kl, *others, *masses, (-whole.log_mass[0]).exp(), agree])


def _rows_at_once(x: Tensor) -> int:
    size = min(MOST, OF_A_THREAD * torch.get_num_threads()) if x.is_cpu else MOST
    return max(1, size // x.shape[-1])


def _logits(x: Tensor, input_format: "Format") -> Tensor:
    # In float64 the logarithms of probabilities keep enough digits for near-equal rows. Of negative ones they are NaN.
    x = x.double()
    return x.log() if input_format == "probs" else x


def _sum(x: Tensor) -> Tensor:
    """Over the classes, in an order that depends on the row alone."""
    return torch.stack([part.sum(-1) for part in torch.split(x, WIDTH, -1)]).sum(0)
