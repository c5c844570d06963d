"""The arithmetic once more, for eager mode without gradients: blocks of rows that fit the cache, in constant memory.

With w the probabilities of p, d = log(q/p) up to a constant, m the mean of d under w and t = d - m, every row has
KL = log(1 + sum of w (e^t - 1 - t)). A wide row of float32 takes the first of these ways that is exact enough for it:

1. near: all t are small, and e^t - 1 - t is a polynomial. It has no cancellation, however small the divergence.
2. far: the divergence is large, and the textbook difference of two logarithms has digits to spare.
3. careful: everything else, term by term in float64 (`klmetric.rows`): peaked and infinite rows, rows that are no
   distributions, and those that a large constant between the logits keeps from the other ways.

Narrow rows, and float64, are simply computed as they stand above, in float64, where the cancellation is of no account.

Which way a row takes, and every operation on it, depends on that row alone: its value is the same to the last bit in
any batch.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from klmetric import rows
from klmetric.options import Options

# Elements of a block: three of them in float32, or of a quarter of that six in float64, take 4.5 MiB.
BLOCK = 3 * 2**17
# Classes of a row that are taken at once; wider rows are merged from parts.
WIDE = 2**18
# Elements of what goes the careful way at once. Below the size at which torch splits one sum over several threads, in
# which case the result would depend on whether there are other rows to split.
CAREFUL = 2**14
# Rows shorter than this are transposed, so that an operation runs along many rows at once.
NARROW = 64

# Largest |t| and the degree at which the series of (e^t - 1 - t) / t^2 is exact to float32 there; and of
# (u - log(1 + u)) / u^2.
EXP_SERIES = ((0.02, 2), (0.5, 6), (2.0, 11))
LOG_SERIES = ((0.02, 3), (0.3, 10))

# The least divergence, and the most that the numbers subtracted for it may be larger: what the far way needs for 1e-5.
FAR = 0.3
FAR_OFFSET = 30.0
# The most that the mean of d may be larger than its deviation, about (2 KL)^(1/2): what the near way needs.
NEAR_OFFSET = 8.0
# The largest mean of d that leaves float64 enough digits of t.
DOUBLE_OFFSET = 1e3


def kl_rows(p: Tensor, q: Tensor, options: Options) -> Tensor:
    """KL divergence of each row in nats, in the direction and at the temperature of `options`.

    Args:
        p: reference, shape (..., classes), in the first of `options.input_format`.
        q: approximation, of the shape of `p`, in the second format.
        options: see `klmetric.kl_divergence`.

    Returns:
        shape (...), in the dtype that p and q promote to, at least float32; NaN where a row is no distribution.
    """
    dtype = torch.promote_types(torch.promote_types(p.dtype, q.dtype), torch.float32)
    with_gradient = torch.is_grad_enabled() and (p.requires_grad or q.requires_grad)
    if with_gradient or torch.compiler.is_compiling() or p.device.type != "cpu":
        return _plain(p, q, options, dtype)
    out = torch.empty(p.shape[:-1], dtype=dtype)
    with torch.no_grad():
        for matrices in _matrices(p, q, out):
            _fill(*matrices, options)
    return out


def _plain(p: Tensor, q: Tensor, options: Options, dtype: torch.dtype) -> Tensor:
    p, q, as_logits = rows.prepare(p, q, options, dtype)
    parts = [rows.kl(a, b, as_logits) for a, b in rows.pairs(p, q, as_logits, options)]
    total = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    return total.masked_fill(rows.invalid(p, q, as_logits), math.nan)


def _matrices(p: Tensor, q: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The input as matrices of (rows, classes), without a copy of it, and where their results go."""
    try:
        yield p.view(-1, p.shape[-1]), q.view(-1, q.shape[-1]), out.view(-1)
    except RuntimeError:  # the axes before the last are not one in memory
        for each in zip(p, q, out, strict=True):
            yield from _matrices(*each)


