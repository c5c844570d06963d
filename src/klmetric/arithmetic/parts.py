"""The arithmetic of the kernel of accelerators, in Triton: what a tile, the classes of one program, adds to a row.

It is that of `kernel/block.h`. A tile becomes a part, eight numbers: `top`, `mass`, `base`, `centre`, `sum`, `extra`,
`y` and `edge`. The log mass of p is top + log(mass); that of q is base + log(mass) + centre + l, where
l = log1p(sum) + extra (without log(mass) where p has none); the divergence within is l - y; `edge` is the largest log p
of the classes where q is 0. Parts are merged by the chain rule of KL, in float64.
"""

import math
from typing import Any

import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret
if INTERPRETED:  # where an fma rounds twice. And a function of Triton's own takes a millisecond to call.

    def _fma(x: Any, y: Any, z: Any) -> Any:
        return (x.to(tl.float64) * y + z).to(tl.float32)

    def inner(function: Any) -> Any:
        """A function that a kernel calls."""
        return function

else:
    _fma, inner = tl.fma, triton.jit


def _constant(value: Any) -> Any:
    return tl.constexpr(value)


INF = _constant(math.inf)
# Adding 1.5 2^23 rounds to a whole number, which then stands in the low bits.
WHOLE, WHOLE_BITS = _constant(12582912.0), _constant(0x4B400000)
LOG2E, LN2, LN2_REST = _constant(1.44269504), _constant(0.693147182464599609375), _constant(-1.904654290582768e-9)
LN2_DOUBLE = _constant(0.69314718055994530942)
NEAR, FAR, BELOW, NEAR_ONE = _constant(0.34), _constant(8.0), _constant(-80.0), _constant(0.29)
NEAR_DOUBLE, APART_FROM, OVER = _constant(0.5), _constant(1e6), _constant(600.0)
TINY, VAST = _constant(1e-30), _constant(1e30)
LEAST_LOG_P = _constant(-745.13321910194122)  # under which e^x is 0 in float64


# ---- functions -------------------------------------------------------------------------------------------------------
@inner
def _exp(x, top, log2e, ln2, ln2_rest):
    """2^-k e^(x/T), the k of `top` in its low bits: no x loses digits to a subtraction, as it would in x - top."""
    shifted = _fma(x, log2e, WHOLE)
    k = shifted - WHOLE
    r = _fma(k, -ln2_rest, _fma(k, -ln2, x))
    e = tl.exp2(r * log2e).to(tl.int32, bitcast=True) + ((shifted.to(tl.int32, bitcast=True) - top) << 23)
    return e.to(tl.float32, bitcast=True)


@inner
def _series(r):
    """The quotient (e^r - 1 - r) / r^2 for |r| <= ln 2 / 2."""
    value = _fma(r, 0.00019891080463998842, 0.0013933730715792083)
    value = _fma(r, value, 0.0083333108446478626)
    value = _fma(r, value, 0.041666464197405692)
    return _fma(r, _fma(r, value, 0.16666666681704215), 0.5)


@inner
def _phi(t):
    """The function e^t - 1 - t. With t = k ln 2 + r and s = 2^k it is s r^2 g(r) + (s - 1) r + (s - 1 - k ln 2)."""
    shifted = _fma(t, LOG2E, WHOLE)
    k = shifted - WHOLE
    r = _fma(k, -LN2_REST, _fma(k, -LN2, t))
    s = ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    d = s - 1.0
    rest = _fma(d, r, _fma(k, -LN2_REST, _fma(k, -LN2, d)))
    return _fma(s * (r * r), _series(r), rest)


@inner
def _phi_of(t, largest):
    """`_phi`, in fewer steps where all are near 0. The bits are the same, so that other rows do not show in them."""
    if largest < NEAR:  # noqa: SIM108 (of the two, one program takes one)
        phi = (t * t) * _series(t)
    else:
        phi = _phi(t)
    return phi


@inner
def _series_of_log(f):
    """The quotient (f - log(1 + f)) / f^2 for sqrt(1/2) <= 1 + f < sqrt 2."""
    h = _fma(f, -0.067690241138160015, 0.11557287882015821)
    h = _fma(f, h, -0.11812136142329650)
    h = _fma(f, h, 0.12420814467908905)
    h = _fma(f, h, -0.14232317759552221)
    h = _fma(f, h, 0.16667536772428633)
    h = _fma(f, h, -0.20001446722200232)
    h = _fma(f, h, 0.25000010940100676)
    h = _fma(f, h, -0.33333322793607103)
    return _fma(f, h, 0.5)


