"""The laws of the totals: empty is neutral, merge is associative and commutative."""

import math

import pytest
import torch

from klmetric import totals
from klmetric.options import Options

OPTIONS = Options()


def parts(n=4):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.rand(5, 3, generator=generator, dtype=torch.float64) for _ in range(n)]
    rows[1][2, 1] = torch.nan
    rows[2][0, 0] = torch.inf
    weights = [torch.rand(5, 3, generator=generator).round(decimals=2) for _ in rows]
    return [of_rows(*both) for both in zip(rows, weights, strict=True)]


def of_rows(kl, weight):
    return totals.empty(OPTIONS) + totals.of_rows(kl, weight)


def merge(*xs):
    return totals.merge(torch.stack(xs))


def test_empty_is_neutral():
    for part in parts():
        assert torch.equal(merge(part, totals.empty(OPTIONS)), part)
        assert torch.equal(merge(totals.empty(OPTIONS), part), part)
    nothing = torch.zeros(0, 3)
    assert torch.equal(of_rows(nothing, None), totals.empty(OPTIONS))
    assert torch.equal(of_rows(nothing, torch.ones(0, 3)), totals.empty(OPTIONS))


def test_merge_is_associative_and_commutative():
    a, b, c, d = parts()
    reference = merge(a, b, c, d)
    for other in (merge(merge(a, b), merge(c, d)), merge(a, merge(b, merge(c, d))), merge(d, b, a, c)):
        torch.testing.assert_close(other, reference, rtol=1e-15, atol=0)


def test_merge_is_the_totals_of_all():
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(10, 3, generator=generator, dtype=torch.float64)
    weight = torch.rand(10, 3, generator=generator)
    whole = of_rows(rows, weight)
    split = merge(*(of_rows(r, w) for r, w in zip(rows.split(3), weight.split(3), strict=True)))
    torch.testing.assert_close(split, whole, rtol=1e-15, atol=0)


def test_what_they_count():
    rows = torch.tensor([[1.0, 2.0], [torch.nan, 4.0], [torch.nan, torch.inf]])
    weight = torch.tensor([[1.0, 0.5], [2.0, 3.0], [0.0, 0.0]])
    total = of_rows(rows, weight)
    assert total[totals.KL] == 1 * 1 + 0.5 * 2 + 3 * 4
    assert total[totals.WEIGHT] == 1 + 0.5 + 3
    assert total[totals.SAMPLES] == 1 + 3
    assert total[totals.ROWS] == 4
    assert total[totals.INVALID] == 1


@pytest.mark.parametrize("other", [Options(direction="reverse"), Options(eps=1e-9), Options(temperature=2.0)], ids=str)
def test_fingerprints_differ_by_more_than_torchmetrics_overlooks(other):
    assert not torch.allclose(torch.tensor(other.fingerprint).double(), torch.tensor(OPTIONS.fingerprint).double())


def test_where_there_is_no_float64_the_totals_live_on_the_cpu():
    assert totals.device_of_totals(torch.device("mps")) == torch.device("cpu")
    assert totals.device_of_totals(torch.device("cuda", 1)) == torch.device("cuda", 1)


def test_no_drift_over_a_million_updates():
    rows = torch.rand(1000, generator=torch.Generator().manual_seed(0)).pow(8)
    batches = [totals.of_rows(row, None) for row in rows.unsqueeze(1)]
    total = totals.empty(OPTIONS)
    for i in range(10**6):
        total = total + batches[i % 1000]
    exact = math.fsum(rows.double().tolist()) / 1000
    assert abs(totals.value(total.tolist(), "mean", "propagate") / exact - 1) <= 1e-12