def _fill(p: Tensor, q: Tensor, out: Tensor, options: Options) -> None:
    """Measure the rows of two matrices, block by block."""
    n, classes = p.shape
    if n == 0:
        return
    dtype = torch.float64 if rows.converts(options) else out.dtype
    kl = _kernel(n, classes, dtype)
    size = kl.size
    for start in range(0, n, size):
        block = slice(start, start + size)
        a, b, as_logits = rows.prepare(p[block], q[block], options, dtype)
        parts = [_in_parts(x, y, as_logits, WIDE, kl) for x, y in rows.pairs(a, b, as_logits, options)]
        out[block] = parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _kernel(n: int, classes: int, dtype: torch.dtype) -> "_Wide | _Double":
    """The way that rows of this kind start out, and how many of them it takes at once."""
    classes = min(classes, WIDE)
    if dtype == torch.float64 or classes < NARROW:
        return _Double(min(n, max(1, BLOCK // 4 // classes)), transposed=classes < NARROW)
    return _Wide(min(n, max(1, BLOCK // classes)), classes)


def _careful(a: Tensor, b: Tensor, as_logits: bool) -> Tensor:
    """The expression of `klmetric.rows` in float64, a few rows at a time."""
    out = a.new_empty(len(a))
    size = max(1, CAREFUL // a.shape[-1])
    for start in range(0, len(a), size):
        x, y = a[start : start + size], b[start : start + size]
        value = _in_parts(x, y, as_logits, CAREFUL, lambda u, v, _: rows.kl(u.double(), v.double(), as_logits))
        out[start : start + size] = value.masked_fill(rows.invalid(x, y, as_logits), math.nan)
    return out


def _in_parts(
    a: Tensor, b: Tensor, as_logits: bool, width: int, kl: Callable[[Tensor, Tensor, bool], Tensor]
) -> Tensor:
    """Measure blocks of `width` classes with `kl` and merge them."""
    if a.shape[-1] <= width:
        return kl(a, b, as_logits)
    blocks = []
    for x, y in zip(torch.split(a, width, -1), torch.split(b, width, -1), strict=True):
        masses = [_log_mass(z, as_logits) for z in (x, y)]
        blocks.append((*masses, kl(x, y, as_logits).double()))
    log_p, log_q, within = (torch.stack(parts, -1) for parts in zip(*blocks, strict=True))
    value = rows.merge_classes(log_p, log_q, within)[2].to(a.dtype)
    # A bad part of no weight would not show.
    return value.masked_fill(rows.invalid(a, b, as_logits), math.nan)


def _log_mass(x: Tensor, as_logits: bool) -> Tensor:
    parts = [rows.log_mass(part.double(), as_logits) for part in torch.split(x, CAREFUL, -1)]
    return torch.cat(parts, -1).logsumexp(-1)


def _carefully_the_rest(kl: Tensor, a: Tensor, b: Tensor, as_logits: bool) -> Tensor:
    """Fill in the rows that no other way was good for, which are NaN so far."""
    left = kl.isnan().nonzero()[:, 0]
    if len(left):
        kl[left] = _careful(a[left], b[left], as_logits)
    return kl


# The coefficients of (e^t - 1 - t) / t^2 and of (u - log(1 + u)) / u^2.
_EXP = [1 / math.factorial(k + 2) for k in range(12)]
_LOG = [(-1) ** k / (k + 2) for k in range(12)]


class _Double:
    """Rows computed in float64."""

    def __init__(self, size: int, transposed: bool) -> None:
        self.size = size
        self.transposed = transposed
        self.axis, self.sum = (0, _fold) if transposed else (1, _sum_of_rows)

    def __call__(self, a: Tensor, b: Tensor, as_logits: bool) -> Tensor:
        """KL of each row of two matrices."""
        if a.shape[1] == 1:
            return _careful(a, b, as_logits)  # exactly 0, whatever the two logits
        contiguous = torch.contiguous_format
        # Copies, even of float64: they are written to.
        x, y = ((z.T if self.transposed else z).to(torch.float64, copy=True, memory_format=contiguous) for z in (a, b))
        kl, sound = (self._logits if as_logits else self._probs)(x, y)
        if not bool(sound.all()):
            kl = kl.masked_fill(~sound, math.nan)
        return _carefully_the_rest(kl.clamp_min_(0).to(a.dtype), a, b, as_logits)

    def _logits(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        weight = x.exp()
        total = self.sum(weight)
        d = y.sub_(x)
        mean = self.sum(weight * d) / total
        t = d.sub_(mean.unsqueeze(self.axis))
        kl = self.sum(torch.expm1(t).sub_(t).mul_(weight)).div_(total).log1p_()
        return kl, _has_digits(total) & (mean.abs() < DOUBLE_OFFSET) & (kl < math.inf)

    def _probs(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        sum_x, sum_y = self.sum(x), self.sum(y)
        sound = _has_digits(sum_x) & _has_digits(sum_y) & (x.amin(self.axis) >= 0) & (y.amin(self.axis) >= 0)
        p, difference = x.div_(sum_x.unsqueeze(self.axis)), y.div_(sum_y.unsqueeze(self.axis)).sub_(x)
        # Where p is 0 the logarithm has the weight 0, and only must not be infinite.
        u = difference / p.clamp_min(1e-300)
        return self.sum(difference.sub_(u.log1p_().mul_(p))), sound


def _has_digits(total: Tensor) -> Tensor:
    """Sums that nothing has overflowed or underflowed in."""
    return (total > 1e-200) & (total < 1e200)


class _Wide:
    """Rows of many classes in float32, and the memory that a block of them needs."""

    def __init__(self, size: int, classes: int) -> None:
        self.size = size
        self.buffers = torch.empty(3, size, classes)

    def __call__(self, a: Tensor, b: Tensor, as_logits: bool) -> Tensor:
        """KL of each row of two matrices."""
        work = self.buffers[:, : a.shape[0], : a.shape[1]]
        kl = (self._logits if as_logits else self._probs)(a, b, *work)
        return _carefully_the_rest(kl, a, b, as_logits)

    def _logits(self, a: Tensor, b: Tensor, w: Tensor, d: Tensor, f: Tensor) -> Tensor:
        torch.softmax(a, -1, out=w)
        torch.sub(b, a, out=d)
        # Not quite 1: the softmax of torch adds up in plain float32.
        total = _sum_of_rows(w)
        mean = _dot(w, d, f) / total
        peak_b = b.amax(1)
        if bool(mean.isnan().any()):
            # Classes masked in both have no d. One masked in p alone has no weight either, only a reason to go far.
            d.nan_to_num_(nan=0, posinf=1e4, neginf=-math.inf)
            mean = _dot(w, d, f) / total
        d.sub_(mean.unsqueeze(1))
        largest = _largest(d).masked_fill_(peak_b.isnan(), math.nan)
        peak_w = w.amax(1)
        kl = (_near(w, d, f, largest, EXP_SERIES, _EXP) / total).log1p_()
        kl.masked_fill_(mean.square() > 2 * NEAR_OFFSET**2 * kl, math.nan)
        far = ~(largest <= EXP_SERIES[-1][0])
        if bool(far.any()):
            torch.softmax(b, -1, out=f)
            offset = peak_b - a.amax(1)
            value = offset - mean + (peak_w / total).div_(f.amax(1) / _sum_of_rows(f)).log_()
            far &= (value >= FAR) & (mean.abs() + offset.abs() <= FAR_OFFSET * value) & (value < math.inf)
            kl = torch.where(far, value, kl)
        return kl

    def _probs(self, p: Tensor, q: Tensor, w: Tensor, d: Tensor, f: Tensor) -> Tensor:
        torch.sub(q, p, out=d)
        sum_p, sum_q = _sum_of_rows(p), _sum_of_rows(q)
        # 1 + u = (q/Q) / (p/P) = (1 + (q - p) / p) (1 + r) with r = P/Q - 1, exact where q is near p.
        r = -_sum_of_rows(d) / sum_q
        sound = (p.amin(1) >= 0) & (q.amin(1) >= 0) & (sum_p < math.inf) & (sum_q < math.inf)
        d.div_(p).mul_((1 + r).unsqueeze(1)).add_(r.unsqueeze(1))
        largest = _largest(d).masked_fill_(~sound, math.nan)
        far = sound & ~(largest <= LOG_SERIES[-1][0])
        kl = torch.full_like(sum_p, math.nan)
        if not bool(far.all()):
            kl = _near(w.copy_(p), d, f, largest, LOG_SERIES, _LOG) / sum_p
            kl.masked_fill_(r.square() > 2 * NEAR_OFFSET**2 * kl, math.nan)
        if bool(far.any()):
            value = _dot(p, _log_ratio(p, q, f), w)
            if bool(value.isnan().any()):  # 0/0, where p has no weight
                value = _dot(p, _log_ratio(p, q, f, nan=1.0), w)
            value = value / sum_p + (sum_q / sum_p).log_()
            kl = torch.where(far & (value >= FAR) & (value < math.inf), value, kl)
        return kl


def _near(
    w: Tensor,
    t: Tensor,
    f: Tensor,
    largest: Tensor,
    series: tuple[tuple[float, int], ...],
    coefficients: list[float],
) -> Tensor:
    """Sum of w t^2 (c0 + c1 t + ...) for the rows within the reach of the series, NaN for the others."""
    kl = torch.full_like(largest, math.nan)
    low = -1.0
    for limit, degree in series:
        within = (largest > low) & (largest <= limit)
        low = limit
        if bool(within.all()):
            return _sum_of_series(w, t, f, coefficients[: degree + 1])
        if bool(within.any()):
            w_some, t_some = w[within], t[within]
            kl[within] = _sum_of_series(w_some, t_some, torch.empty_like(t_some), coefficients[: degree + 1])
    return kl


def _sum_of_series(w: Tensor, t: Tensor, f: Tensor, coefficients: list[float]) -> Tensor:
    *rest, before, last = coefficients
    torch.mul(t, last, out=f).add_(before)
    for coefficient in reversed(rest):
        torch.addcmul(torch.tensor(coefficient), f, t, out=f)
    return _dot(w.mul_(t), f.mul_(t), f)


def _log_ratio(p: Tensor, q: Tensor, out: Tensor, nan: float | None = None) -> Tensor:
    torch.div(p, q, out=out)
    if nan is not None:
        out.nan_to_num_(nan=nan, posinf=math.inf)
    # log(0) must not meet the weight 0.
    return out.clamp_min_(torch.finfo(torch.float32).tiny).log_()


def _largest(t: Tensor) -> Tensor:
    return torch.maximum(t.amax(1), -t.amin(1))


def _dot(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    return _sum_of_rows(torch.mul(x, y, out=out))


def _sum_of_rows(x: Tensor) -> Tensor:
    # torch adds up one row on its own in another order than a row among others.
    return x.sum(1) if len(x) > 1 else x.expand(2, -1).sum(1)[:1]


def _fold(x: Tensor) -> Tensor:
    """Add up the first axis by halves: the order of torch depends on the place of a row among the others."""
    x = x if len(x) > 1 else x.clone()
    while len(x) > 1:
        half = len(x) // 2
        folded = x[:half] + x[half : 2 * half]
        if len(x) % 2:
            folded[0] += x[-1]
        x = folded
    return x[0]
