"""The sketch: one float64 vector that the divergences of a stretch of data come to, with how they are spread.

It begins with the totals (`klmetric.totals.vector`). Then come three sums over the samples, of which the standard error
is made; some counts, and the largest and the smallest divergence; the bins of a histogram; and, with `top`, the worst
rows: their divergences, the running numbers of their samples and their places in those.

Laws: `empty` is neutral and `merge` is associative. It is commutative but for the numbers of the samples, which run on
from one part to the next.
"""

import math
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from klmetric.arithmetic import native
from klmetric.arithmetic.device import device_of_float64
from klmetric.arithmetic.native import Totals
from klmetric.arithmetic.tracing import is_recorded
from klmetric.options import Options
from klmetric.rows.rows import Rows
from klmetric.totals import histogram, pairs, vector
from klmetric.totals.histogram import Histogram

# The places in the vector after the totals. For each sample, its S is the weighted sum of its divergences and its n the
# sum of its weights: of the sums of S^2, S n and n^2 the high parts, then the low parts.
SQUARES, PRODUCTS, SIZES = range(vector.SIZE, vector.SIZE + 3)
COUNTS = vector.SIZE + 6
# Samples with a row that counts; rows that agree in their most likely class, of how many; all samples, also those of
# weight 0; the largest finite divergence, and minus the smallest above 0, so that both merge by the maximum; and where
# the bins begin.
CLUSTERS, AGREED, COMPARED, SEEN, LARGEST, SMALLEST, BINS = range(COUNTS, COUNTS + 7)

# From which size on the sums of squares are known to `pairs.PRECISION`.
LEAST = 1e-270


def asked(fineness: int, top: int) -> Totals:
    """What the kernel is asked for."""
    return BINS + histogram.size(fineness) + 3 * top, top, fineness, histogram.LOWEST, histogram.HIGHEST


def empty(options: Options, fineness: int, top: int) -> Tensor:
    """The sketch of no data at all."""
    head = vector.empty(options, also=(fineness, top))
    sums = head.new_zeros(SMALLEST - vector.SIZE)
    smallest, bins, worst = head.new_tensor([-math.inf]), head.new_zeros(histogram.size(fineness)), [-1.0] * 3 * top
    return torch.cat([head, sums, smallest, bins, head.new_tensor(worst)])


def histogram_of(sketch: Tensor, fineness: int) -> Histogram:
    """The divergences of the rows."""
    counts = sketch[BINS : BINS + histogram.size(fineness)].cpu()
    return Histogram(counts, -sketch[SMALLEST].item(), sketch[LARGEST].item())


def merge(parts: Tensor, top: int) -> Tensor:
    """The sketch of all data together, from the sketches of its parts in order, shape (parts, ...)."""

    def sums_of(parts: Tensor) -> Tensor:
        return torch.tensor(pairs.merge(parts.tolist()), dtype=torch.float64, device=parts.device)

    return _together(parts, top, vector.merge, sums_of)


def add(sketch: Tensor, batch: Tensor, top: int) -> Tensor:
    """A sketch with one more batch. It does not wait for an accelerator, as `merge` does."""
    if not is_recorded() and native.serves(sketch, batch):
        return native.add(sketch, batch, top)
    parts = torch.stack([sketch, batch])
    return _together(parts, top, lambda both: vector.add(*both), lambda both: pairs.add(*both))


def _together(
    parts: Tensor, top: int, totals_of: Callable[[Tensor], Tensor], sums_of: Callable[[Tensor], Tensor]
) -> Tensor:
    bins_end = parts.shape[1] - 3 * top
    merged = [
        totals_of(parts[:, : vector.SIZE]),
        sums_of(parts[:, vector.SIZE : COUNTS]),
        parts[:, COUNTS:LARGEST].sum(0),
        parts[:, LARGEST:BINS].amax(0),
        parts[:, BINS:bins_end].sum(0),
    ]
    if top:
        worst, sample, place = parts[:, bins_end:].reshape(-1, 3, top).unbind(1)
        seen = parts[:, SEEN].long()
        sample = torch.where(sample >= 0, sample + (seen.cumsum(0) - seen).unsqueeze(1), -1)
        order = _worst_first(worst)[:top]
        merged += [x.flatten()[order] for x in (worst, sample, place)]
    return torch.cat(merged)


def _worst_first(divergences: Tensor) -> Tensor:
    """The order of the divergences from the largest down, the first of equal ones first."""
    return divergences.flatten().sort(descending=True, stable=True).indices


