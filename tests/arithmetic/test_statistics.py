"""What is known of a row besides its divergence, against its definition in 60 digits."""

import math

import mpmath
import pytest
import torch
from reference import distribution

from klmetric import kl_divergence
from klmetric.arithmetic import native
from klmetric.arithmetic.statistics import Statistics, statistics
from klmetric.options import Options
from klmetric.rows.measure import measure

PROMISE = 1e-6


@pytest.fixture(autouse=True, params=["kernel", "plain"])
def both_ways(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(native, "serves", lambda *_: False)
    elif native.level() is None:
        pytest.skip("there is no kernel here")


def exact(p, q, formats=("logits", "logits"), temperature=1.0):
    a, b = distribution(p, formats[0], temperature), distribution(q, formats[1], temperature)

    def kl(x, y):
        return mpmath.fsum(mpmath.inf if v == 0 else u * mpmath.log(u / v) for u, v in zip(x, y, strict=True) if u)

    middle = [(x + y) / 2 for x, y in zip(a, b, strict=True)]
    return {
        "reverse": kl(b, a),
        "jensen_shannon": (kl(a, middle) + kl(b, middle)) / 2,
        "total_variation": mpmath.fsum(abs(x - y) for x, y in zip(a, b, strict=True)) / 2,
        "confidence": max(a),
    }


def log_mass(x, input_format, temperature):
    values = [mpmath.mpf(v) for v in x.double().tolist()]
    if input_format == "probs":
        return mpmath.log(mpmath.fsum(v ** (1 / mpmath.mpf(temperature)) for v in values if v))
    return mpmath.log(mpmath.fsum(mpmath.exp(v / mpmath.mpf(temperature)) for v in values if v != -mpmath.inf))


def random(rows, classes, seed=0, dtype=torch.float64):
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 3


def near(distance, dtype=torch.float64, offset=0.0, classes=50):
    p = random(4, classes, dtype=dtype)
    return p, p + distance * random(4, classes, 1, dtype) + offset


CASES = {
    **{f"distance {d:g}": near(d) for d in (1e-7, 1e-5, 1e-3, 0.1, 1.0, 10.0)},
    "float32": near(1e-4, torch.float32),
    "half precision": tuple(x.half() for x in near(0.01)),
    "an offset": near(1e-4, offset=3.7),
    "a large offset": near(1e-2, offset=1e4),
    "wide": near(1e-4, classes=40_000),
    "a large offset in float32": near(1e-2, torch.float32, offset=1e3),
    "far tails": tuple(100 * x for x in near(1.0)),
    "one class is off": (torch.zeros(1, 5).double(), torch.tensor([[0, 0, 0, 0, 5.0]]).double()),
}


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("case", CASES)
def test_the_definition(case, temperature):
    p, q = CASES[case]
    p, q = (p[:1], q[:1]) if p.shape[-1] > 1000 else (p, q)
    found = statistics(p, q, ("logits", "logits"), temperature)
    for row in range(len(p)):
        for name, value in exact(p[row], q[row], temperature=temperature).items():
            # Nothing is promised below 1e-13 nats.
            assert getattr(found, name)[row].item() == pytest.approx(float(value), rel=PROMISE, abs=1e-19), name
        for x, ours in ((p, found.log_mass_p), (q, found.log_mass_q)):
            theirs = log_mass(x[row], "logits", temperature)
            sharp = torch.float64 in (p.dtype, q.dtype)
            within = 1e-13 * (1 + abs(float(theirs))) if sharp else PROMISE
            assert ours[row].item() == pytest.approx(float(theirs), rel=0, abs=within)


@pytest.mark.parametrize("classes", [3, 200, 2000])
@pytest.mark.parametrize("mask", [-1e9, -1e12, -1e20, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_class_of_q_that_is_masked_with_a_number(classes, mask, dtype):
    p, q = near(0.3, dtype, classes=classes)
    q[:, 1] = mask
    found = statistics(p[:2], q[:2], ("logits", "logits"))
    for row in range(2):
        expected = exact(p[row], q[row])
        for name in ("jensen_shannon", "total_variation", "reverse"):
            assert getattr(found, name)[row].item() == pytest.approx(float(expected[name]), rel=PROMISE), name
        theirs = float(log_mass(q[row], "logits", 1.0))
        assert found.log_mass_q[row].item() == pytest.approx(
            theirs, rel=0, abs=1e-11 if dtype.itemsize > 4 else PROMISE
        )


@pytest.mark.parametrize("both_ways", ["kernel", "plain"], indirect=True)
def test_one_class_is_no_difference(both_ways):
    p = 1e4 * torch.randn(50, 1)
    found = statistics(p, torch.randn(50, 1), ("logits", "logits"), 0.3)
    assert all((x == 0).all() for x in found[:4])
    assert found.agree.all()


@pytest.mark.parametrize("formats", [("probs", "probs"), ("probs", "logits"), ("log_probs", "probs")])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_formats(formats, temperature):
    logits = near(1e-3)
    p, q = (x.softmax(-1) * 7 if f == "probs" else x for x, f in zip(logits, formats, strict=True))
    found = statistics(p, q, formats, temperature)
    for row in range(len(p)):
        for name, value in exact(p[row], q[row], formats, temperature).items():
            assert getattr(found, name)[row].item() == pytest.approx(float(value), rel=PROMISE), name
        for x, f, ours in ((p, formats[0], found.log_mass_p), (q, formats[1], found.log_mass_q)):
            assert ours[row].item() == pytest.approx(float(log_mass(x[row], f, temperature)), rel=1e-13)


@pytest.mark.parametrize("classes", [10, 200, 3000])
def test_what_comes_with_the_divergence(classes):
    p, q = near(1e-3, torch.float32, classes=classes)
    every = statistics(p, q, ("logits", "logits"))
    few = statistics(p, q, ("logits", "logits"), ks=(1,), measures=False)
    for name in ("kl", "log_mass_p", "log_mass_q", "confidence"):
        assert torch.equal(getattr(few, name), getattr(every, name)), name
    assert torch.equal(few.agree[:, 0], every.agree[:, 0])


@pytest.mark.parametrize("classes", [10, 200, 3000])
def test_the_divergence_is_that_of_the_library(both_ways, classes):
    p, q = near(0.3, torch.float32, classes=classes)
    ours = statistics(p, q, ("logits", "logits"), measures=False).kl
    theirs = measure(p, q, None, Options(("logits", "logits"))).kl
    assert torch.equal(ours, theirs), "to the last bit"


def test_the_reverse_is_that_of_the_library():
    p, q = near(0.3)
    ours = statistics(p, q, ("logits", "logits")).reverse
    theirs = kl_divergence(p, q, input_format="logits", direction="reverse", reduction="none").double()
    torch.testing.assert_close(ours, theirs, rtol=PROMISE, atol=0)


class TestConventions:
    def test_zeros(self):
        p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])
        found = statistics(p, q, ("probs", "probs"))
        assert found.reverse.item() == pytest.approx(math.log(2)), "q is 0 where p is not: only KL(p‖q) is infinite"
        assert found.total_variation.item() == pytest.approx(0.5)
        back = statistics(q, p, ("probs", "probs"))
        assert back.reverse.item() == math.inf
        assert back.jensen_shannon.item() == pytest.approx(found.jensen_shannon.item(), rel=1e-15)

    @pytest.mark.parametrize("distance", [50, 700, 900, 1e4])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_reverse_of_classes_without_p(self, distance, dtype):
        p, q = torch.tensor([[0.0, -distance]], dtype=dtype), torch.tensor([[-distance, 0.0]], dtype=dtype)
        assert statistics(p, q, ("logits", "logits")).reverse.item() == pytest.approx(distance, rel=PROMISE)

    def test_no_distribution_with_ties(self):
        found = statistics(torch.tensor([[math.nan, 1.0, 1.0]]), torch.ones(1, 3), ("logits", "logits"))
        assert found.kl.isnan().all()
        assert not found.agree.any()

    def test_nothing_in_common(self):
        p, q = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        found = statistics(p, q, ("probs", "probs"))
        assert found.jensen_shannon.item() == math.log(2)
        assert [found.total_variation.item(), found.reverse.item(), found.confidence.item()] == [1, math.inf, 1]

    def test_masks_on_both_sides(self):
        p, q = near(0.1)
        mask = torch.full((4, 3), -math.inf).double()
        plain = statistics(p, q, ("logits", "logits"))
        masked = statistics(torch.cat([p, mask], 1), torch.cat([q, mask], 1), ("logits", "logits"))
        for name in Statistics._fields:
            torch.testing.assert_close(getattr(plain, name), getattr(masked, name), rtol=1e-13, atol=0)

    def test_a_mask_of_a_large_number_is_a_mask(self):
        p, q = torch.tensor([[0.0, 0.0, -math.inf]]), torch.tensor([[0.0, 0.0, -1e9]])
        assert statistics(p, q, ("logits", "logits")).reverse.item() == 0

    def test_equal_rows_are_0(self):
        p = random(3, 7)
        found = statistics(p, p + 0.5, ("logits", "logits"))
        for name in ("reverse", "jensen_shannon", "total_variation"):
            assert getattr(statistics(p, p, ("logits", "logits")), name).tolist() == [0, 0, 0]
            assert (getattr(found, name) < 1e-14).all()

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_rows_that_are_no_distributions(self, bad):
        p, q = near(0.1)
        for x in (p, q):
            x[1, 2] = bad
            found = statistics(p, q, ("logits", "logits"))
            for name in Statistics._fields[:-1]:
                assert getattr(found, name).isnan().tolist() == [False, True, False, False], name
            assert not found.agree[1].any()
            x[1, 2] = 0
        for row, formats in (([-0.1, 1.1], ("probs",) * 2), ([0.0, 0.0], ("probs",) * 2), ([-math.inf] * 2, None)):
            found = statistics(torch.tensor([row]), torch.ones(1, 2), formats or ("logits", "logits"))
            assert found.jensen_shannon.isnan().all()
            assert not found.agree.any()

    def test_no_rows(self):
        found = statistics(torch.zeros(0, 3), torch.zeros(0, 3), ("logits", "logits"))
        assert [x.shape for x in found] == [(0,)] * 7 + [(0, 3)]


class TestOrder:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_most_likely_in_order(self, dtype):
        p = random(300, 30).mul(2).to(dtype)  # bfloat16 has equals among the first
        q = (p + 0.1 * random(300, 30, 1)).to(dtype)
        q[:20] = p[:20]
        order = [x.sort(dim=-1, descending=True, stable=True).indices for x in (p, q)]
        found = statistics(p, q, ("logits", "logits"), ks=(1, 3, 10, 40)).agree
        for column, k in enumerate((1, 3, 10, 40)):
            assert found[:, column].tolist() == (order[0][:, :k] == order[1][:, :k]).all(-1).tolist()
        assert 20 < found[:, 2].sum() < 280

    def test_equals(self):
        p = torch.tensor([[1.0, 2.0, 2.0, -math.inf, -math.inf]])
        q = torch.tensor([[1.0, 3.0, 2.0, -math.inf, -5.0]])
        assert statistics(p, q, ("logits", "logits"), ks=(1, 2, 3, 4)).agree.tolist() == [[True, True, True, False]]
        assert statistics(p, p, ("logits", "logits"), ks=()).agree.shape == (1, 0)


def test_a_row_has_the_same_bits_anywhere():
    for classes in (7, 1000, 20_000):
        p, q = near(0.01, torch.float32, classes=classes)
        whole = statistics(p, q, ("logits", "logits"))
        turned = statistics(p.t().contiguous().t().flip(0), q.flip(0), ("logits", "logits"))
        for name in Statistics._fields:
            alone = torch.stack([getattr(statistics(p[k], q[k], ("logits", "logits")), name) for k in range(4)])
            assert torch.equal(getattr(whole, name), alone), name
            assert torch.equal(getattr(whole, name), getattr(turned, name).flip(0)), name
    shaped = statistics(p.reshape(2, 2, -1), q.reshape(2, 2, -1), ("logits", "logits"))
    assert torch.equal(shaped.reverse.flatten(), whole.reverse)
