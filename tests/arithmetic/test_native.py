"""The kernel against mpmath and exact fractions, and against itself: every level, batch, order, stride and thread."""

import math
import os
import runpy
import shutil
import subprocess
import sys
import threading
from fractions import Fraction

import numpy as np
import pytest
import torch
from every_kind import INF, LOGITS, NAN, PROBS, cases_by_kind, check, reference

from klmetric.arithmetic import native, threads
from klmetric.arithmetic.level import LEVELS as ALL_LEVELS
from klmetric.arithmetic.level import LIBRARY
from klmetric.rows.rows import Rows
from klmetric.totals import sketch, vector

if native.level() is None:
    pytest.skip("there is no kernel here", allow_module_level=True)
BEST = native.level()
LEVELS = ("neon",) if BEST == "neon" else ALL_LEVELS[: ALL_LEVELS.index(BEST) + 1]
CASES = cases_by_kind((1, 2, 3, 10, 64, 128, 129, 1000, 2500))
every_kind = pytest.mark.parametrize("kind", CASES)


def measured(p, q, formats=LOGITS, temperature=1.0, **options):
    return native.measure(p, q, formats, temperature=temperature, **options).kl


@every_kind
def test_to_a_millionth_down_to_1e_13(kind):
    def measure(*case):
        return native.measure(*case[:3], temperature=case[3], agrees=True)[:2]

    for case in CASES[kind]:
        check(measure, *case, places=(0, 1, 2, 10) if len(case[0]) > 10 else (0, 2))


@every_kind
def test_a_row_has_its_bits_wherever_it_stands(kind, monkeypatch):
    for p, q, formats, temperature in CASES[kind]:
        kl, agrees, _ = native.measure(p, q, formats, temperature=temperature, agrees=True)

        def same(p, q, of=slice(None), kl=kl, options=(formats, temperature)):
            np.testing.assert_array_equal(measured(p, q, *options).numpy(), kl[of].numpy())

        order = torch.arange(len(p)).flip(0)
        same(p[order], q[order], order)
        same(p[1:3], q[1:3], slice(1, 3))
        same(p.T.contiguous().T, q.T.contiguous().T)
        same(torch.cat([p, p], 1)[:, : p.shape[1]], q.repeat_interleave(2, 1)[:, ::2])
        with monkeypatch.context() as patch:
            for level in LEVELS:
                patch.setattr(native, "level", lambda level=level: level)
                same(p, q)
                there = native.measure(p, q, formats, temperature=temperature, agrees=True).agrees
                assert torch.equal(there, agrees)


