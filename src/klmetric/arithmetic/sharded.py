r"""Rows of whose classes each process has some: what it finds in its own, its share, and what all shares come to.

With P_j and Q_j the masses that p and q have in the classes of process j, and KL_j the divergence within them,

.. math:: KL(p \| q) = KL(P \| Q) + \sum_j P_j \, KL_j

No term is negative, so that nothing cancels between the shares, however near p and q are (the chain rule: Cover and
Thomas, Elements of Information Theory, theorem 2.5.3). It takes one look at the classes. What cannot be merged so,
other divergences and floors under the probabilities, takes a second one, when the masses of the whole rows are known.

All shares are merged in float64 and in their order: every process gets the same bits.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from klmetric.arithmetic import native
from klmetric.arithmetic.plain import (
    MOST,
    OF_A_THREAD,
    SWAPPED,
    WIDTH,
    blocks,
    bregman_terms,
    jensen_shannon_terms,
    plain,
)
from klmetric.arithmetic.statistics import most_likely

if TYPE_CHECKING:
    from klmetric.options import Format, Options

# Numbers of a share: masses (as in `Masses`), the divergence within, and the largest log p of the classes without q.
NUMBERS = 6
NO_MASS = (0.0, 0.0, -math.inf, -math.inf, 0.0, -math.inf)
# The most likely classes that are looked at, in order, and how many a second look finds.
FIRST = native.TOP
RANKED = FIRST[-1]
# Numbers of a look, and of a second one.
LOOK, AGAIN = 2 * NUMBERS + 4, 4 + 4 * RANKED
LEAST_LOG_P = -745.13321910194122  # under which e^x is 0 in float64


class Masses(NamedTuple):
    """What p and q have in each row, in all classes or in some.

    The log mass of p is top_p / T + mass, that of q top_q / T + mass + rest, or top_q / T + rest where p has none. The
    tops are logits of p and q, about the largest: so a constant in all logits, of both or of one, costs no digits.
    """

    top_p: Tensor
    top_q: Tensor
    mass: Tensor
    rest: Tensor

    def swapped(self) -> "Masses":
        """The same with p and q in each other's place."""
        return Masses(self.top_q, self.top_p, self.mass + self.rest, -self.rest)

    def logs(self, temperature: float) -> tuple[Tensor, Tensor]:
        """The log mass of p, and that of q."""
        return self.top_p / temperature + self.mass, self.top_q / temperature + (self.mass + self.rest)


class Whole(NamedTuple):
    """What the first look tells of whole rows.

    Attributes:
        kls: the divergences that make up the direction, each of shape (rows,).
        masses: of p and q.
        leaders: the number of the most likely class of p and of q, shape (2, rows).
    """

    kls: list[Tensor]
    masses: Masses
    leaders: Tensor


def directions_of(options: "Options") -> tuple[bool, ...]:
    """The divergences to look for: whether that of p from q. Of Jensen-Shannon there is the second look."""
    return SWAPPED.get(options.direction, (False,))


# ---- the first look --------------------------------------------------------------------------------------------------
def look(p: Tensor, q: Tensor, options: "Options") -> Tensor:
    """What these classes tell of each row: a share for each direction, and two leaders; shape (16, rows).

    Args:
        p: some classes of the reference, shape (..., classes).
        q: the same classes of the approximation.
        options: see `klmetric.kl_divergence`.
    """
    rows = p.shape[:-1].numel()
    found = torch.zeros(LOOK, rows, dtype=torch.float64, device=p.device)
    for i, swapped in enumerate(directions_of(options)):
        sides, formats = ((q, p), options.input_format[::-1]) if swapped else ((p, q), options.input_format)
        share = _share(*sides, formats, options.temperature)
        found[i * NUMBERS : (i + 1) * NUMBERS] = share[:NUMBERS]
        if not i:
            values, places = share[NUMBERS:].view(2, 2, rows)
            found[2 * NUMBERS :] = torch.cat([values.flip(0), places.flip(0)] if swapped else [values, places])
    return found


def _share(p: Tensor, q: Tensor, formats: "tuple[Format, Format]", temperature: float) -> Tensor:
    """A share, and then the largest values of p and q with their places; shape (10, rows)."""
    if not p.shape[-1]:
        nothing = torch.tensor([*NO_MASS, -math.inf, -math.inf, 0, 0], dtype=torch.float64, device=p.device)
        return nothing.unsqueeze(-1).expand(-1, p.shape[:-1].numel())
    if native.serves(p, q):
        return native.shares(p, q, formats, temperature)
    found = [_plain_share(a, b, formats, temperature) for a, b in blocks(rows_at_once(p), p, q)]
    return torch.cat(found, -1)


