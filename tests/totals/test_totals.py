"""The laws of the totals: empty is neutral, merge is associative and commutative."""

import math
from fractions import Fraction
from itertools import product

import pytest
import torch

from klmetric.arithmetic.device import device_of_float64
from klmetric.options import Options
from klmetric.totals import pairs, vector

OPTIONS = Options()


def parts(n=4):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.rand(5, 3, generator=generator, dtype=torch.float64) for _ in range(n)]
    rows[1][2, 1] = torch.nan
    rows[2][0, 0] = torch.inf
    weights = [torch.rand(5, 3, generator=generator).round(decimals=2) for _ in rows]
    return [of_rows(*both) for both in zip(rows, weights, strict=True)]


def of_rows(kl, weight):
    return vector.add(vector.empty(OPTIONS), vector.of_rows(kl, weight))


# Rows of which a plain sum in float64 depends on the order.
SPREAD = {
    "float32": torch.randn(1001, generator=torch.Generator().manual_seed(1)).mul(6).exp(),
    "float64": torch.randn(1001, generator=torch.Generator().manual_seed(1), dtype=torch.float64).mul(6).exp(),
    "far below float32": torch.randn(1001, generator=torch.Generator().manual_seed(3), dtype=torch.float64).exp()
    * 1e-250,
    "far above float32": torch.randn(1001, generator=torch.Generator().manual_seed(4), dtype=torch.float64).exp()
    * 1e250,
    "tiny beside huge": torch.tensor([1e-30, 1.0, 1e30, 1e-10, 3.0] * 100),
}


def merge(*xs):
    return vector.merge(torch.stack(xs))


def add_on_a_device(a, b):
    sums = pairs.add(a[: vector.FINGERPRINT], b[: vector.FINGERPRINT])
    return torch.cat([sums, torch.maximum(a[vector.FINGERPRINT :], b[vector.FINGERPRINT :])])


def test_empty_is_neutral():
    for part in parts():
        assert torch.equal(merge(part, vector.empty(OPTIONS)), part)
        assert torch.equal(merge(vector.empty(OPTIONS), part), part)
    nothing = torch.zeros(0, 3)
    assert torch.equal(of_rows(nothing, None), vector.empty(OPTIONS))
    assert torch.equal(of_rows(nothing, torch.ones(0, 3)), vector.empty(OPTIONS))


@pytest.mark.parametrize("spread", [0, 1, 30])
def test_products_of_rows_are_of_eighty_bits(spread):
    generator = torch.Generator().manual_seed(0)
    x, power = torch.randn(2, 3, pairs.MOST, generator=generator, dtype=torch.float64)
    x = x * (spread * power).exp()
    x[0], x[1, 1:] = 1, x[1, 1:] / 1e9  # equal numbers, and one beside which the others are nothing
    high, low = pairs.products(x)
    exact = [[Fraction(y) for y in row] for row in x.tolist()]
    of_two = [[sum(a * b for a, b in zip(r, s, strict=True)) for s in exact] for r in exact]
    for i, j in product(range(3), range(3)):
        found = Fraction(high[i, j].item()) + Fraction(low[i, j].item())
        assert high[i, j] == float(of_two[i][j]) or 0 < i != j > 0, "the last digit too, of sums and of squares"
        assert (found - of_two[i][j]) ** 2 <= of_two[i][i] * of_two[j][j] * pairs.PRECISION**2
    turned = pairs.products(x.flip(1))[0]
    assert torch.equal(turned[0], high[0])
    assert torch.equal(turned.diagonal(), high.diagonal())


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_products_with_what_is_no_number_are_none(bad):
    x = torch.rand(3, 5, dtype=torch.float64)
    x[1, 2] = bad
    sums = pairs.products(x)
    assert sums[:, 1].isnan().all()
    assert sums[:, :, 1].isnan().all()
    assert sums[:, ::2, ::2].isfinite().all()
    assert not pairs.products(x[:, :0]).any()


def test_merge_is_associative_and_commutative():
    a, b, c, d = parts()
    reference = merge(a, b, c, d)
    for other in (merge(merge(a, b), merge(c, d)), merge(a, merge(b, merge(c, d))), merge(d, b, a, c)):
        assert torch.equal(other[: vector.LOW], reference[: vector.LOW])
        torch.testing.assert_close(other, reference, rtol=1e-15, atol=0)