@inner
def _psi_of(u, ratio, largest):
    """The function u - log(1 + u), ratio = 1 + u.

    With ratio = 2^k (1 + f) it is f^2 h(f) + (2^k - 1)(1 + f) - k ln 2; where k = 0, f is u itself.
    """
    if largest < NEAR_ONE:
        psi = (u * u) * _series_of_log(u)
    else:
        bits = ratio.to(tl.int32, bitcast=True)
        k = (bits - 0x3F3504F3) >> 23
        one_and_f = (bits - (k << 23)).to(tl.float32, bitcast=True)
        f = tl.where(k == 0, u, one_and_f - 1.0)
        s = ((k << 23) + 0x3F800000).to(tl.float32, bitcast=True)
        whole = k.to(tl.float32)
        rest = _fma(whole, -LN2_REST, _fma(whole, -LN2, (s - 1.0) * one_and_f))
        psi = _fma(f * f, _series_of_log(f), rest)
    return psi


@inner
def _series_double(t):
    """The quotient (e^t - 1 - t) / t^2 for |t| <= 1/2, in float64."""
    value = t * 1.6116496514371546473e-10 + 2.0962955815976075739e-9
    value = t * value + 2.5051946709721621128e-8
    value = t * value + 2.7557076636642723479e-7
    value = t * value + 2.7557319433620242821e-6
    value = t * value + 0.000024801587616145412717
    value = t * value + 0.00019841269841146991866
    value = t * value + 0.0013888888888704548969
    value = t * value + 0.0083333333333333596599
    value = t * value + 0.04166666666666706171
    return t * (t * value + 0.16666666666666666658) + 0.5


@inner
def _log1p(x):
    """In float64. What rounding 1 + x changes is the same in the logarithm and beside it, as Kahan has it."""
    whole = x + 1.0
    return tl.where(whole == 1.0, x, tl.log(whole) * (x / (whole - 1.0)))


if INTERPRETED:  # which knows this maximum of numpy's alone

    def largest_of(x: Any) -> Any:
        """It is below infinity where x may be a distribution: not where there is NaN."""
        return tl.max(tl.where(x == x, x, INF))

else:

    @triton.jit
    def _larger(x, y):
        return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)

    @triton.jit
    def largest_of(x):
        """It is below infinity where x may be a distribution: not where there is NaN."""
        return tl.reduce(x, 0, _larger)


@inner
def _lost_in(d, b, a):
    """What rounding took from d = b - a. This is Knuth's TwoSum."""
    minus_a = d - b
    return (b - (d - minus_a)) + (-a - minus_a)


# ---- a tile in float32: whether it did, and the part -----------------------------------------------------------------
@inner
def of_plain_logs(a, b, inside, factor, log2e, ln2, ln2_rest, reach, under):
    """From logits none of which is negligible, or far from those of the other side: nearly always."""
    top = largest_of(a)
    fit = (top < reach) & (tl.min(a) >= tl.maximum(top + under, -reach))
    k = _fma(tl.where(fit, top, 0.0), log2e, WHOLE).to(tl.int32, bitcast=True)
    w = tl.where(inside, _exp(a, k, log2e, ln2, ln2_rest), 0.0)
    d = b - a
    mass = tl.sum(w)
    centre = tl.div_rn(tl.sum(w * d), mass) * factor
    t = _fma(d, factor, -centre)
    largest = tl.max(tl.abs(t))
    x, y = tl.div_rn(tl.sum(w * _phi_of(t, largest)), mass), tl.div_rn(tl.sum(w * t), mass)
    # Else what rounding took from d, or left in the centre, could show. Of NaN or infinity in q nothing holds.
    fit = fit & (largest < FAR) & (centre * centre <= 16.0 * x) & (y * y <= x * 0.0625)
    log_of_k = (k - WHOLE_BITS).to(tl.float64) * LN2_DOUBLE
    none = (k * 0).to(tl.float64)
    y = y.to(tl.float64)
    return (
        fit,
        log_of_k,
        mass.to(tl.float64),
        log_of_k,
        centre.to(tl.float64),
        x.to(tl.float64) + y,
        none,
        y,
        none - INF,
    )


