"""The arithmetic once more, for eager mode without gradients: blocks of rows that fit the cache, in constant memory.

With w the probabilities of p, d = log(q/p) up to a constant, m the mean of d under w and t = d - m, every row has

    KL = log(sum of w e^d) - m          the textbook form: it subtracts, and loses what the divergence is smaller by
       = log(1 + sum of w (e^t - 1 - t))   the Bregman form: it has no cancellation, however small the divergence

A row takes the first of these ways that is exact enough for it:

1. wide rows of float32 logits, in float32: the Bregman form while all t are small, so that a polynomial serves; the
   textbook form where the divergence is large.
2. every other row, in float64: the textbook form, which has digits to spare; the Bregman form of what is very small.
3. careful, term by term in float64 (`klmetric.arithmetic.plain`): peaked and infinite rows, rows that are no
   distributions, and those that a large constant between the logits keeps from the other ways.

Which way a row takes, and every operation on it, depends on that row alone: its value is the same to the last bit in
any batch.
"""

import math
from collections.abc import Callable, Sequence
from operator import ge, le
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from klmetric.arithmetic import plain
from klmetric.arithmetic.matrices import matrices_of

if TYPE_CHECKING:
    from klmetric.options import Options

# Elements of one of the three arrays that a block needs: in float32 and in float64.
BLOCK, BLOCK_OF_DOUBLE = 3 * 2**17, 2**17
# Rows of at least this many classes start out in float32.
WIDE = 256
# Classes of a row that are taken at once; wider rows are merged from parts.
PART = 2**18
# Elements of what goes the careful way at once. Below the size at which torch splits one sum over several threads, in
# which case the result would depend on whether there are other rows to split.
CAREFUL = 2**14
# Below this many classes, adding up columns is faster than the sum of torch along a row.
FEW = 4

# Largest |t| and the degree of the polynomial that stands for (e^t - 1 - t) / t^2 up to there, to 1e-6 relative.
SERIES = ((0.5, 4), (2.0, 8))
REACH = SERIES[-1][0] ** 2

# The least divergence that the textbook form has digits for: in float32, where the numbers that it subtracts may be
# FAR_OFFSET times larger; in float64; and in float64 for input of float64, which is to keep its own digits.
FAR, FAR_OFFSET = 0.3, 30.0
LEAST, LEAST_OF_DOUBLE = 1e-8, 1e-2
# The most that the mean of d may be larger than its deviation, about (2 KL)^(1/2), for the Bregman form: in float32 and
# in float64.
NEAR_OFFSET, NEAR_OFFSET_OF_DOUBLE = 8.0, 1e9
# Sums of exponentials that nothing has overflowed or underflowed in: in float32 and in float64.
SINGLE_RANGE = (1e-3, 1e30)
DOUBLE_RANGE = (1e-200, 1e200)
# Logits are lifted up to here, where beside such sums they weigh nothing: masks become numbers, whose differences are
# numbers, too, and whose exponentials are normal (others take ten times as long).
SINGLE_FLOOR, DOUBLE_FLOOR = -87.0, -600.0


def kl_rows(p: Tensor, q: Tensor, options: "Options") -> Tensor:
    """KL divergence of each row on the CPU, without gradients; see `klmetric.arithmetic.choose.kl_of_rows`."""
    out = torch.empty(p.shape[:-1], dtype=plain.result_dtype(p, q))
    if p.ndim == 2:
        _fill(p, q, out, options)
    else:
        for a, b, target in matrices_of(p, q, out):
            _fill(a, b, target, options)
    return out