def of_rows(rows: Rows, fineness: int, top: int) -> Tensor:
    """The sketch of one batch, without a fingerprint: what came with the rows, if it did."""
    if rows.totals is not None:
        return rows.totals
    if not is_recorded() and native.serves(rows.kl, rows.kl) and rows.kl.numel():
        sums = native.totals_of(rows.kl, rows.agrees, rows.weight, asked(fineness, top))
        if rows.agrees is None:
            sums[AGREED : COMPARED + 1] = 0
        return sums
    kl = rows.kl.to(device_of_float64(rows.kl.device), torch.float64)
    kl = kl.reshape(kl.shape[0], -1) if kl.ndim and kl.numel() else kl.reshape(-1, 1)
    weight = torch.ones_like(kl) if rows.weight is None else rows.weight.to(kl).reshape(kl.shape)
    sums = _sums(rows, kl, weight, fineness)
    return torch.cat([sums, *_worst(kl, weight, top)]) if top else sums


def _sums(rows: Rows, kl: Tensor, weight: Tensor, fineness: int) -> Tensor:
    """All but the worst rows, with divergences and weights as (samples, places)."""
    head = vector.of_rows(rows.kl, rows.weight)
    counted = ~kl.isnan() & (weight > 0)
    weight = torch.where(counted, weight, 0)
    kl = torch.where(counted, kl, 0)
    s, n = pairs.of_samples(kl * weight), pairs.of_samples(weight)
    sums = [pairs.total_of_products(x, y) for x, y in ((s, s), (s, n), (n, n))]
    clusters, compared = counted.any(1).sum(), counted.sum()
    if rows.agrees is None:
        agreed = compared = torch.zeros_like(compared)
    else:
        agreed = (rows.agrees.to(head.device).reshape(kl.shape) & counted).sum()
    seen = torch.full_like(compared, rows.kl.shape[0] if rows.kl.ndim else 1)
    if kl.numel():
        largest, smallest = torch.where(kl < math.inf, kl, 0).amax(), torch.where(kl > 0, -kl, -math.inf).amax()
    else:
        largest, smallest = kl.new_tensor([0, -math.inf])
    numbers = torch.stack([x.double() for x in (clusters, agreed, compared, seen, largest, smallest)])
    return torch.cat([head, torch.stack(sums, 1).flatten(), numbers, histogram.count(kl, counted, fineness)])


def _worst(kl: Tensor, weight: Tensor, top: int) -> list[Tensor]:
    """The largest divergences, their samples and their places in these; -1 where there are no more."""
    kl = kl.masked_fill(kl.isnan() | (weight == 0), -1)
    order = _worst_first(kl)[:top]
    worst, places = kl.flatten()[order], kl.shape[1]
    is_row = worst >= 0
    columns = (worst, torch.where(is_row, order // places, -1), torch.where(is_row, order % places, -1))
    return [torch.nn.functional.pad(x.to(kl), (0, top - len(x)), value=-1) for x in columns]


def standard_error(sketch: list[float]) -> float:
    r"""The standard error of the mean where the samples are independent and the rows within one need not be.

    .. math:: \sqrt{ \frac{G}{G-1} \frac{\sum_g (S_g - \bar{x} n_g)^2}{(\sum_g n_g)^2} }

    for G samples with the sums S and sizes n: that of a ratio of two totals of samples. (Cochran: Sampling Techniques,
    3rd edition, 1977, section 6.3 and 9A.) With one row of weight 1 in each it is the usual s/√G.

    NaN for fewer than two samples, where a divergence is infinite, and where squares are too large or too small for a
    number.
    """
    clusters = int(sketch[CLUSTERS])
    sums = [sketch[i] for i in (SIZES, vector.WEIGHT, vector.KL, SQUARES, PRODUCTS)]
    if not sketch[vector.KL]:
        del sums[2:]  # every divergence is 0
    if clusters < 2 or not all(LEAST < x < math.inf for x in sums):
        return math.nan
    # Each is a pair, and they are subtracted as they are: as float64 numbers they would lose half their digits.
    s, n = (Fraction(sketch[i]) + Fraction(sketch[i + vector.LOW]) for i in (vector.KL, vector.WEIGHT))
    ss, sn, nn = (Fraction(sketch[i]) + Fraction(sketch[i + 3]) for i in (SQUARES, PRODUCTS, SIZES))
    mean = s / n
    spread = ss - 2 * mean * sn + mean * mean * nn
    if spread < ss * pairs.PRECISION:  # of equal samples it is 0, and the sums are rounded
        return 0.0
    return math.sqrt(spread * clusters / ((clusters - 1) * n * n))


def why_no_error(sketch: list[float]) -> str | None:
    """Why there is no standard error, where that is to be explained: not for infinite divergences, nor for no rows."""
    if not sketch[vector.WEIGHT] > 0 or math.isinf(sketch[vector.KL]) or not math.isnan(standard_error(sketch)):
        return None
    if sketch[CLUSTERS] < 2:
        return (
            "a standard error needs at least two samples (the first axis) of weight above 0. Got one, whose rows are"
            " not taken for independent. Where each row is a sample of its own, the shape is (rows, classes)."
        )
    return (
        "the squares of divergences or weights must be numbers of float64. Got some that are too large or too small."
        " Multiply all weights by a factor, which changes no other value, to bring them into its range."
    )
