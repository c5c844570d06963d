r"""The largest divergence that a top-k p allows, with q in full.

Of p are known its kept classes, the mass t of the others, and that none of these has more than the smallest of the k
likeliest, c. Such tails are the polytope {each from 0 to c, their sum t}. KL(p‖q) is convex in p, so it is largest at a
vertex, where all but one class have 0 or c: m = floor(t / c) of them have c, and one has what is left. The sum of
p log p is the same at every vertex, so the largest is the one that makes -Σ p log q largest: the mass lies where q is
smallest, the larger part on the smaller q. By the chain rule

.. math:: KL(p \| q) \le KL(P \| Q) + t \, KL(v \| q_{|tail})

with P, Q the pair of `klmetric.rows.coarse` and v that vertex, divided by t.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from klmetric.arithmetic.plain import MOST, blocks
from klmetric.arithmetic.tracing import may_look

if TYPE_CHECKING:
    from klmetric.rows.coarse import Coarse
    from klmetric.rows.topk import TopK


@torch.no_grad()
def at_most(p: "TopK", q: Tensor, pair: "Coarse", kl: Tensor) -> Tensor:
    """The bound for each row, in float64; infinite where the known classes cannot be the likeliest.

    Args:
        p: reference.
        q: approximation, in full, shape (..., classes).
        pair: both in the classes that are known, and the tail.
        kl: the divergence of the pair.
    """
    known, are_probs = pair.known, pair.formats[1] == "probs"
    log_q = pair.q.log() if are_probs else pair.q
    log_tail_q = log_q[..., -1]
    room = p.classes - known.kept.sum(-1)
    # A tail that may be rounding alone is anything up to that; the divergence is convex in it, so largest at an end.
    is_lost = known.tail <= p.rounding
    tail = torch.where(room > 0, torch.where(is_lost, p.rounding, pair.tail), 0)
    unseen = torch.where(is_lost, (tail.log() - (log_tail_q - log_q.logsumexp(-1))).abs(), 0)
    cap = torch.where(known.kept & ~known.drawn, known.probs, math.inf).amin(-1).clamp_max(1)
    is_possible = tail <= room * cap + p.rounding
    # Where rounding has left more than the classes can hold, they hold it in equal shares.
    share = (torch.maximum(cap, tail / room.clamp_min(1)) / tail).clamp_max(1)  # of the tail, in a full class
    full = (1 / share).floor().nan_to_num(0).clamp_max(room).long()
    rest = torch.where(full < room, (1 - full * share).clamp_min(0), 0)
    rows = max(1, MOST // p.classes)
    parts = [_logs(a, i, n, are_probs) for a, i, n in blocks(rows, q, known.classes, full)]
    log_full, log_rest = (x.view(full.shape) for x in torch.cat([*parts, log_q.new_zeros(0, 2)]).unbind(-1))
    within = torch.xlogy(full * share, share) + share * (full * log_tail_q - log_full)
    within = within + torch.where(rest > 0, torch.xlogy(rest, rest) + rest * (log_tail_q - log_rest), 0)
    more = torch.where(log_tail_q > -math.inf, tail * (within.clamp_min(0) + unseen), math.inf)
    more = torch.where((tail > 0) & (kl < math.inf), more, 0)
    return torch.where(is_possible | kl.isnan(), kl + more, math.inf)


def _logs(q: Tensor, index: Tensor, full: Tensor, are_probs: bool) -> Tensor:
    """The sum of log q over so many of the smallest of the other classes, and log q of the next; shape (rows, 2)."""
    classes = q.shape[-1]
    others = torch.nn.functional.pad(q, (0, 1)).scatter(-1, index, math.inf)[:, :classes]
    if q.is_cpu and may_look(full) and full.numel():
        smallest = others.topk(min(int(full.max()) + 1, classes), -1, largest=False).values
    else:  # whose order does not have to wait for the device to say how many there are
        smallest = others.sort(-1).values
    logs = smallest.double().log() if are_probs else smallest.double()
    # Added one after the other, so that the sum of a row is the same however many there are for others.
    sums, full = torch.nn.functional.pad(logs.cumsum(-1), (1, 0)), full.unsqueeze(-1)
    return torch.cat([sums.gather(-1, full), torch.nn.functional.pad(logs, (0, 1)).gather(-1, full)], -1)
