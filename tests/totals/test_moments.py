"""Means of several numbers of the same rows, against float64 numpy, and the laws of their sums."""

import math

import numpy as np
import pytest
import torch

from klmetric.totals import moments, pairs
from klmetric.totals.moments import Means

NAMES = ("a", "b", "c")


def data(samples=40, positions=7):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, samples, positions, generator=generator, dtype=torch.float64)
    x += torch.randn(3, samples, 1, generator=generator, dtype=torch.float64)
    weight = torch.rand(samples, positions, generator=generator, dtype=torch.float64)
    weight[weight < 0.2] = 0
    weight[3] = 0
    x[:, 3] = math.nan  # of no weight
    return x, weight


def merged(*parts):
    return torch.tensor(pairs.merge([part.tolist() for part in parts]), dtype=torch.float64)


def by_hand(x, weight):
    """Means and their covariance, the samples for independent."""
    x, weight = np.nan_to_num(x.numpy()), weight.numpy()
    s, n = (x * weight).sum(-1), weight.sum(-1)
    mean, samples = s.sum(-1) / n.sum(), (n > 0).sum()
    residual = s - mean[:, None] * n
    return mean, residual @ residual.T * samples / (samples - 1) / n.sum() ** 2


def test_means_and_errors():
    x, weight = data()
    means = Means(moments.of_rows(x, weight), NAMES)
    mean, covariance = by_hand(x, weight)
    for i, name in enumerate(NAMES):
        assert means[name] == pytest.approx(mean[i], rel=1e-13)
        assert means.error({name: 1.0}) == pytest.approx(covariance[i, i] ** 0.5, rel=1e-13)
    gradient = np.array([0.3, -2.0, 1.5])
    slopes = dict(zip(NAMES, gradient, strict=True))
    error = means.error(slopes)
    assert error == pytest.approx((gradient @ covariance @ gradient) ** 0.5, rel=1e-13)
    assert error == Means(moments.of_rows(x.flip(0), weight), NAMES[::-1]).error(
        dict(zip(NAMES, gradient, strict=True))
    )


def test_the_same_bits_in_any_batches_and_order():
    x, weight = data()
    whole = Means(moments.of_rows(x, weight), NAMES)
    parts = [moments.of_rows(*both) for both in zip(x.split(7, 1), weight.split(7), strict=True)]
    turned = moments.of_rows(x.flip(1), weight.flip(0))
    for sums in (merged(*parts), merged(*parts[::-1]), merged(merged(*parts[:2]), merged(*parts[2:])), turned):
        means = Means(sums, NAMES)
        assert [means[name] for name in NAMES] == [whole[name] for name in NAMES]
        for gradient in ({"a": 1.0}, {"a": 1.0, "c": -0.7}):
            assert means.error(gradient) == whole.error(gradient)
    assert torch.equal(merged(parts[0], moments.empty(3)), parts[0])


def test_a_large_batch_goes_in_pieces(monkeypatch):
    x, weight = data()
    whole = Means(moments.of_rows(x, weight), NAMES)
    monkeypatch.setattr(moments, "AT_ONCE", 7)
    pieces = Means(moments.of_rows(x, weight), NAMES)
    assert [pieces.error({name: 1.0}) for name in NAMES] == [whole.error({name: 1.0}) for name in NAMES]


def test_differences_that_cancel():
    """The spread of numbers of which ten digits are equal."""
    beyond = torch.linspace(-1e-6, 1e-6, 50).double().mul(2**40).round().div(2**40)
    means = Means(moments.of_rows((1e4 + beyond).reshape(1, 50, 1), torch.ones(50, 1)), ("a",))
    assert means.error({"a": 1.0}) == pytest.approx(np.std(beyond.numpy(), ddof=1) / 50**0.5, rel=1e-5)
    equal = Means(moments.of_rows(torch.full((1, 50, 3), 0.1).double(), torch.ones(50, 3)), ("a",))
    assert equal.error({"a": 1.0}) == 0


@pytest.mark.parametrize(("bad", "mean"), [(math.inf, math.inf), (-math.inf, math.nan), (math.nan, math.nan)])
def test_what_is_infinite_or_not_known(bad, mean):
    x, weight = data()
    x[1, 5, 2] = bad
    weight[5, 2] = 1
    means = Means(moments.of_rows(x, weight), NAMES)
    assert means["b"] == pytest.approx(mean, nan_ok=True)
    assert math.isnan(means.error({"b": 1.0}))
    assert math.isfinite(means.error({"a": 1.0, "c": 1.0})), "the others are not touched"
    assert math.isnan(means.error({"a": math.inf}))


def test_infinities_of_both_signs_meet():
    x, weight = data()
    bad = [torch.full((3, 1, 1), sign * math.inf).double() for sign in (1, -1)]
    together = [moments.of_rows(torch.cat([bad[0], bad[1]], 1), torch.ones(2, 1))]
    apart = [moments.of_rows(one, torch.ones(1, 1)) for one in bad]
    for parts in (together, apart):
        assert math.isnan(Means(merged(*parts, moments.of_rows(x, weight)), NAMES)["a"])


def test_few_samples():
    x, weight = data()
    none = Means(moments.empty(3), NAMES)
    assert math.isnan(none["a"])
    assert math.isnan(none.error({"a": 1.0}))
    one = Means(moments.of_rows(x[:, :1], weight[:1]), NAMES)
    assert math.isfinite(one["a"])
    assert math.isnan(one.error({"a": 1.0}))
    assert "a" in one
    assert "d" not in one


def test_the_interval_holds_the_truth_where_neighbours_are_alike():
    generator = torch.Generator().manual_seed(0)
    draws, held, held_if_independent = 400, 0, 0
    x = torch.randn(draws, 60, 50, generator=generator, dtype=torch.float64)
    for k in range(1, 50):
        x[..., k] = 0.9 * x[..., k - 1] + math.sqrt(1 - 0.9**2) * x[..., k]
    for draw in x:
        means = Means(moments.of_rows(draw.unsqueeze(0), torch.ones(60, 50)), ("x",))
        held += abs(means["x"]) < 1.96 * means.error({"x": 1.0})
        held_if_independent += abs(draw.mean().item()) < 1.96 * draw.std().item() / 3000**0.5
    assert 0.93 <= held / draws <= 0.97
    assert held_if_independent / draws < 0.6
