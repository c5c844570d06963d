"""The kernel against mpmath and exact fractions, and against itself: every level, batch, order, stride and thread."""

import math
import os
import subprocess
import sys
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from klmetric import histogram
from klmetric.arithmetic import native

LOGITS, PROBS = ("logits", "logits"), ("probs", "probs")
MIXED, OTHER = ("probs", "log_probs"), ("logits", "probs")
INF, NAN = math.inf, math.nan

if native.level() is None:
    pytest.skip("there is no kernel here", allow_module_level=True)
BEST = native.level()
LEVELS = ("neon",) if BEST == "neon" else native.LEVELS[: native.LEVELS.index(BEST) + 1]
WIDTHS = (1, 2, 3, 10, 64, 65, 100, 1000, 1024, 2500)


def reference(p, q, formats=LOGITS, temperature=1.0):
    """One row in 60 digits; NaN where it is no pair of distributions."""
    with mpmath.workdps(60):
        logs = []
        for x, form in zip((p, q), formats, strict=True):
            x = [mpmath.mpf(v) for v in x.double().tolist()]
            if any(mpmath.isnan(v) or v == mpmath.inf for v in x) or (form == "probs" and min(x) < 0):
                return NAN
            x = [(mpmath.log(v) if v else mpmath.mpf("-inf")) if form == "probs" else v for v in x]
            if max(x) == -mpmath.inf:
                return NAN
            x = [v / mpmath.mpf(temperature) for v in x]
            top = max(x)
            mass = top + mpmath.log(mpmath.fsum(mpmath.exp(v - top) for v in x))
            logs.append([v - mass for v in x])
        terms = []
        for a, b in zip(*logs, strict=True):
            if a > -745.1332191019412:  # else its probability is 0 in float64
                if b == -mpmath.inf:
                    return INF
                terms.append(mpmath.exp(a) * (a - b))
        return float(mpmath.fsum(terms))


