r"""What is known of each row besides its divergence KL(p‖q): other divergences, log-masses, and what is most likely.

With t = log(q / p) of a class, of the normalised probabilities, M = (p + q) / 2 and r = (q - p) / (q + p), which is
tanh(t / 2), no term of these sums is negative, so nothing cancels between near-equal rows:

.. math::
    KL(q \| p) &= \sum_c q_c \, (e^{-t_c} - 1 + t_c) \\
    JS(p, q) &= \frac{1}{2} \sum_c M_c \left( (1 + r_c) \log(1 + r_c) + (1 - r_c) \log(1 - r_c) \right) \\
    TV(p, q) &= \sum_c M_c \, |r_c|

The first is the Bregman form of `klmetric.arithmetic.plain` for the other direction. The second is half of KL(p‖M) and
half of KL(q‖M), class by class. (Lin: Divergence measures based on the Shannon entropy, IEEE Transactions on
Information Theory 37, 1991.)
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from klmetric.arithmetic import native
from klmetric.arithmetic.plain import MOST, blocks, plain_in_blocks
from klmetric.options import Format, Options

# Elements of rows that are taken at once, and of a sum: see `klmetric.arithmetic.plain.WIDTH`.
BLOCK = 2**14
# Within this distance of t = 0 the forms above are taken; beyond it the plain ones, which no longer cancel.
NEAR = 0.5
# Of the series for r near 0: |r| is below tanh(NEAR / 2), a quarter.
TERMS = 12


class Statistics(NamedTuple):
    """Of each row, in the batch shape (...); float64, and NaN where a row is no pair of distributions.

    Attributes:
        kl: KL(p‖q) in nats, as `klmetric.rows.measure` has it.
        reverse: KL(q‖p) in nats.
        jensen_shannon: the mean of KL(p‖M) and KL(q‖M), M = (p + q)/2, in nats; at most log 2.
        total_variation: half the sum of |p - q|; at most 1.
        log_mass_p: logarithm of the sum of p as it stands, its exponentials at this temperature for logits and
            log-probabilities: what to subtract from one of them, divided by the temperature, for its log-probability.
            It is within 1e-6 of what it is, and 1e-13 where p or q is float64.
        log_mass_q: likewise.
        confidence: the largest probability of p.
        agree: bool, shape (..., len(ks)): whether the k most likely classes are the same, in the same order; of equally
            likely ones the first comes first. Where there are fewer than k classes, whether all are in the same order.
    """

    kl: Tensor
    reverse: Tensor
    jensen_shannon: Tensor
    total_variation: Tensor
    log_mass_p: Tensor
    log_mass_q: Tensor
    confidence: Tensor
    agree: Tensor


def statistics(
    p: Tensor,
    q: Tensor,
    formats: tuple[Format, Format],
    temperature: float = 1.0,
    ks: Sequence[int] = (1, 5, 10),
    measures: bool = True,
    kl: Tensor | None = None,
) -> Statistics:
    """What is known of each row, without gradients.

    Args:
        p: reference, shape (..., classes).
        q: approximation, of the shape of p.
        formats: "probs", "log_probs" or "logits", of p and of q.
        temperature: divides logits and log-probabilities of both; probabilities go to the power 1/temperature.
        ks: numbers of most likely classes.
        measures: False for what comes with the divergence alone, in its time: the log-masses, the confidence, and which
            rows agree in the most likely class. The others may be NaN and False then.
        kl: the divergences, if they are known already.
    """
    if native.serves(p, q) and tuple(ks) == native.TOP[: len(ks)]:
        of_rows, same = native.statistics(p, q, formats, temperature, measures)
        return Statistics._make([*of_rows, same[..., : len(ks)]])
    # Made at once: many small results would lie between the blocks in memory, and let none of it be used again.
    shape = p.shape[:-1]
    numbers = [torch.empty(shape, dtype=torch.float64, device=p.device) for _ in Statistics._fields[1:-1]]
    agree = torch.empty(len(ks), *shape, dtype=torch.bool, device=p.device)
    for x, y, *targets in blocks(max(1, (BLOCK if p.is_cpu else MOST) // p.shape[-1]), p, q, *numbers, *agree):
        found = _of_block(_logits(x, formats[0]), _logits(y, formats[1]), temperature)
        same = _same_order(x, y, ks) & ~found[0].isnan().unsqueeze(-1)
        for target, value in zip(targets, (*found, *same.unbind(-1)), strict=True):
            target.copy_(value)
    kl = plain_in_blocks(p, q, Options(formats, temperature=temperature)) if kl is None else kl
    return Statistics._make([kl, *numbers, agree.movedim(0, -1)])


def _logits(x: Tensor, input_format: str) -> Tensor:
    # In float64 the logarithms of probabilities keep enough digits for near-equal rows. Of negative ones they are NaN.
    x = x.double().contiguous()
    return x.log() if input_format == "probs" else x


def _of_block(a: Tensor, b: Tensor, temperature: float) -> tuple[Tensor, ...]:
    peak_a, peak_b = (x.amax(-1, keepdim=True) for x in (a, b))
    log_w, log_v = (a - peak_a) / temperature, (b - peak_b) / temperature
    w, v = log_w.exp(), log_v.exp()
    total_p, total_q = _sum(w), _sum(v)
    p, q = w / total_p, v / total_q
    # The difference of the logits comes first: between near-equal models it is exact.
    offset = peak_b - peak_a
    d = torch.where(offset.abs() < 1, ((b - a) - offset) / temperature, log_v - log_w)
    t = d - (total_q / total_p).log()
    t = torch.where((a == -math.inf) & (b == -math.inf), 0, t)
    # As an argument of KL(q‖p), a class has no mass if its probability is 0 in float64.
    near = t.abs() < NEAR
    t_near, t_far = torch.where(near, t, 0), torch.where(near | (q == 0), 0, t)
    reverse = _sum(torch.where(near, q * ((-t_near).expm1() + t_near), (p - q) + q * t_far))
    r = (t / 2).tanh()
    middle, r_near = (p + q) / 2, torch.where(near, r, 0)
    far = torch.xlogy(1 + r, 1 + r) + torch.xlogy(1 - r, 1 - r)
    jensen_shannon = _sum(middle * torch.where(near, _entropy_series(r_near), far)) / 2
    total_variation = _sum(middle * r.abs())
    numbers = (
        reverse.clamp_min(0),
        jensen_shannon.clamp(0, math.log(2)),
        total_variation.clamp(0, 1),
        total_p.log() + peak_a / temperature,
        total_q.log() + peak_b / temperature,
        1 / total_p,
    )
    invalid = ~((total_p + total_q).isfinite() & peak_a.isfinite() & peak_b.isfinite())
    return tuple(x.masked_fill(invalid, math.nan).squeeze(-1) for x in numbers)


def _sum(x: Tensor) -> Tensor:
    """Over the classes, in an order that depends on the row alone; shape (..., 1)."""
    parts = [part.sum(-1, keepdim=True) for part in torch.split(x, BLOCK, -1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1).sum(-1, keepdim=True)


def _entropy_series(r: Tensor) -> Tensor:
    """(1 + r) log(1 + r) + (1 - r) log(1 - r) for |r| up to a quarter: the sum of r^2k / (k (2k - 1))."""
    s = r.square()
    value = torch.zeros_like(s)
    for k in range(TERMS, 0, -1):
        value = (value + 1 / (k * (2 * k - 1))) * s
    return value


def _same_order(x: Tensor, y: Tensor, ks: Sequence[int]) -> Tensor:
    """Whether the most likely classes are the same in the same order, shape (rows, len(ks))."""
    most = min(max(ks, default=0), x.shape[-1])
    same = (most_likely(x, most) == most_likely(y, most)).cumprod(-1).bool()
    return torch.stack([same[:, min(k, most) - 1] for k in ks], -1) if ks else same[:, :0]


def most_likely(x: Tensor, k: int) -> Tensor:
    """The k most likely classes of each row in order, of equals the first one first."""
    # NaN is no distribution, and has an order all the same.
    x = x.nan_to_num(-math.inf, math.inf, -math.inf).to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    # `topk` leaves the order of equals open. So it has to put in order how many of the largest are larger than a class,
    # and among as many its place.
    larger = k - torch.searchsorted(x.topk(k, -1).values.flip(-1), x, right=True)
    places = torch.arange(x.shape[-1], device=x.device)
    return (larger * x.shape[-1] + places).topk(k, -1, largest=False).indices