def _fill(p: Tensor, q: Tensor, out: Tensor, options: "Options") -> None:
    """Measure the rows of two matrices, block by block."""
    n, classes = p.shape
    if n == 0:
        return
    takes_as_they_stand = plain.as_they_stand(options) and not options.eps
    as_logits = plain.are_logits(options)
    wide = classes >= WIDE and out.dtype == torch.float32 and takes_as_they_stand and as_logits
    # In float64 the kernel itself converts what it takes as it stands.
    prepares = wide or not takes_as_they_stand
    kernel = (_Single if wide else _Double)(n, min(classes, PART), out.dtype)
    for start in range(0, n, kernel.size):
        block = slice(start, start + kernel.size)
        a, b, target = (p, q, out) if n <= kernel.size else (p[block], q[block], out[block])
        if prepares:
            a, b = plain.prepare(a, b, options, torch.float32 if wide else torch.float64)
        if options.eps and len(a) == 1:  # the floor adds up its classes: see `_sum_of_rows`
            a, b = a.expand(2, -1), b.expand(2, -1)
        first, *second = ((x[: len(target)], y[: len(target)]) for x, y in plain.pairs(a, b, options))
        target.copy_(_in_parts(*first, as_logits, PART, kernel))
        for pair in second:
            target += _in_parts(*pair, as_logits, PART, kernel).to(out.dtype)