@pytest.mark.parametrize("of_p", [-1e5, -1e7, -1e9, -1e12, -1e30, float(np.finfo(np.float32).min)])
@pytest.mark.parametrize("of_q", [-100, -1e4, -1e9, -1e30, -INF])
@pytest.mark.parametrize("classes", [1026, 3000])
def test_blocks_that_are_masked(of_p, of_q, classes):
    """In p by a number so large that beside it the logits of q have no digits."""
    p, q = (torch.randn(3, classes, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    p[:, 1024:], q[:, 1024:] = of_p, of_q
    log_p, log_q = (x.double().log_softmax(-1)[:, :1024] for x in (p, q))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(measured(p, q), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("constant", [1e6, 1e9, 1e15])
def test_a_constant_between_wide_rows(constant):
    p = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = p + torch.rand_like(p).round() / 2**10 + constant
    log_p, log_q = p.log_softmax(-1), (q - constant).log_softmax(-1)
    t = log_q - log_p
    expected = (log_p.exp() * (t.expm1() - t)).sum(-1)
    torch.testing.assert_close(measured(p, q), expected, rtol=1e-6, atol=0)


@every_kind
def test_shares_of_rows_are_the_same_at_every_level(kind, monkeypatch):
    for p, q, *options in CASES[kind]:
        shares = native.shares(p, q, *options)
        again = native.second_shares(p, q, *options, shares[:4])
        with monkeypatch.context() as patch:
            for level in LEVELS:
                patch.setattr(native, "level", lambda level=level: level)
                np.testing.assert_array_equal(native.shares(p, q, *options), shares)
                np.testing.assert_array_equal(native.second_shares(p, q, *options, shares[:4]), again)
                np.testing.assert_array_equal(native.shares(p[1:3], q[1:3], *options), shares[:, 1:3])


@pytest.mark.parametrize("classes", [2, 30, 200])
@pytest.mark.parametrize("direction", ["reverse", "jeffreys"])
def test_directions(direction, classes):
    p, q = torch.randn(40, classes), torch.randn(40, classes)
    back = measured(q, p)
    expected = back if direction == "reverse" else measured(p, q) + back
    assert torch.equal(native.measure(p, q, LOGITS, direction).kl, expected)


@pytest.mark.parametrize("classes", [5, 300])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x[:, 1:],
        lambda x: x[::2, :, :1],
        lambda x: x.transpose(0, 1),
        lambda x: x.permute(1, 2, 0, 3)[:, 1:],
        lambda x: x[:, :, :, None].movedim(-1, 1),
        lambda x: x.transpose(1, 2)[:, :, None, 1:],
        lambda x: x[:, None, :, 1:3].expand(3, 2, 4, 2, x.shape[-1]),
        lambda x: x.repeat(9, 1, 1, 1).transpose(0, 2)[1:, :, ::2],
        lambda x: x[0, 0, 0],
        lambda x: x[:0],
    ],
)
def test_any_axes(view, classes):
    p, q = view(torch.randn(3, 4, 5, classes)), view(torch.randn(5, 4, 3, classes).transpose(0, 2))
    kl, _, totals = native.measure(p, q, LOGITS, totals=ASKED)
    assert kl.shape == p.shape[:-1]
    there = native.measure(p.contiguous(), q.contiguous(), LOGITS, totals=ASKED)
    assert torch.equal(kl, there.kl)
    if kl.numel():
        assert torch.equal(totals, there.totals)


def test_of_views_that_are_negated():
    x = torch.rand(3, 40, 5, dtype=torch.float64)
    p, q, weight = torch.complex(x, -x).conj().imag.unbind(0)  # as is the imaginary part of a conjugate
    assert p.is_neg()
    there = native.measure(x[0], x[1], PROBS, weight=x[2, :, 0].contiguous(), totals=ASKED)
    here = native.measure(p, q, PROBS, weight=weight[:, 0], totals=ASKED)
    assert torch.equal(here.kl, there.kl)
    assert torch.equal(here.totals, there.totals)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.3])
@pytest.mark.parametrize("classes", [100, 300, 1000, 1023, 1024, 2047, 4096])
def test_classes_that_are_all_alike_but_one(classes, temperature):
    # As in smoothed labels: every rounding of a sum goes the same way.
    g = torch.Generator().manual_seed(classes)
    p, q = (5 * torch.randn(30, 1, generator=g) * torch.ones(classes) for _ in range(2))
    p[:, classes // 3] += 1 + 11 * torch.rand(30, generator=g)
    q[::2, classes // 2] += 12 * torch.rand(15, generator=g)
    found = measured(p, q, temperature=temperature)
    in_probs = measured(p.softmax(-1), q.softmax(-1), PROBS)
    for row in range(0, 30, 7):
        assert found[row] == pytest.approx(reference(p[row], q[row], LOGITS, temperature), rel=1e-6)
        expected = reference(p[row].softmax(-1), q[row].softmax(-1), PROBS)
        assert in_probs[row] == pytest.approx(expected, rel=1e-6)


def test_what_a_masked_neighbour_changes():
    p, q = torch.tensor([[1.0, 2.0]]), torch.tensor([[-99.0, -98.5]])  # so far below that exp would overflow
    masked = torch.tensor([[-INF, 0.0]])
    together = measured(torch.cat([p, masked]), torch.cat([q, torch.zeros(1, 2)]))
    assert torch.equal(together[:1], measured(p, q))


FINENESS, TOP = 9, 3
ASKED = sketch.asked(FINENESS, TOP)


@pytest.mark.parametrize("shape", [(1000,), (3, 333), (1, 1000), (1000, 1)])
def test_threads(shape):
    p = torch.randn(*shape, 300)
    q = p + 0.1 * torch.randn(p.shape)
    weight = torch.rand(shape)
    one = native.measure(p, q, LOGITS, agrees=True, weight=weight, totals=ASKED, threads=1)
    for many in (2, 3, 7):
        other = native.measure(p, q, LOGITS, agrees=True, weight=weight, totals=ASKED, threads=many)
        assert all(map(torch.equal, one, other))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be sent to a core here")
def test_threads_that_wake_leave_the_core_of_this_one_alone():
    allowed = os.sched_getaffinity(0)
    p = torch.randn(1000, 300)
    for _ in range(20):  # the first ones make them
        native.measure(p, p, LOGITS, threads=2)
    cores = [os.sched_getaffinity(thread.native_id) for thread in threading.enumerate() if "klmetric" in thread.name]
    few = 1 < len(allowed) <= threads.FEW_CORES
    assert cores
    assert all(each < allowed if few else each == allowed for each in cores)
    assert os.sched_getaffinity(0) == allowed


def no_low_parts(x):
    return torch.cat([x[: vector.LOW], x[sketch.SQUARES : sketch.SIZES + 1], x[sketch.COUNTS :]])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(50,), (50, 1), (50, 2), (50, 7), ()])