@pytest.mark.parametrize("size", [1, 3, 16, pairs.FEW + 1, 1001])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", SPREAD)
def test_the_same_bits_in_any_batch_and_order(name, weighted, size):
    rows = SPREAD[name]
    n = len(rows)
    weight = torch.rand(n, generator=torch.Generator().manual_seed(2)) if weighted else torch.ones(n)
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(size))
    exact = sum(Fraction(w) * Fraction(r) for w, r in zip(weight.tolist(), rows.tolist(), strict=True))
    for order in (torch.arange(n), shuffled):
        batches = [vector.of_rows(rows[i], weight[i] if weighted else None) for i in order.split(size)]
        for add in (vector.add, add_on_a_device):
            total = vector.empty(OPTIONS)
            for batch in batches:
                total = add(total, batch)
            if rows.dtype == torch.float32 or not weighted:  # there, the product of a row and its weight is rounded
                assert total[vector.KL] == float(exact)
            else:
                assert total[vector.KL] == merge(*batches)[vector.KL]
            assert total[vector.WEIGHT] == float(sum(map(Fraction, weight.tolist())))
            assert total[vector.ROWS] == n


@pytest.mark.parametrize("name", SPREAD)
def test_gradients_go_through_the_pairs(name):
    rows = SPREAD[name].clone().requires_grad_()
    total = vector.of_rows(rows, None)
    assert total[vector.KL].item() == vector.of_rows(rows.detach(), None)[vector.KL].item()
    total[vector.KL].backward()
    assert torch.equal(rows.grad, torch.ones_like(rows))


def test_the_default_dtype_does_not_matter():
    rows = SPREAD["float32"]
    whole = vector.of_rows(rows, None)
    torch.set_default_dtype(torch.float16)
    try:
        assert torch.equal(vector.of_rows(rows, None), whole)
    finally:
        torch.set_default_dtype(torch.float32)
    assert whole[vector.LOW] != 0


@pytest.mark.parametrize("rows", [[1.0, math.inf], [1e308, 1e308, 1.0], [0.0, 0.0], [5e-324, 1.0]], ids=str)
@pytest.mark.parametrize("weight", [None, 1.0])
def test_sums_at_the_ends_of_float64(rows, weight):
    kl = torch.tensor(rows, dtype=torch.float64)
    batch = vector.of_rows(kl, None if weight is None else torch.ones(len(rows)))
    for total in (vector.add(batch, batch), add_on_a_device(batch, batch), vector.add(batch, vector.empty(OPTIONS))):
        assert not total.isnan().any()
    assert batch[vector.KL] == kl.sum()
    assert vector.add(batch, batch)[vector.KL] == 2 * kl.sum()


def test_an_overflow_hides_no_bad_row():
    rows = torch.tensor([1.7e308, 1.7e308, torch.nan], dtype=torch.float64)
    total = vector.of_rows(rows, None)
    assert total[[vector.KL, vector.ROWS, vector.INVALID]].tolist() == [math.inf, 3, 1]


def test_what_they_count():
    rows = torch.tensor([[1.0, 2.0], [torch.nan, 4.0], [torch.nan, torch.inf]])
    weight = torch.tensor([[1.0, 0.5], [2.0, 3.0], [0.0, 0.0]])
    total = of_rows(rows, weight)
    assert total[vector.KL] == 1 * 1 + 0.5 * 2 + 3 * 4
    assert total[vector.WEIGHT] == 1 + 0.5 + 3
    assert total[vector.SAMPLES] == 1 + 3
    assert total[vector.ROWS] == 4
    assert total[vector.INVALID] == 1


@pytest.mark.parametrize("other", [Options(direction="reverse"), Options(eps=1e-9), Options(temperature=2.0)], ids=str)
def test_fingerprints_differ_by_more_than_torchmetrics_overlooks(other):
    assert not torch.allclose(torch.tensor(other.fingerprint()).double(), torch.tensor(OPTIONS.fingerprint()).double())


def test_where_there_is_no_float64_the_totals_live_on_the_cpu():
    assert device_of_float64(torch.device("mps")) == torch.device("cpu")
    assert device_of_float64(torch.device("cuda", 1)) == torch.device("cuda", 1)


@pytest.mark.slow
def test_no_drift_over_many_updates():
    rows = torch.rand(1000, generator=torch.Generator().manual_seed(0)).pow(8)
    batches = [vector.of_rows(row, None) for row in rows.unsqueeze(1)]
    total = vector.empty(OPTIONS)
    for i in range(10**5):
        total = vector.add(total, batches[i % 1000])
    exact = 100 * sum(map(Fraction, rows.tolist()))
    assert total[vector.KL] == float(exact)
    assert vector.value(total.tolist(), "mean", "propagate") == float(exact) / 10**5


def test_the_fingerprint_of_earlier_versions():
    # What was saved by 0.3.0 can be loaded.
    assert vector.empty(OPTIONS)[vector.FINGERPRINT :].tolist() == [37663, 28769]
    logits = Options(("logits", "logits"))
    assert vector.empty(logits, with_rows=True)[vector.FINGERPRINT :].tolist() == [116198, 16888]