def _plain_share(p: Tensor, q: Tensor, formats: "tuple[Format, Format]", temperature: float) -> Tensor:
    from klmetric.options import Options

    a, b = (_logits(x, form) for x, form in zip((p, q), formats, strict=True))
    (peak_a, log_a), (peak_b, log_b) = (_log_mass(x, temperature) for x in (a, b))
    rest = torch.where((log_a == -math.inf) | (log_b == -math.inf), log_b, log_b - log_a)
    # Whether a class without q makes the divergence infinite, only the whole row can tell.
    is_common = b > -math.inf
    edge = torch.where(is_common, -math.inf, a).amax(-1)
    nothing = 0 if formats[0] == "probs" else -math.inf
    kl = plain(torch.where(is_common, p, nothing), q, Options(formats, temperature=temperature), WIDTH)
    # It is NaN where nothing is in common, and then of no account; of what is no distribution, the masses are NaN.
    leaders = [x.max(-1) for x in (p, q)]
    values, places = ([leader[i].double() for leader in leaders] for i in (0, 1))
    return torch.stack([peak_a, peak_b, log_a, rest, kl.nan_to_num(0, math.inf), edge / temperature, *values, *places])


def _log_mass(x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The largest logit of each row, or 0 if it has no class; and the log mass less that."""
    peak = x.amax(-1, keepdim=True)
    peak = torch.where(peak == -math.inf, 0, peak)
    return peak.squeeze(-1), _sum(((x - peak) / temperature).exp()).log()


def together(found: Tensor, first: Sequence[int], options: "Options") -> Whole:
    """What the first looks of all processes come to.

    Args:
        found: by each of them, in the order of their classes, shape (processes, 16, rows).
        first: the number of the first class of each.
        options: as there.
    """
    directions = directions_of(options)
    merged = [_merged(found[:, i * NUMBERS : (i + 1) * NUMBERS], options.temperature) for i in range(len(directions))]
    kls, masses = [kl for kl, _ in merged], merged[0][1]
    values, places = found[:, 2 * NUMBERS :].view(len(found), 2, 2, -1).unbind(1)
    starts = torch.tensor(first, dtype=torch.float64).to(found.device).view(-1, 1, 1)
    leaders = (places + starts).gather(0, values.argmax(0, keepdim=True)).squeeze(0)
    return Whole(kls, masses.swapped() if directions[0] else masses, leaders)


def _merged(shares: Tensor, temperature: float) -> tuple[Tensor, Masses]:
    """The chain rule, for shares of shape (processes, 6, rows)."""
    top_p, top_q, mass, rest, kl, edge = shares.unbind(1)
    mass_q = torch.where(mass == -math.inf, rest, mass + rest)
    # Each is measured from the share in which it has most, so that large constants cost no digits, masks included.
    of_p, of_q = (
        top.gather(0, (top / temperature + x).argmax(0, keepdim=True)) for top, x in ((top_p, mass), (top_q, mass_q))
    )
    a, b = (top_p - of_p) / temperature + mass, (top_q - of_q) / temperature + mass_q
    mass_a, mass_b = _log_sum(a), _log_sum(b)
    log_p, log_q = a - mass_a, b - mass_b
    p = log_p.exp()
    value = added(bregman_terms(log_p, p, log_q, log_q.exp())) + added(torch.where(p == 0, 0, p * kl))
    whole = Masses(of_p.squeeze(0), of_q.squeeze(0), mass_a, mass_b - mass_a)
    is_infinite = edge.amax(0) - whole.logs(temperature)[0] > LEAST_LOG_P
    value = torch.where(is_infinite & ~value.isnan(), math.inf, value.clamp_min(0))
    return torch.where((mass_a == -math.inf) | (mass_b == -math.inf), math.nan, value), whole


def _log_sum(x: Tensor) -> Tensor:
    peak = x.amax(0)
    peak = torch.where(peak == -math.inf, 0, peak)
    return peak + added((x - peak).exp()).log()


def added(x: Tensor) -> Tensor:
    """Over the shares, in their order."""
    return sum(x.unbind(0), start=torch.zeros_like(x[0]))


# ---- the second look -------------------------------------------------------------------------------------------------
class Again(NamedTuple):
    """What a second look finds of whole rows, of shape (rows,); of Jensen-Shannon's numbers without `measures` alone.

    Attributes:
        reverse: KL(q‖p).
        jensen_shannon: the Jensen-Shannon divergence.
        total_variation: half the sum of |p - q|.
        ranked: the numbers of the most likely classes in order, shape (2, rows, RANKED).
    """

    reverse: Tensor
    jensen_shannon: Tensor
    total_variation: Tensor
    ranked: Tensor


def look_again(p: Tensor, q: Tensor, options: "Options", masses: Masses) -> Tensor:
    """Of each row, three sums and the most likely classes, with their values; shape (4 + 4 * RANKED, rows)."""
    rows = p.shape[:-1].numel()
    if not p.shape[-1]:
        found = torch.full((AGAIN, rows), -math.inf, dtype=torch.float64, device=p.device)
        found[:3] = 0
        return found
    if native.serves(p, q):
        return native.second_shares(p, q, options.input_format, options.temperature, masses)
    parts = []
    for a, b, *numbers in blocks(rows_at_once(p), p, q, *(x.view(p.shape[:-1]) for x in masses)):
        (log_p, p_at), (log_q, q_at) = normalised(a, b, options, Masses(*numbers))
        sums = (
            bregman_terms(log_q, q_at, log_p, p_at),
            jensen_shannon_terms(log_p, p_at, log_q, q_at),
            (q_at - p_at).abs() / 2,
        )
        ranked = [most_likely(x, min(RANKED, x.shape[-1])) for x in (a, b)]
        values = [_padded(x.gather(-1, places)) for x, places in zip((a, b), ranked, strict=True)]
        never = torch.full_like(log_p[:, :1], -math.inf)  # its sums are infinite where they must be
        parts.append(torch.cat([*(_sum(x).unsqueeze(-1) for x in sums), never, *values, *map(_padded, ranked)], -1).T)
    return torch.cat(parts, -1)


def _padded(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x.double(), (0, RANKED - x.shape[-1]), value=-math.inf)


def together_again(found: Tensor, first: Sequence[int], options: "Options", whole: Whole) -> Again:
    """What the second looks of all processes come to; found by each, shape (processes, 4 + 4 * RANKED, rows)."""
    is_invalid = whole.kls[0].isnan()
    reverse, jensen_shannon, total_variation = (added(found[:, i]).masked_fill(is_invalid, math.nan) for i in range(3))
    log_mass_q = whole.masses.logs(options.temperature)[1]
    reverse = torch.where(found[:, 3].amax(0) - log_mass_q > LEAST_LOG_P, math.inf, reverse)
    starts = torch.tensor(first, dtype=torch.float64).to(found.device).view(-1, 1, 1, 1)
    values, places = found[:, 4:].view(len(found), 2, 2, RANKED, -1).unbind(1)
    places = torch.where(places < 0, -1, places + starts)
    # Of equals the first one comes first: the shares are in order, and so are the places in each. What is no class, but
    # fills up a share of few, comes last.
    values, places = (x.permute(1, 3, 0, 2).flatten(-2).flatten(0, 1) for x in (values, places))
    order = (places < 0).to(torch.int8).argsort(dim=-1, stable=True)
    values, places = values.gather(-1, order), places.gather(-1, order)
    ranked = places.gather(-1, most_likely(values, RANKED)).view(2, -1, RANKED)
    return Again(reverse.clamp_min(0), jensen_shannon.clamp(0, math.log(2)), total_variation.clamp(0, 1), ranked)


def floored(p: Tensor, q: Tensor, options: "Options", masses: Masses) -> Tensor:
    """With the floor `eps`: of each row and direction, the terms, and what the floor adds to the sum; (2 n, rows)."""
    directions, eps = directions_of(options), options.eps
    if not p.shape[-1]:
        return torch.zeros(2 * len(directions), p.shape[:-1].numel(), dtype=torch.float64, device=p.device)
    parts = []
    for a, b, *numbers in blocks(rows_at_once(p), p, q, *(x.view(p.shape[:-1]) for x in masses)):
        sides, sums = normalised(a, b, options, Masses(*numbers)), []
        for swapped in directions:
            (log_p, p_at), (log_q, q_at) = sides[::-1] if swapped else sides
            terms = bregman_terms(log_p, p_at, log_q.clamp_min(math.log(eps)), q_at.clamp_min(eps))
            sums += [_sum(terms), _sum((eps - q_at).relu())]
        parts.append(torch.stack(sums))
    return torch.cat(parts, -1)


def floored_together(found: Tensor) -> list[Tensor]:
    """The divergences of whole rows in each direction; found by each, shape (processes, 2 n, rows).

    The terms are those of q with the floor, whose sum is 1 + x: normalised, it is log(1 + x) - x that is missing.
    """
    sums = added(found).unbind(0)
    return [(terms - (x - x.log1p())).clamp_min(0) for terms, x in zip(sums[::2], sums[1::2], strict=True)]


def normalised(
    p: Tensor, q: Tensor, options: "Options", masses: Masses
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Of p and of q, shape (rows, classes), the logarithms of the probabilities, and these."""
    top_p, top_q, mass, rest = (x.unsqueeze(-1) for x in masses)
    x, y = (_logits(side, form) for side, form in zip((p, q), options.input_format, strict=True))
    log_p = (x - top_p) / options.temperature - mass
    log_q = (y - top_q) / options.temperature - (mass + rest)
    return (log_p, log_p.exp()), (log_q, log_q.exp())


def rows_at_once(x: Tensor) -> int:
    """How many rows to take at once."""
    size = min(MOST, OF_A_THREAD * torch.get_num_threads()) if x.is_cpu else MOST
    return max(1, size // x.shape[-1])


def _logits(x: Tensor, input_format: "Format") -> Tensor:
    # In float64 the logarithms of probabilities keep enough digits for near-equal rows. Of negative ones they are NaN.
    x = x.double().contiguous()
    return x.log() if input_format == "probs" else x


def _sum(x: Tensor) -> Tensor:
    """Over the classes, in an order that depends on the row alone."""
    return torch.stack([part.sum(-1) for part in torch.split(x, WIDTH, -1)]).sum(0)