def test_totals_are_the_sketch_of_the_rows(shape, weighted, monkeypatch):
    g = torch.Generator().manual_seed(len(shape))
    for classes in (3, 200):
        p = torch.randn(*shape, classes, generator=g) * 3
        q = p + torch.randn(p.shape, generator=g) * torch.logspace(-6, 1, p.numel()).view(p.shape)
        rows = math.prod(shape)
        for x, place, bad in ((p, 3, NAN), (q, 4, -INF)) if rows > 4 else ():
            x.view(-1, classes)[place, 1] = bad
        weight = torch.rand(shape, generator=g, dtype=torch.float64).round(decimals=1) if weighted else None
        kl, agrees, totals = native.measure(p, q, LOGITS, weight=weight, agrees=True, totals=ASKED)
        rows = Rows(kl, weight, agrees)
        assert torch.equal(sketch.of_rows(rows, FINENESS, TOP), totals), "of rows that are known already"
        with monkeypatch.context() as patch:
            patch.setattr(native, "serves", lambda a, b: False)
            expected = sketch.of_rows(rows, FINENESS, TOP)
        assert totals.shape == expected.shape
        torch.testing.assert_close(no_low_parts(totals), no_low_parts(expected), rtol=1e-15, atol=0)
        head = native.measure(p, q, LOGITS, weight=weight, totals=vector.ASKED).totals
        assert torch.equal(head, totals[: vector.SIZE])


def test_totals_of_rows_that_cannot_agree(monkeypatch):
    kl = torch.rand(9, 2, dtype=torch.float64).T  # not in a row in memory
    rows = Rows(kl, torch.arange(18).reshape(2, 9) % 3)
    totals = sketch.of_rows(rows, FINENESS, TOP)
    monkeypatch.setattr(native, "serves", lambda a, b: False)
    expected = sketch.of_rows(rows, FINENESS, TOP)
    torch.testing.assert_close(no_low_parts(totals), no_low_parts(expected), rtol=1e-15, atol=0)
    assert not totals[sketch.COMPARED]


@pytest.mark.parametrize("shape", [(40,), (10, 4)])
@pytest.mark.parametrize("asked", [vector.ASKED, ASKED, sketch.asked(FINENESS, 50)], ids=["vector", "sketch", "top"])
def test_totals_are_added_as_elsewhere(asked, shape, monkeypatch):
    p, q = torch.randint(2, (2, 4, *shape, 3)).float().unbind(0)  # many rows are as far apart as others
    p[0, 0], q[1, 1] = NAN, -INF
    p[3, 3, ..., 1:], q[3, 3, ..., 0] = -INF, -INF
    parts = [native.measure(a, b, LOGITS, agrees=True, totals=asked).totals for a, b in zip(p, q, strict=True)]
    size, top = asked[:2]
    whole, in_one = parts[0], parts[0]
    for part, a, b in zip(parts[1:], p[1:], q[1:], strict=True):
        one, before = native.add(whole, part, top), whole.clone()
        with monkeypatch.context() as patch:
            patch.setattr(native, "serves", lambda a, b: False)
            expected = vector.add(whole, part) if size == vector.SIZE else sketch.add(whole, part, top)
        assert torch.equal(one, expected)
        assert torch.equal(whole, before)
        whole = one
        in_one = native.measure(a, b, LOGITS, agrees=True, totals=asked, before=in_one.repeat_interleave(2)[::2]).totals
        assert torch.equal(in_one, whole)
    if size > vector.SIZE:
        torch.testing.assert_close(whole, sketch.merge(torch.stack(parts), top), rtol=1e-15, atol=1e-15)
    marked = native.add(torch.arange(size).double(), torch.zeros(size).double(), top)
    assert marked[vector.MARKS].tolist() == [vector.FINGERPRINT, vector.FINGERPRINT + 1]