@inner
def of_logs(a, b, inside, tau, factor, log2e, ln2, ln2_rest, reach, under):
    """From logits with masks, offsets, and q far from p."""
    a, b = tl.where(inside, a, -INF), tl.where(inside, b, -INF)
    top, top_q = largest_of(a), largest_of(b)
    fit = (top > -reach) & (top < reach) & (top_q > -reach) & (top_q < reach)
    top, top_q = tl.where(fit, top, 0.0), tl.where(fit, top_q, 0.0)
    k = _fma(top, log2e, WHOLE).to(tl.int32, bitcast=True)
    # Classes of p without weight: all that they add is their q.
    is_p = a >= top + under
    w = tl.where(is_p, _exp(a, k, log2e, ln2, ln2_rest), 0.0)
    known = is_p & (b > -INF)
    d = tl.where(known, b - a, top_q - top)
    rest = tl.where(known, _lost_in(d, b, a), 0.0)
    lost = tl.max(tl.where(is_p, -INF, b))
    edge = tl.max(tl.where(b == -INF, a, -INF)).to(tl.float64) * tau
    mass = tl.sum(w)
    # The centre in two steps: what is left of a large one shows in t, to be taken out once more.
    first = tl.div_rn(tl.sum(w * d), mass)
    t = ((d - first) + rest) * factor
    second = tl.div_rn(tl.sum(w * t), mass)
    t = tl.where(known, t - second, 0.0)
    low, high = tl.min(t), tl.max(t)
    weight = tl.sum(w * _phi_of(t, tl.maximum(high, -low)))
    x, y = tl.div_rn(weight, mass).to(tl.float64), tl.div_rn(tl.sum(w * t), mass).to(tl.float64)
    centre = first.to(tl.float64) * tau + second.to(tl.float64)
    total, extra = x + y, (k * 0).to(tl.float64)
    sharp = second * second * mass <= 4.0 * weight  # else t has lost digits to what was left of the centre
    far = (low < BELOW) | (high > FAR)  # where t is rounded so coarsely that e^t could be off by a millionth
    if fit & (far | (lost > top_q + under)):
        k_q = _fma(top_q, log2e, WHOLE).to(tl.int32, bitcast=True)
        v = tl.where(b >= top_q + under, _exp(b, k_q, log2e, ln2, ln2_rest), 0.0)
        gap = (k_q - k).to(tl.float64) * LN2_DOUBLE - centre
        without_p = tl.div_rn(tl.sum(tl.where(is_p, 0.0, v)), mass).to(tl.float64)
        textbook = gap + (tl.log(tl.sum(v).to(tl.float64)) - tl.log(mass.to(tl.float64)))
        sharp = tl.where(far, textbook > 0.3 * (1.0 + tl.abs(centre)), sharp & ((without_p == 0) | (gap < OVER)))
        total = tl.where(far, 0.0, total + without_p * tl.exp(tl.minimum(gap, OVER)))
        y, extra = tl.where(far, 0.0, y), tl.where(far, textbook, extra)
    log_of_k = (k - WHOLE_BITS).to(tl.float64) * LN2_DOUBLE
    return fit & sharp, log_of_k, mass.to(tl.float64), log_of_k, centre, total, extra, y, edge


@inner
def of_probs(p, q, inside):
    """From probabilities, with rho = Q / P as a rounded number and u = (q - rho p) / (rho p)."""
    p, q = tl.where(inside, p, 0.0), tl.where(inside, q, 0.0)
    mass, mass_q = tl.sum(p), tl.sum(q)
    rho = tl.div_rn(mass_q, mass)
    fit = (mass > TINY) & (mass < VAST) & (mass_q > TINY) & (mass_q < VAST) & (rho > TINY) & (rho < VAST)
    fit = fit & (tl.minimum(tl.min(p), tl.min(q)) >= 0)  # which NaN does not pass: a sum tells of it
    d = _fma(p, -rho, q)
    both = (p > 0) & (q > 0)
    scaled = tl.where(both, p, 1.0) * rho
    inverse = 1.0 / scaled
    inverse = _fma(inverse, _fma(-scaled, inverse, 1.0), inverse)  # a division may round off twice as far
    u, ratio = tl.where(both, d * inverse, 0.0), tl.where(both, q * inverse, 1.0)
    out = tl.max((~((ratio > TINY) & (ratio < VAST))).to(tl.int32))
    missed = tl.max(((p > 0) & (q == 0)).to(tl.int32))  # then the row is infinite, whatever the class adds
    terms = tl.where(p > 0, p * _psi_of(u, ratio, tl.max(tl.abs(u))), d * tl.div_rn(1.0, rho))
    x = tl.div_rn(tl.sum(terms), mass).to(tl.float64)
    y = tl.div_rn(tl.div_rn(tl.sum(d), mass), rho).to(tl.float64)
    none = (out * 0).to(tl.float64)
    edge = tl.where(missed > 0, none, -INF)
    return fit & (out == 0), none, mass.to(tl.float64), none, tl.log(rho.to(tl.float64)), y, none, y - x, edge


