"""Rows that are shared out to threads: the same bits, and nothing else changes."""

import pytest
import torch
from cases import DIRECTIONS, FORMATS, pair

from klmetric import KLDivergence, kl_divergence, threads

SIZE = (700, 1000)


@pytest.fixture
def many_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def shared(many_threads, monkeypatch):
    """How many rows each thread got, in each sharing."""
    calls = []
    original = threads.share

    def share(work, rows, number):
        calls.append((rows, number))
        original(work, rows, number)

    monkeypatch.setattr("klmetric.blocks.share", share)
    return calls


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("input_format", FORMATS)
def test_the_same_bits(shared, monkeypatch, direction, input_format):
    p, q = pair(*SIZE, input_format=input_format)
    options = {"input_format": input_format, "direction": direction, "reduction": "none"}
    together = kl_divergence(p, q, **options)
    assert shared == [(700, 3)]
    monkeypatch.setattr("klmetric.blocks.SHARED", 2**60)
    assert torch.equal(together, kl_divergence(p, q, **options))
    assert len(shared) == 1


def test_few_rows_and_small_batches(shared):
    p, q = pair(2, 400_000)
    kl_divergence(p, q)
    assert shared == [(2, 2)]
    kl_divergence(*pair(1, 600_000))
    kl_divergence(*pair(100, 100))
    assert len(shared) == 1


def test_in_any_mode(shared):
    p, q = pair(*SIZE)
    exact = kl_divergence(p, q)
    metric = KLDivergence()
    with torch.inference_mode():
        metric.update(p.clone(), q)
        assert metric.compute() == exact
    with torch.no_grad():
        assert kl_divergence(p.clone().requires_grad_(), q) == exact
    with_gradient = kl_divergence(p.clone().requires_grad_(), q)
    assert with_gradient.requires_grad
    assert with_gradient == exact
    assert len(shared) == 4


def test_the_number_of_threads_is_as_before(shared):
    kl_divergence(*pair(*SIZE))
    assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == _of_a_new_thread()


def _of_a_new_thread():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def test_an_error_comes_through(many_threads):
    def work(rows):
        raise KeyError(rows.start)

    with pytest.raises(KeyError):
        threads.share(work, 10, 2)
    assert torch.get_num_threads() == 3


def test_without_openmp_nothing_is_shared(monkeypatch):
    monkeypatch.setattr(threads, "_is_openmp", lambda: False)
    assert threads.available() == 1