def _careful(a: Tensor, b: Tensor, as_logits: bool) -> Tensor:
    """The expression of `klmetric.arithmetic.plain` in float64, a few rows at a time."""
    out = torch.empty(len(a), dtype=torch.float64)
    size = max(1, CAREFUL // a.shape[-1])
    for start in range(0, len(a), size):
        x, y = a[start : start + size], b[start : start + size]
        value = _in_parts(x, y, as_logits, CAREFUL, lambda u, v, _: plain.kl(u.double(), v.double(), as_logits))
        out[start : start + size] = value.masked_fill(plain.invalid(x, y, as_logits), math.nan)
    return out


def _in_parts(
    a: Tensor,
    b: Tensor,
    as_logits: bool,
    width: int,
    kl: Callable[[Tensor, Tensor, bool], Tensor],
    mass: Tensor | None = None,
) -> Tensor:
    """Measure parts of `width` classes with `kl` and merge them.

    With the logarithm of the whole `mass` of p, classes that have no probability in it are left out of p.
    """
    if a.shape[-1] <= width:
        return kl(a, b, as_logits)
    blocks = []
    for x, y in zip(torch.split(a, width, -1), torch.split(b, width, -1), strict=True):
        if mass is not None:
            x = x.masked_fill(_is_nothing(x, mass, as_logits), -math.inf if as_logits else 0)
        masses = [_log_mass(z, as_logits) for z in (x, y)]
        blocks.append((*masses, kl(x, y, as_logits).double()))
    log_p, log_q, within = (torch.stack(parts, -1) for parts in zip(*blocks, strict=True))
    mass_of_all, _, value = plain.merge_classes(log_p, log_q, within)
    if mass is None and bool((value == math.inf).any()):
        # It may be so only within a part of no account.
        again = _in_parts(a, b, as_logits, width, kl, mass_of_all)
        value = torch.where(value == math.inf, again, value)
    # A bad part of no weight would not show.
    return value.masked_fill(plain.invalid(a, b, as_logits), math.nan)


def _is_nothing(x: Tensor, mass: Tensor, as_logits: bool) -> Tensor:
    """Classes without probability beside all, whose logarithm is `mass`: see `klmetric.arithmetic.plain.NOTHING`."""
    return (x if as_logits else x.log()) <= (mass + plain.NOTHING).unsqueeze(-1)


def _log_mass(x: Tensor, as_logits: bool) -> Tensor:
    parts = [plain.log_mass(part.double(), as_logits) for part in torch.split(x, CAREFUL, -1)]
    return torch.cat(parts, -1).logsumexp(-1)


class _Double:
    """Rows computed in float64, and the memory that a block of them needs."""

    def __init__(self, n: int, classes: int, dtype: torch.dtype) -> None:
        self.size = min(n, max(1, BLOCK_OF_DOUBLE // classes))
        self.buffers = torch.empty(3, self.size, classes, dtype=torch.float64)
        self.is_double = dtype == torch.float64
        # Within which the two sums of exponentials and the textbook divergence have all their digits.
        least, (low, high) = (LEAST_OF_DOUBLE if self.is_double else LEAST), DOUBLE_RANGE
        # (A quotient of float64 can be 0 where q is not.)
        self.low, self.high = (low, low, least), (high, high, 1e300 if self.is_double else math.inf)

    def __call__(self, a: Tensor, b: Tensor, as_logits: bool) -> Tensor:
        """KL of each row of two matrices, in memory that the next call writes to."""
        n, classes = a.shape
        if classes == 1:
            return _careful(a, b, as_logits)  # exactly 0, whatever the two logits
        work = self.buffers if self.buffers.shape[1:] == a.shape else self.buffers[:, :n, :classes]
        w, v, d = work.unbind()
        w.copy_(a)
        v.copy_(b)
        is_lifted = as_logits and (_reaches(a, DOUBLE_FLOOR) or _reaches(b, DOUBLE_FLOOR))
        if is_lifted:
            w.clamp_min_(DOUBLE_FLOOR)
            v.clamp_min_(DOUBLE_FLOOR)
        if as_logits:
            torch.sub(v, w, out=d)
            w.exp_()
            v.exp_()
        else:
            # Where p is 0 the logarithm has the weight 0, and only must be a number. (A NaN shows in the sums.)
            torch.div(v, w, out=d).nan_to_num_(nan=1, posinf=1e300).log_()
        d.mul_(w)
        sums = _sum_of_rows(work)
        total_w, total_v, kl = sums.unbind()
        kl.div_(total_w)
        torch.sub((total_v / total_w).log_(), kl, out=kl)
        if is_lifted:
            kl.masked_fill_(_misses(a, b, total_w.log(), DOUBLE_FLOOR), math.nan)
        # A negative probability shows in the logarithm, but for one against another.
        sound = as_logits or w.amin().item() >= 0
        least, most = sums.amin(1).tolist(), sums.amax(1).tolist()
        if sound and all(map(ge, least, self.low)) and all(map(le, most, self.high)):
            return kl
        low, high = (torch.tensor(bounds, dtype=torch.float64).unsqueeze(1) for bounds in (self.low, self.high))
        settled = ((sums >= low) & (sums <= high)).all(0)
        if not sound:
            settled &= w.amin(1) >= 0
        if not self.is_double:
            # What the textbook form has no digits for.
            left = (~settled & ~kl.isnan()).nonzero()[:, 0]
            if len(left):
                kl[left] = self._near(a[left], b[left], as_logits)
                settled[left] = ~kl[left].isnan()
        left = (~settled).nonzero()[:, 0]
        if len(left):
            kl[left] = _careful(a[left], b[left], as_logits)
        return kl

    def _near(self, a: Tensor, b: Tensor, as_logits: bool) -> Tensor:
        """The Bregman form, NaN where it does not reach."""
        x, y = a.double(), b.double()
        if as_logits:
            x, y = x.clamp_min(DOUBLE_FLOOR), y.clamp_min(DOUBLE_FLOOR)
        w, d = (x.exp(), y - x) if as_logits else (x, (y / x).nan_to_num_(nan=1, posinf=math.inf).log_())
        total = _sum_of_rows(w)
        mean = _sum_of_rows(w * d) / total
        t = d.sub_(mean.unsqueeze(1))
        work = t * t
        reach = work.amax(1).masked_fill_(~(total > DOUBLE_RANGE[0]) | (w.amin(1) < 0), math.nan)
        kl = _bregman(w, t, reach, total, work)
        return kl.masked_fill_(mean.square().mul_(0.5 / NEAR_OFFSET_OF_DOUBLE**2) > kl, math.nan)


class _Single:
    """Wide rows of logits in float32, and the memory that a block of them needs."""

    def __init__(self, n: int, classes: int, dtype: torch.dtype) -> None:
        self.size = min(n, max(1, BLOCK // classes))
        self.buffers = torch.empty(3, self.size, classes)

    def __call__(self, a: Tensor, b: Tensor, as_logits: bool) -> Tensor:
        """KL of each row of two matrices."""
        w, t, work = self.buffers[:, : a.shape[0], : a.shape[1]].unbind()
        is_lifted = _reaches(a, SINGLE_FLOOR) or _reaches(b, SINGLE_FLOOR)
        if is_lifted:
            torch.clamp_min(a, SINGLE_FLOOR, out=w)
            torch.clamp_min(b, SINGLE_FLOOR, out=t).sub_(w)
            # Nothing at the floor: its products would not be normal.
            torch.threshold_(w.exp_(), (1 + 4e-6) * math.exp(SINGLE_FLOOR), 0)
        else:
            torch.exp(a, out=w)
            torch.sub(b, a, out=t)
        total = _sum_of_rows(w)
        shifted = None
        if not _all_within(total, SINGLE_RANGE):
            # Apart from the largest logit. The others would lose digits to it.
            shifted = ~((total >= SINGLE_RANGE[0]) & (total <= SINGLE_RANGE[1]))
            some = a[shifted]
            w[shifted] = some.sub_(some.amax(1, keepdim=True)).exp_()
            total = _sum_of_rows(w)
        # The mean of t under w.
        mean = _sum_of_rows(torch.mul(w, t, out=work)).div_(total)
        if is_lifted:
            unsure = _misses(a, b, total.log() - 1, SINGLE_FLOOR, work)  # float32 is too coarse for the last bit
            if shifted is not None:
                unsure |= shifted & (torch.minimum(a.amin(1), b.amin(1)) <= SINGLE_FLOOR)
            mean.masked_fill_(unsure, math.nan)
        t.sub_(mean.unsqueeze(1))
        reach = torch.mul(t, t, out=work).amax(1)
        low, high = _range(reach)
        kl = None
        if not low > REACH:
            kl = _bregman(w, t, reach, total, work)
            near = mean.square().mul_(0.5 / NEAR_OFFSET**2) <= kl
            if bool(near.all()):
                return kl
            kl.masked_fill_(~near, math.nan)
        if not high <= REACH:
            # Not for rows within reach: they would have another value beside one that is not.
            far = self._far(b, work, total, mean, shifted).masked_fill_(reach <= REACH, math.nan)
            kl = far if kl is None else torch.where(kl.isnan(), far, kl)
        assert kl is not None
        left = kl.isnan().nonzero()[:, 0]
        if len(left):
            kl[left] = self._in_double(a[left], b[left])
        return kl

    def _far(self, b: Tensor, work: Tensor, total: Tensor, mean: Tensor, shifted: Tensor | None) -> Tensor:
        """The textbook form, NaN where it has no digits."""
        total_b = _sum_of_rows(torch.clamp_min(b, SINGLE_FLOOR, out=work).exp_())
        kl = (total_b / total).log_() - mean
        low, high = SINGLE_RANGE
        sound = (total_b >= low) & (total_b <= high) & (mean.abs() <= FAR_OFFSET * kl)
        sound &= (kl >= FAR) & (kl < math.inf)
        if shifted is not None:
            sound &= ~shifted
        return kl.masked_fill_(~sound, math.nan)

    def _in_double(self, a: Tensor, b: Tensor) -> Tensor:
        out = torch.empty(len(a))
        kernel = _Double(len(a), a.shape[1], torch.float32)
        for start in range(0, len(a), kernel.size):
            block = slice(start, start + kernel.size)
            out[block] = kernel(a[block], b[block], True)
        return out


def _polynomial(largest: float, degree: int) -> list[float]:
    """Coefficients of (e^t - 1 - t) / t^2 for |t| up to `largest`, interpolated where a polynomial is at its best.

    (Chebyshev nodes; Trefethen: Approximation Theory and Approximation Practice, 2013, chapters 2 and 4.)
    """
    nodes = [largest * math.cos(math.pi * (k + 0.5) / (degree + 1)) for k in range(degree + 1)]
    values = [sum(t**k / math.factorial(k + 2) for k in range(30)) for t in nodes]
    powers = torch.tensor([[t**k for k in range(degree + 1)] for t in nodes], dtype=torch.float64)
    solution: list[float] = torch.linalg.solve(powers, torch.tensor(values, dtype=torch.float64)).tolist()
    return solution


# The coefficients as tensors, as torch takes them, in each precision.
POLYNOMIALS = {
    dtype: [(largest, torch.tensor(_polynomial(largest, degree), dtype=dtype).unbind()) for largest, degree in SERIES]
    for dtype in (torch.float32, torch.float64)
}


def _bregman(w: Tensor, t: Tensor, reach: Tensor, total: Tensor, work: Tensor) -> Tensor:
    """Logarithm of 1 + sum of w (e^t - 1 - t), over `total`; NaN for rows beyond the reach of the polynomials.

    Args:
        w: weights, not normalised.
        t: differences from their mean.
        reach: largest square of t in each row.
        total: sum of the weights.
        work: memory for the result of each element.
    """
    low, high = _range(reach)
    kl = torch.full_like(reach, math.nan)
    nearer = -1.0
    for largest, coefficients in POLYNOMIALS[t.dtype]:
        here = (nearer, largest**2)
        nearer = here[1]
        if here[0] < low and high <= here[1]:
            return _weighted(w, t, coefficients, work).div_(total).log1p_()
        if high <= here[0] or low > here[1]:
            continue
        within = (reach > here[0]) & (reach <= here[1])
        count = int(within.sum())
        if not count:
            continue
        # Most of the rows are faster computed all together than picked out.
        if 2 * count > len(within):
            value = _weighted(w, t, coefficients, work).div_(total).log1p_()
            kl = torch.where(within, value, kl)
        else:
            some = t[within]
            sums = _weighted(w[within], some, coefficients, torch.empty_like(some))
            kl[within] = sums.div_(total[within]).log1p_()
    return kl


def _weighted(w: Tensor, t: Tensor, coefficients: Sequence[Tensor], work: Tensor) -> Tensor:
    """Sum of w t^2 (c0 + c1 t + ...) of each row."""
    *rest, before, last = coefficients
    torch.add(before, t, alpha=last.item(), out=work)
    for coefficient in reversed(rest):
        torch.addcmul(coefficient, work, t, out=work)
    return _sum_of_rows(work.mul_(t).mul_(t).mul_(w))


def _reaches(x: Tensor, floor: float) -> bool:
    """Whether there is a number as low as that, or NaN."""
    return not x.amin().item() > floor


def _misses(a: Tensor, b: Tensor, mass: Tensor, floor: float, work: Tensor | None = None) -> Tensor:
    """Rows in which q is below the floor where p has a probability, beside a sum whose logarithm is `mass`."""
    # With one limit for all rows, and a margin for half precision, it takes few operations to see that there are none:
    # a class is no miss if one of b and floor + limit - a is at the floor. With its own limit a row is settled.
    limit = max(mass.amin().item() + plain.NOTHING - 10, -1e4)
    work = torch.sub(a.new_tensor(floor + limit), a, out=work)
    misses = ~(torch.maximum(work, b, out=work).amin(1) >= floor)
    left = misses.nonzero()[:, 0]
    if len(left):
        misses[left] = ((b[left] < floor) & ~_is_nothing(a[left], mass[left], True)).any(1)
    return misses


def _range(x: Tensor) -> tuple[float, float]:
    """Least and greatest; NaN if there is one."""
    low, high = x.aminmax()
    return low.item(), high.item()


def _all_within(x: Tensor, bounds: tuple[float, float]) -> bool:
    low, high = _range(x)
    return bounds[0] <= low and high <= bounds[1]


def _sum_of_rows(x: Tensor) -> Tensor:
    """Sum along the last axis, the same to the last bit whatever other rows there are."""
    if x.shape[-1] < FEW:
        first, *others = x.unbind(-1)
        return sum(others[1:], first + others[0]) if others else first.clone()
    # Of a row alone torch makes several sums, one for each thread.
    return x.sum(-1) if x.ndim > 2 or len(x) != 1 else x.expand(2, -1).sum(-1)[:1]