# ---- in float64: any input -------------------------------------------------------------------------------------------
@inner
def careful(a, b, within, tau):
    """The part from logarithms; `within` are the divergences of parts that stand for the classes."""
    m, mq = largest_of(a), largest_of(b)
    bad = ~((m < INF) & (mq < INF))
    has, has_q = (m > -INF) & ~bad, (mq > -INF) & ~bad
    m, mq = tl.where(has, m, 0.0), tl.where(has_q, mq, 0.0)
    # Logits that a large constant keeps apart are measured from the largest: beside it their mean would have no digits.
    apart = has & has_q & (tl.abs(mq - m) > APART_FROM)
    of_p, of_q = tl.where(apart, m, 0.0), tl.where(apart, mq, 0.0)
    a, b, m, mq = a - of_p, b - of_q, m - of_p, mq - of_q
    known = (a > -INF) & (b > -INF)
    d = tl.where(known, b - a, tl.where(has & has_q, mq - m, 0.0))
    rest = tl.where(known, _lost_in(d, b, a), 0.0)
    w = tl.exp((a - m) * tau)
    mass, mass_q = tl.sum(w), tl.sum(tl.exp((b - mq) * tau))
    over = tl.where(has, mass, 1.0)
    mean = tl.sum(w * d) / over
    inside = tl.sum(w * within) / over
    edge = (tl.max(tl.where(b == -INF, a, -INF)) + of_p) * tau
    c = mean * tau
    t = ((d - mean) + rest) * tau
    e = tl.exp(tl.minimum((b - m) * tau - c, OVER))
    near = (tl.abs(t) < NEAR_DOUBLE) & (w > 0)
    x = tl.sum(tl.where(near, w * (t * t) * _series_double(t), (e - w) - w * t)) / over
    y = tl.sum(w * t) / over
    # So far apart that the textbook form has every digit.
    above = (mq - m) * tau - c
    far = has & (above > OVER)
    textbook = above + tl.log(tl.where(has_q, mass_q, 1.0)) - tl.log(over)
    total = tl.where(has_q & ~far, tl.where(has, x + y, mass_q - 1.0), 0.0)
    extra = tl.where(has_q, tl.where(far, textbook, 0.0), -INF)
    y = tl.where(far | ~has | ~has_q, 0.0, y) - tl.where(has, inside, 0.0)
    base, centre = tl.where(has, m + of_q, mq) * tau, tl.where(has, c, 0.0)
    mass = tl.where(bad, float("nan"), tl.where(has, mass, 0.0))
    return (m + of_p) * tau, mass, base, centre, total, extra, y, edge


@inner
def merged(top, mass, base, centre, total, extra, y, edge):
    """The part of parts: the chain rule of KL.

    Masses and offsets are taken from those of parts that have any, so that large common logits cost no digits.
    """
    has = mass > 0
    of_top, of_base, of_centre = _largest_there(top, has), _largest_there(base, has), _largest_there(centre, has)
    more = _log1p(total) + extra
    log_mass = tl.log(mass)  # NaN, where a part is no distribution
    a = log_mass + (top - of_top)
    b = (tl.where(mass == 0, 0.0, log_mass) + (base - of_base)) + (centre - of_centre) + more
    within = tl.where(has & (more > -INF), more - y, 0.0)
    top, mass, base, centre, total, extra, y, _ = careful(a, b, within, 1.0)
    return top + of_top, mass, base + of_base, centre + of_centre, total, extra, y, tl.max(edge)


@inner
def _largest_there(x, has):
    largest = tl.max(tl.where(has, x, -INF))
    return tl.where(largest > -INF, largest, 0.0)


@inner
def _both(x, y):
    return tl.where(tl.arange(0, 2) == 0, x, y)


@inner
def merged_with(top, mass, base, centre, total, extra, y, edge, top2, mass2, base2, centre2, total2, extra2, y2, edge2):
    """The part of two."""
    return merged(
        _both(top, top2),
        _both(mass, mass2),
        _both(base, base2),
        _both(centre, centre2),
        _both(total, total2),
        _both(extra, extra2),
        _both(y, y2),
        _both(edge, edge2),
    )


@inner
def nothing(zero):
    """The part that changes none it is merged with."""
    return zero, zero, zero, zero, zero, zero - INF, zero, zero - INF


@inner
def divergence_of(top, mass, total, extra, y, edge, classes):
    """Of a row from its part; NaN for what is no pair of distributions."""
    more = _log1p(total) + extra
    kl = tl.where(classes == 1, 0.0, tl.maximum(more - y, 0.0))  # of one class it is what rounding left
    infinite = (edge > -INF) & (edge - (top + tl.log(mass)) > LEAST_LOG_P)
    return tl.where((mass > 0) & (more > -INF), tl.where(infinite, INF, kl), float("nan"))
