"""The bins of the summary: every number in the right one, and quantiles to the accuracy that is promised."""

import math

import numpy as np
import pytest
import torch

from klmetric.totals import histogram

FINENESS = histogram.fineness_for(0.01)
LOWEST, HIGHEST = 2.0**-81, 2.0**128


def of(x):
    """The histogram of numbers, as the sketch keeps it."""
    finite = x[x < math.inf]
    smallest, largest = (finite[finite > 0].min().item(), finite.max().item()) if (finite > 0).any() else (math.inf, 0)
    return histogram.Histogram(histogram.count(x, x >= 0, FINENESS), smallest, largest)


@pytest.mark.parametrize("accuracy", [0.5, 0.1, 0.01, 0.004, 0.001, 1e-4])
def test_fineness(accuracy):
    fineness = histogram.fineness_for(accuracy)
    edges = histogram.edges(fineness)
    assert len(edges) == histogram.size(fineness) - 3
    assert (edges[0], edges[-1]) == (LOWEST, HIGHEST)
    middle = 2 * edges[1:] * edges[:-1] / (edges[1:] + edges[:-1])
    worst = torch.maximum((edges[1:] - middle) / edges[1:], (middle - edges[:-1]) / edges[:-1]).max().item()
    assert worst <= accuracy * (1 - 1e-4)
    assert fineness == 1 or histogram.fineness_for(2 * accuracy) < fineness, "no more bins than it takes"


def test_every_number_is_in_its_bin():
    edges = histogram.edges(FINENESS)
    x = torch.cat([edges, torch.nextafter(edges, torch.zeros(())), torch.nextafter(edges, torch.tensor(math.inf))])
    counts = histogram.count(x, x >= 0, FINENESS)
    place = torch.searchsorted(edges, x, right=True) - 1  # an independent way to the same bins
    expected = torch.bincount(place.clamp(-1, len(edges) - 1) + 2, minlength=histogram.size(FINENESS)).double()
    assert torch.equal(counts[1:-1], expected[1:-1])
    assert counts.sum() == len(x)


def test_the_bins_of_their_own():
    x = torch.tensor([0.0, 0.0, 5e-324, 1e-25, 1e-24, 1.0, 3e38, 4e38, 1e300, math.inf, math.nan], dtype=torch.float64)
    counts = histogram.count(x, ~x.isnan(), FINENESS)
    places = histogram.ZERO, histogram.TINY, histogram.HUGE, histogram.INFINITE
    assert [counts[place].item() for place in places] == [2, 2, 2, 1]
    assert counts[2:-2].sum() == 3
    assert torch.equal(histogram.count(x, x.isnan(), FINENESS)[2:-2].sum(), torch.tensor(0.0, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, 3, 10, 11, 1000])
def test_between_two_numbers_as_numpy(n):
    x = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).exp()
    for q in (0, 0.001, 0.25, 0.3, 0.5, 0.7, 0.9, 0.999, 1):
        assert histogram.quantile(of(x), q) == pytest.approx(np.quantile(x.numpy(), q), rel=0.01, abs=0)


@pytest.mark.parametrize(
    ("n", "q", "place"), [(8, 5 / 7, 5), (11, 0.3, 3), (11, 0.9, 9), (101, 0.29, 29), (4, 1 / 3, 1)]
)
def test_at_a_number_nothing_is_between(n, q, place):
    x = torch.arange(1, n + 1).double()
    x[place + 1 :] = math.inf
    assert histogram.quantile(of(x), q) == pytest.approx(place + 1, rel=0.01)


def test_the_ends():
    x = torch.tensor([0.0, 1e-300, 0.5, 1e300, math.inf], dtype=torch.float64)
    at = [histogram.quantile(of(x), q) for q in (0, 0.25, 0.5, 0.75, 0.76, 1)]
    assert at == [0, 1e-300, pytest.approx(0.5, rel=0.01), 1e300, math.inf, math.inf]
    assert math.isnan(histogram.quantile(of(x[:0]), 0.5))
    assert histogram.quantile(of(x[:1]), 0.5) == 0
    assert histogram.quantile(of(x[4:]), 0.5) == math.inf


BEYOND = {
    "too small, most": [1e-300] * 5 + [1e-40, 1e-30] * 2 + [1.0],
    "too large, most": [1.0] + [1e39, 1e100] * 3 + [1e300] * 3,
    "all too small": [5e-324, 1e-200, 1e-100, 1e-50, 1e-26],
    "all too large": [3.5e38, 1e100, 1e200, 1.7e308],
    "all the same, too small": [1e-200] * 7,
    "all the same, too large": [1e200] * 7,
    "both ends": [1e-200, 1e-100, 1e-50, 0.1, 0.2, 1e50, 1e100, 1e200],
    "beside zeros and infinities": [0, 0, 1e-200, 1e-150, 1e-100, 1e100, 1e150, 1e200, math.inf],
}


class TestBeyondTheBins:
    """What is not in a bin of a stated width is never taken for the edge of the bins."""

    @pytest.mark.parametrize("name", BEYOND)
    def test_what_is_known_is_told(self, name):
        x = torch.tensor(sorted(BEYOND[name]), dtype=torch.float64)
        numbers = of(x)
        values = [histogram.quantile(numbers, k / (len(x) - 1)) for k in range(len(x))]
        assert values == sorted(values)
        for number, value in zip(x.tolist(), values, strict=True):
            if number in (0, numbers.smallest, numbers.largest, math.inf) and (x == number).sum() == 1:
                assert value == number
            elif LOWEST <= number < HIGHEST:
                assert value == pytest.approx(number, rel=0.01, abs=0)
            elif number:
                # On the same side of the bins, and no further out than what there is.
                low, high = (numbers.smallest, LOWEST) if number < LOWEST else (HIGHEST, numbers.largest)
                assert low <= value <= high
                assert value not in (LOWEST, HIGHEST)
        finite = x[(x > 0) & (x < math.inf)]
        if (finite == finite[0]).all():
            assert values == finite.tolist()

    def test_in_between_it_is_spread_on_a_logarithmic_axis(self):
        x = torch.logspace(-200, -30, 1001, dtype=torch.float64)
        values = [histogram.quantile(of(x), q) for q in (0, 0.25, 0.5, 0.75, 1)]
        assert np.log10(values) == pytest.approx([-200, -157.5, -115, -72.5, -30], abs=0.2)


def test_on_a_device_as_on_the_cpu(monkeypatch):
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    on_cpu = histogram.count(x, x > 0.1, FINENESS)

    class Elsewhere(torch.Tensor):
        @property
        def device(self):
            return torch.device("meta")

    monkeypatch.setattr(torch, "bincount", None)
    elsewhere = histogram.count(x.as_subclass(Elsewhere), x > 0.1, FINENESS)
    assert torch.equal(elsewhere.as_subclass(torch.Tensor), on_cpu)


@pytest.mark.parametrize("q", [0, 0.001, 0.05, 0.3, 0.5, 0.7, 0.95, 1])
@pytest.mark.parametrize("shift", [-9.0, -0.3, 0.0, 9.0])
def test_quantiles_of_numbers_of_either_sign(q, shift):
    x = torch.randn(2001, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + shift
    x[:50] = 0
    found = histogram.signed_quantile(of(x[x >= 0]), of(-x[x < 0]), q)
    exact = x.quantile(q).item()
    assert found == exact if q in (0, 1) else found == pytest.approx(exact, rel=0.01)


def test_no_numbers_of_either_sign():
    nothing = of(torch.zeros(0).double())
    assert math.isnan(histogram.signed_quantile(nothing, nothing, 0.5))