def cases():
    """Pairs of every kind: name, p, q, formats, temperature."""
    g = torch.Generator().manual_seed(0)
    for classes in WIDTHS:
        n = 21 if classes < 100 else 3

        def noise(n=n, classes=classes):
            return torch.randn(n, classes, generator=g, dtype=torch.float64)

        a, masked = noise() * 3, torch.rand(n, classes, generator=g) < 0.4
        masked[:, 0] = False
        p = a.softmax(-1)
        for size in (4e-7, 1e-3, 1, 6):
            yield f"logits {size}", a.float(), (a + size * noise()).float(), LOGITS, 1.0
            yield f"probs {size}", p.float(), (a + size * noise()).softmax(-1).float(), PROBS, 1.0
        for offset in (20, 1e4, 1e6):
            yield f"offset {offset}", a.float(), (a + offset + 1e-2 * noise()).float(), LOGITS, 1.0
        near = a + 0.1 * noise()
        yield "masked in both", a.float().masked_fill(masked, -INF), near.float().masked_fill(masked, -INF), LOGITS, 1.0
        yield "masked in p", a.float().masked_fill(masked, -INF), near.float(), LOGITS, 1.0
        yield "masked in p, offset", a.float().masked_fill(masked, -INF), (near + 1e4).float(), LOGITS, 1.0
        yield "masked in q", near.float(), a.float().masked_fill(masked, -INF), LOGITS, 1.0
        yield "finite mask", a.float().masked_fill(masked, -3e38), near.float().masked_fill(masked, -3e38), LOGITS, 1.0
        yield "peaked", (a * 30).float(), (a * 20).float(), LOGITS, 1.0
        yield "very peaked", (a * 300).float(), near.float(), LOGITS, 1.0
        yield (
            "zeros in both",
            p.float().masked_fill(masked, 0),
            near.softmax(-1).float().masked_fill(masked, 0),
            PROBS,
            1.0,
        )
        yield "zeros in p", p.float().masked_fill(masked, 0), near.softmax(-1).float(), PROBS, 1.0
        yield "zeros in q", p.float(), near.softmax(-1).float().masked_fill(masked, 0), PROBS, 1.0
        yield "unnormalised", p.float() * 1e37, near.softmax(-1).float() * 1e-20, PROBS, 1.0
        yield "warm", a.float(), near.float(), LOGITS, 2.3
        yield "warm probs", p.float(), near.softmax(-1).float(), PROBS, 2.3
        yield "probs, log_probs", p.float(), (a + 1e-3 * noise()).log_softmax(-1).float(), MIXED, 1.0
        yield "zeros, log_probs", p.float().masked_fill(masked, 0), near.log_softmax(-1).float(), MIXED, 1.0
        yield "logits, probs", a.float(), (a + 1e-3 * noise()).softmax(-1).float(), OTHER, 1.0
        yield "float64", a, a + 1e-6 * noise(), LOGITS, 1.0
        yield "float64 probs", p, (a + 1e-6 * noise()).softmax(-1), PROBS, 1.0
        yield "float64, offset", a, a + 1e4 + 1e-5 * noise(), LOGITS, 1.0
        yield "bfloat16", a.bfloat16(), near.bfloat16(), LOGITS, 1.0
        yield "float16 probs", p.half(), near.softmax(-1).half(), PROBS, 1.0
        yield "float16, float32", a.half(), near.float(), LOGITS, 1.0
        yield "bfloat16, float64", a.bfloat16(), near, LOGITS, 1.0
        bad = a.float().clone()
        bad[::3, classes // 2], bad[1::3, classes // 2], bad[2::5] = NAN, INF, -INF
        yield "bad p", bad, a.float(), LOGITS, 1.0
        yield "bad q", a.float(), bad, LOGITS, 1.0
        bad = p.float().clone()
        bad[::3, classes // 2], bad[1::3, classes // 2], bad[2::5] = NAN, -1e-3, 0
        yield "bad probs", bad, p.float(), PROBS, 1.0


CASES = list(cases())
every_case = pytest.mark.parametrize(
    ("p", "q", "formats", "temperature"),
    [pytest.param(*case[1:], id=f"{case[0]}, {case[1].shape[1]}") for case in CASES],
)


def measured(p, q, formats=LOGITS, temperature=1.0, **options):
    return native.measure(p, q, formats, temperature=temperature, **options).kl


@every_case
def test_to_a_millionth_down_to_1e_13(p, q, formats, temperature):
    kl = measured(p, q, formats, temperature)
    for i in {0, 1, 2, len(p) // 2}:
        true = reference(p[i], q[i], formats, temperature)
        if math.isfinite(true):
            assert abs(kl[i].item() - true) <= 1e-6 * max(true, 1e-13), i
        else:
            np.testing.assert_equal(kl[i].item(), true)
    assert not (kl < 0).any()


@every_case
def test_a_row_has_its_bits_wherever_it_stands(p, q, formats, temperature, monkeypatch):
    kl, agrees, *_ = native.measure(p, q, formats, temperature=temperature, agrees=True)

    def same(other, order=slice(None)):
        np.testing.assert_array_equal(other.numpy(), kl[order].numpy())

    for level in LEVELS:
        monkeypatch.setattr(native, "level", lambda level=level: level)
        there, also, *_ = native.measure(p, q, formats, temperature=temperature, agrees=True)
        same(there)
        assert torch.equal(also, agrees)
    monkeypatch.undo()
    order = torch.arange(len(p)).flip(0)
    same(measured(p[order], q[order], formats, temperature), order)
    same(measured(p[1:3], q[1:3], formats, temperature), slice(1, 3))
    same(measured(p.T.contiguous().T, q.T.contiguous().T, formats, temperature))
    same(measured(torch.cat([p, p], 1)[:, : p.shape[1]], q.repeat_interleave(2, 1)[:, ::2], formats, temperature))


@every_case
def test_the_most_likely_class_is_the_first_of_equals(p, q, formats, temperature):
    agrees = native.measure(p, q, formats, temperature=temperature, agrees=True).agrees
    sound = ~native.measure(p, q, formats, temperature=temperature).kl.isnan()
    assert torch.equal(agrees[sound], (p.double().argmax(-1) == q.double().argmax(-1))[sound])


@every_case
def test_equal_rows_are_exactly_0(p, q, formats, temperature):
    if formats[0] == formats[1]:
        kl = measured(p, p, formats, temperature)
        assert ((kl == 0) | kl.isnan()).all()


@pytest.mark.parametrize("classes", (2, 30, 200))
@pytest.mark.parametrize("direction", ("reverse", "jeffreys"))
def test_directions(direction, classes):
    p, q = torch.randn(40, classes), torch.randn(40, classes)
    back = measured(q, p)
    expected = back if direction == "reverse" else measured(p, q) + back
    assert torch.equal(native.measure(p, q, LOGITS, direction).kl, expected)


@pytest.mark.parametrize("classes", (5, 300))
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x[:, 1:],
        lambda x: x[::2, :, :1],
        lambda x: x.transpose(0, 1),
        lambda x: x.permute(1, 2, 0, 3)[:, 1:],
        lambda x: x[:, :, :, None].movedim(-1, 1),
        lambda x: x[0, 0, 0],
        lambda x: x[:0],
    ],
)
def test_any_axes(view, classes):
    p, q = view(torch.randn(3, 4, 5, classes)), view(torch.randn(5, 4, 3, classes).transpose(0, 2))
    kl = measured(p, q)
    assert kl.shape == p.shape[:-1]
    assert torch.equal(kl, measured(p.contiguous(), q.contiguous()))


def test_threads_and_wide_strides():
    p = torch.randn(1000, 300)
    q = p + 0.1 * torch.randn(1000, 300)
    first = native.measure(p, q, LOGITS, totals=True, bins=(5, -40, 14), threads=1)
    for threads in (2, 3, 7):
        there = native.measure(p, q, LOGITS, totals=True, bins=(5, -40, 14), threads=threads)
        assert torch.equal(there.kl, first.kl)
        assert torch.equal(there.bins, first.bins)
        assert there.totals[: native.LOW] == first.totals[: native.LOW]
        assert there.totals[2 * native.LOW :] == first.totals[2 * native.LOW :]


@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("positions", (1, 2, 7))
@pytest.mark.parametrize("classes", (3, 200))
def test_totals_are_those_of_the_rows(classes, positions, weighted):
    g = torch.Generator().manual_seed(classes + positions)
    p = torch.randn(50, positions, classes, generator=g) * 3
    q = p + torch.randn(p.shape, generator=g) * torch.logspace(-6, 1, 50)[:, None, None]
    p[3, 0, 1], q[4, 0, 1] = NAN, -INF
    weight = torch.rand(50, positions, generator=g, dtype=torch.float64).round(decimals=1) if weighted else None
    kl, agrees, totals, bins = native.measure(p, q, LOGITS, weight=weight, agrees=True, totals=True, bins=(5, -40, 14))
    weight = torch.ones(50, positions, dtype=torch.float64) if weight is None else weight
    counted = ~kl.isnan() & (weight > 0)
    sums = dict(zip(native.SUMS, zip(totals[: native.LOW], totals[native.LOW :]), strict=False))
    finite = torch.where(counted & kl.isfinite(), kl, 0)
    infinite = bool((counted & kl.isinf()).any())
    w = torch.where(counted, weight, 0)

    def fraction(x):
        return [[Fraction(v) for v in row] for row in x.tolist()]

    exact = {"weight": sum(map(sum, fraction(w))), "samples": sum(max(row) for row in fraction(w))}
    if not infinite:
        exact["kl"] = sum(map(sum, fraction(finite * w)))
    n = [Fraction(math.fsum(row)) if positions == 1 else Fraction(row_sum(row)) for row in w.tolist()]
    exact["sizes"] = sum(x * x for x in n)
    if not infinite:
        s = [Fraction(row_sum(row)) for row in (finite * w).tolist()]
        exact["squares"], exact["products"] = sum(x * x for x in s), sum(x * y for x, y in zip(s, n, strict=True))
    for name, value in exact.items():
        high, low = sums[name]
        assert high == float(value), name
        assert abs(Fraction(high) + Fraction(low) - value) <= value * Fraction(1, 2**95), name
    if infinite:
        assert sums["kl"] == (INF, 0)
    counts = dict(zip(native.COUNTS, totals[2 * native.LOW :], strict=False))
    assert counts["rows"] == (weight > 0).sum()
    assert counts["invalid"] == (kl.isnan() & (weight > 0)).sum()
    assert counts["infinite"] == (kl.isinf() & counted).sum()
    assert counts["clusters"] == counted.any(1).sum()
    assert counts["agreed"] == (agrees & counted).sum()
    assert counts["compared"] == counted.sum()
    assert totals[native.MAX] == kl[counted].max()
    assert torch.equal(bins.double(), histogram.count(kl, counted, 5))


def row_sum(row):
    total = 0.0
    for x in row:
        total += x
    return total


def test_half_precision_numbers_are_read_exactly():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = every.view(dtype).view(-1, 1).expand(-1, 2).clone()
        x[:, 1] = 1
        assert torch.equal(
            measured(x, torch.ones_like(x)).nan_to_num(nan=-1),
            measured(x.float(), torch.ones(x.shape)).nan_to_num(nan=-1),
        )


def test_a_level_that_cannot_run_is_named():
    code = "from klmetric.arithmetic import native; native.level()"
    env = {**os.environ, "KLMETRIC_KERNEL": "fast"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    if BEST != "neon":
        assert "KLMETRIC_KERNEL must be a level that this processor can run: plain, baseline" in done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_right_after_a_fork():
    p, q = torch.randn(1000, 300), torch.randn(1000, 300)
    expected = measured(p, q, threads=2)
    child = os.fork()
    if not child:
        os._exit(0 if torch.equal(measured(p, q, threads=2), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
