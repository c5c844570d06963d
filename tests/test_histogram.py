"""The bins of the summary: every number in the right one, and quantiles to the accuracy that is promised."""

import math

import numpy as np
import pytest
import torch

from klmetric import histogram

BITS = histogram.bits_for(0.01)


@pytest.mark.parametrize("accuracy", [0.5, 0.1, 0.01, 0.004, 0.001, 1e-4])
def test_bits(accuracy):
    bits = histogram.bits_for(accuracy)
    edges = histogram.edges(bits)
    assert len(edges) == histogram.size(bits) - 3
    assert (edges[0], edges[-1]) == (2.0**-40, 2.0**14)
    middle = 2 * edges[1:] * edges[:-1] / (edges[1:] + edges[:-1])
    worst = torch.maximum((edges[1:] - middle) / edges[1:], (middle - edges[:-1]) / edges[:-1]).max().item()
    assert worst <= accuracy * (1 - 1e-4)
    assert bits == 0 or histogram.bits_for(2 * accuracy) < bits, "no more bins than it takes"


def test_every_number_is_in_its_bin():
    edges = histogram.edges(BITS)
    x = torch.cat([edges, torch.nextafter(edges, torch.zeros(())), torch.nextafter(edges, torch.tensor(math.inf))])
    counts = histogram.count(x, None, BITS)
    place = torch.searchsorted(edges, x, right=True) - 1  # an independent way to the same bins
    expected = torch.bincount(place.clamp(-1, len(edges) - 1) + 2, minlength=histogram.size(BITS)).double()
    assert torch.equal(counts[1:-1], expected[1:-1])
    assert counts.sum() == len(x)


def test_the_bins_of_their_own():
    x = torch.tensor([0.0, 0.0, 5e-324, 1e-13, 1e-12, 1.0, 2e4, 1e300, math.inf, math.nan], dtype=torch.float64)
    counts = histogram.count(x, ~x.isnan(), BITS)
    places = histogram.ZERO, histogram.TINY, histogram.HUGE, histogram.INFINITE
    assert [counts[place].item() for place in places] == [2, 2, 2, 1]
    assert counts[2:-2].sum() == 2
    assert torch.equal(histogram.count(x, x.isnan(), BITS)[2:-2].sum(), torch.tensor(0.0, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, 3, 10, 11, 1000])
def test_between_two_numbers_as_numpy(n):
    x = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).exp()
    counts = histogram.count(x, None, BITS)
    for q in (0, 0.001, 0.25, 0.3, 0.5, 0.7, 0.9, 0.999, 1):
        value = histogram.quantile(counts, q, x.max().item())
        assert value == pytest.approx(np.quantile(x.numpy(), q), rel=0.01, abs=0)


@pytest.mark.parametrize(
    ("n", "q", "place"), [(8, 5 / 7, 5), (11, 0.3, 3), (11, 0.9, 9), (101, 0.29, 29), (4, 1 / 3, 1)]
)
def test_at_a_number_nothing_is_between(n, q, place):
    x = torch.arange(1, n + 1).double()
    x[place + 1 :] = math.inf
    assert histogram.quantile(histogram.count(x, None, BITS), q, math.inf) == pytest.approx(place + 1, rel=0.01)


def test_the_ends():
    x = torch.tensor([0.0, 1e-300, 0.5, 1e5, math.inf], dtype=torch.float64)
    counts = histogram.count(x, None, BITS)
    at = [histogram.quantile(counts, q, math.inf) for q in (0, 0.25, 0.5, 0.75, 0.76, 1)]
    assert at[:2] == [0, 2.0**-41]
    assert at[2] == pytest.approx(0.5, rel=0.01)
    assert at[3:] == [2.0**14, math.inf, math.inf]
    assert math.isnan(histogram.quantile(torch.zeros_like(counts), 0.5, 0.0))
    largest = histogram.count(x[:4], None, BITS)
    assert histogram.quantile(largest, 1, 1e5) == 1e5, "the largest is known"


def test_on_a_device_as_on_the_cpu(monkeypatch):
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    on_cpu = histogram.count(x, x > 0.1, BITS)

    class Elsewhere(torch.Tensor):
        @property
        def device(self):
            return torch.device("meta")

    monkeypatch.setattr(torch, "bincount", None)
    elsewhere = histogram.count(x.as_subclass(Elsewhere), x > 0.1, BITS)
    assert torch.equal(elsewhere.as_subclass(torch.Tensor), on_cpu)