def test_sums_are_of_a_hundred_bits():
    p, q = torch.randn(2, 5000, 3).unbind(0)
    weight = torch.rand(5000, dtype=torch.float64)
    kl, _, totals = native.measure(p, q, LOGITS, weight=weight, totals=ASKED)
    s = [Fraction(x) for x in (kl * weight).tolist()]
    n = [Fraction(x) for x in weight.tolist()]
    pairs = {
        (vector.KL, vector.KL + vector.LOW): sum(s),
        (vector.WEIGHT, vector.WEIGHT + vector.LOW): sum(n),
        (sketch.SQUARES, sketch.SQUARES + 3): sum(x * x for x in s),
        (sketch.PRODUCTS, sketch.PRODUCTS + 3): sum(x * y for x, y in zip(s, n, strict=True)),
        (sketch.SIZES, sketch.SIZES + 3): sum(x * x for x in n),
    }
    for (high, low), true in pairs.items():
        assert totals[high] == float(true)
        assert abs(Fraction(totals[high].item()) + Fraction(totals[low].item()) - true) <= true / 2**95


def test_half_precision_numbers_are_read_exactly():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = every.view(dtype).view(-1, 1).expand(-1, 2).clone()
        x[:, 1] = 1
        assert torch.equal(
            measured(x, torch.ones_like(x)).nan_to_num(nan=-1),
            measured(x.float(), torch.ones(x.shape)).nan_to_num(nan=-1),
        )


def run(code, level):
    env = {**os.environ, "KLMETRIC_KERNEL": level}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


@pytest.mark.skipif(BEST == "neon", reason="there is one level")
def test_a_level_that_cannot_run_is_named():
    done = run("from klmetric.arithmetic.level import level; level()", "fast")
    assert "KLMETRIC_KERNEL must be a level that this processor can run: plain, baseline" in done.stderr


@pytest.mark.slow
def test_levels_that_are_asked_for():
    code = (
        "import torch; from klmetric.arithmetic import native\n"
        "p, q = torch.randn(2, 40, 1500, generator=torch.Generator().manual_seed(0)).unbind(0)\n"
        "print(native.level(), [x.hex() for x in native.measure(p, q, ('logits', 'logits')).kl.tolist()])"
    )
    told, values = zip(*(run(code, level).stdout.split(" ", 1) for level in LEVELS), strict=True)
    assert told == LEVELS
    assert len(set(values)) == 1


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="there is no other compiler here")
def test_two_compilers_make_the_same_bits(tmp_path, monkeypatch):
    build = runpy.run_path(str(LIBRARY.parent / "kernel" / "build.py"))
    of_level = next(levels[BEST] for levels in build["LEVELS"].values() if BEST in levels)[0].split()
    made, source = tmp_path / "other.so", LIBRARY.parent / "kernel" / "kernel.cpp"
    flags = [*build["FLAGS"].replace("-O2", "-O1").split(), *of_level, f"-DLEVEL={BEST}", "-DANY_COMPILER", "-w"]
    subprocess.run(["g++", *flags, "-fPIC", "-shared", source, "-o", made], check=True)
    ours = [measured(*case) for cases in CASES.values() for case in cases]
    monkeypatch.setattr(native, "LIBRARY", made)
    other = native._functions.__wrapped__(BEST)
    monkeypatch.setattr(native, "_functions", lambda level: other)
    theirs = [measured(*case) for cases in CASES.values() for case in cases]
    for kl, there in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(there.numpy(), kl.numpy())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_right_after_a_fork():
    p, q = torch.randn(1000, 300), torch.randn(1000, 300)
    expected = measured(p, q, threads=2)
    child = os.fork()
    if not child:
        os._exit(0 if torch.equal(measured(p, q, threads=2), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
