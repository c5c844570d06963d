"""Pairs of rows of every kind, and their divergences in sixty digits: what a kernel must get right."""

import math

import mpmath
import numpy as np
import torch

LOGITS, PROBS = ("logits", "logits"), ("probs", "probs")
MIXED, OTHER = ("probs", "log_probs"), ("logits", "probs")
INF, NAN = math.inf, math.nan


def reference(p, q, formats=LOGITS, temperature=1.0, direction="forward"):
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
        if direction == "jensen_shannon":
            for a, b in zip(*logs, strict=True):
                x, y = mpmath.exp(a), mpmath.exp(b)
                terms += [z * mpmath.log(2 * z / (x + y)) / 2 for z in (x, y) if z]
            return float(mpmath.fsum(terms))
        for a, b in zip(*logs, strict=True):
            if a > -745.1332191019412:  # else its probability is 0 in float64
                if b == -mpmath.inf:
                    return INF
                terms.append(mpmath.exp(a) * (a - b))
        return float(mpmath.fsum(terms))


def cases(widths):
    """Pairs of every kind: name, p, q, formats, temperature."""
    g = torch.Generator().manual_seed(0)
    for classes in widths:
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


def cases_by_kind(widths):
    """The pairs of each kind, as (p, q, formats, temperature)."""
    found = {}
    for kind, *case in cases(widths):
        found.setdefault(kind, []).append(case)
    return found


def check(measure, p, q, formats, temperature, places, direction="forward"):
    """Hold `measure(p, q, formats, temperature)`, which gives divergences and agreements, to 60 digits in some rows."""
    kl, agrees = measure(p, q, formats, temperature)
    assert kl.dtype == torch.float64
    assert not (kl < 0).any()
    for i in places:
        true = reference(p[i], q[i], formats, temperature, direction)
        if math.isfinite(true):
            assert abs(kl[i].item() - true) <= 1e-6 * max(true, 1e-13), (p.shape, i)
        else:
            np.testing.assert_equal(kl[i].item(), true)
    # The first of the largest classes is the most likely one.
    sound = ~kl.isnan()
    assert torch.equal(agrees[sound], (p.double().argmax(-1) == q.double().argmax(-1))[sound])
    if formats[0] == formats[1]:
        same, _ = measure(p, p, formats, temperature)
        assert ((same == 0) | same.isnan()).all()
