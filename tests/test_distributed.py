"""Several real processes: the same number as one, whatever share of the data each has."""

import pytest
import torch
import torch.distributed as dist
from cases import pair
from processes import Processes
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics import MetricCollection

from klmetric import KLDivergence, kl_divergence
from klmetric.distributed import padded_sampler, real_samples

REDUCTIONS = ("mean", "sum", "batchmean", "none")

# How many of ten rows each rank has.
SHARES = {
    2: {"even": (5, 5), "uneven": (7, 3), "one_empty": (10, 0), "all_empty": (0, 0)},
    3: {"even": (4, 3, 3), "uneven": (1, 7, 2), "one_empty": (4, 0, 6), "all_empty": (0, 0, 0)},
}


def shares_of(rank: int, size: int, name: str):
    share = SHARES[size][name]
    p, q = pair(10, 5)
    start = sum(share[:rank])
    return p[start : start + share[rank]], q[start : start + share[rank]]


def compute_in_processes(rank, size, name, reduction, updates):
    p, q = shares_of(rank, size, name)
    metric = KLDivergence(reduction=reduction)
    if len(p) or updates == "all":
        metric.update(p, q)
    before = {
        k: v.clone() if isinstance(v, torch.Tensor) else [x.clone() for x in v] for k, v in metric.metric_state.items()
    }
    if not metric.update_called:
        metric._update_count = 1  # or torchmetrics warns of what is tested here
    value = metric.compute()
    for key, state in metric.metric_state.items():
        assert type(state) is type(before[key])
        for a, b in zip(state, before[key], strict=True):
            assert torch.equal(a, b), "the state after compute is that of before"
    return value


@pytest.mark.parametrize("updates", ["all", "those with data"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["even", "uneven", "one_empty"])
def test_same_value_as_one_process(processes: Processes, name, reduction, updates):
    exact = kl_divergence(*pair(10, 5), reduction=reduction)
    for value in processes(compute_in_processes, name, reduction, updates):
        torch.testing.assert_close(value, exact, rtol=2e-7, atol=0)


def test_nobody_has_data(processes: Processes):
    for value in processes(compute_in_processes, "all_empty", "mean", "all"):
        assert value.isnan()


def forward_in_processes(rank, size, dist_sync_on_step):
    p, q = shares_of(rank, size, "uneven")
    metric = KLDivergence(dist_sync_on_step=dist_sync_on_step)
    return metric(p, q), metric.compute(), metric.totals[:4].tolist()


def test_forward(processes: Processes):
    exact = kl_divergence(*pair(10, 5))
    for rank, (batch, total, own) in enumerate(processes(forward_in_processes, False)):
        torch.testing.assert_close(batch, kl_divergence(*shares_of(rank, processes.size, "uneven")), rtol=2e-7, atol=0)
        torch.testing.assert_close(total, exact, rtol=2e-7, atol=0)
        assert own[3] == SHARES[processes.size]["uneven"][rank]
    for batch, total, _ in processes(forward_in_processes, True):
        torch.testing.assert_close(batch, exact, rtol=2e-7, atol=0)
        torch.testing.assert_close(total, exact, rtol=2e-7, atol=0)


def collection_in_processes(rank, size):
    collection = MetricCollection({"mean": KLDivergence(), "sum": KLDivergence(reduction="sum")})
    p, q = shares_of(rank, size, "uneven")
    collection.update(p, q)
    collection.update(p, q)
    return collection.compute()


def test_collection(processes: Processes):
    p, q = pair(10, 5)
    for values in processes(collection_in_processes):
        torch.testing.assert_close(values["mean"], kl_divergence(p, q), rtol=2e-7, atol=0)
        torch.testing.assert_close(values["sum"], 2 * kl_divergence(p, q, reduction="sum"), rtol=2e-7, atol=0)


def group_in_processes(rank, size):
    group = dist.new_group([0, 1])
    metric = KLDivergence(process_group=group, distributed_available_fn=lambda: rank < 2)
    metric.update(*shares_of(rank, size, "even"))
    return metric.compute()


def test_sub_group(three_processes: Processes):
    values = three_processes(group_in_processes)
    p, q = pair(10, 5)
    exact = [kl_divergence(p[:7], q[:7])] * 2 + [kl_divergence(p[7:], q[7:])]
    torch.testing.assert_close(values, exact, rtol=2e-7, atol=0)


class FailingKL(KLDivergence):
    fail = True

    def compute(self):
        if self.fail:
            raise RuntimeError("no")
        return super().compute()


def failing_compute_in_processes(rank, size):
    metric = FailingKL()
    metric.update(*shares_of(rank, size, "uneven"))
    before = metric.totals
    with pytest.raises(RuntimeError, match="no"):
        metric.compute()
    assert torch.equal(metric.totals, before)
    metric.fail = False
    return metric.compute()


def test_a_compute_that_raises_leaves_the_state_as_it_was(processes: Processes):
    for value in processes(failing_compute_in_processes):
        torch.testing.assert_close(value, kl_divergence(*pair(10, 5)), rtol=2e-7, atol=0)


def failing_gather_in_processes(rank, size):
    calls = []

    def gather(tensor, group=None):
        calls.append(tensor)
        if len(calls) == 2:
            raise RuntimeError("the network is down")
        return [tensor] * size

    metric = KLDivergence(reduction="none", dist_sync_fn=gather)
    metric.update(*shares_of(rank, size, "even"))
    before = metric.totals
    with pytest.raises(RuntimeError, match="the network is down"):
        metric.compute()
    assert torch.equal(metric.totals, before)
    assert not metric._is_synced
    return len(metric.compute())


def test_a_gather_that_raises_leaves_the_state_as_it_was(two_processes: Processes):
    assert two_processes(failing_gather_in_processes) == [10, 10]


def nan_in_processes(rank, size):
    p, q = shares_of(rank, size, "even")
    if rank == 1:
        p[0] = -1
    values = []
    for nan_strategy in ("propagate", "ignore"):
        metric = KLDivergence(nan_strategy=nan_strategy)
        metric.update(p, q)
        with pytest.warns(UserWarning, match="^1 of 10 rows were no distributions"):
            values.append(metric.compute())
    return values


def test_nan_on_one_rank(processes: Processes):
    for propagated, ignored in processes(nan_in_processes):
        assert propagated.isnan()
        assert ignored.isfinite()


def sampler_in_processes(rank, size, count, shuffle, drop_last, batch_size):
    p, q = pair(count, 5)
    data = TensorDataset(p, q)
    sampler = DistributedSampler(data, shuffle=shuffle, drop_last=drop_last)
    loader = DataLoader(data, batch_size=batch_size, sampler=sampler)
    padded = padded_sampler(loader)
    metric = KLDivergence()
    for index, (p, q) in enumerate(loader):
        weight = None if padded is None else real_samples(padded, index * batch_size, len(p))
        metric.update(p, q, weight)
    return metric.compute(), metric.totals[3].item()


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("count", [1, 2, 7, 8, 100])
def test_samples_that_the_sampler_repeats(processes: Processes, count, shuffle, batch_size):
    exact = kl_divergence(*pair(count, 5))
    replies = processes(sampler_in_processes, count, shuffle, False, batch_size)
    for value, _ in replies:
        torch.testing.assert_close(value, exact, rtol=2e-7, atol=0)
    assert sum(rows for _, rows in replies) == count


def test_drop_last_leaves_nothing_to_leave_out(processes: Processes):
    replies = processes(sampler_in_processes, 7, False, True, 3)
    assert sum(rows for _, rows in replies) == 7 - 7 % processes.size


class TestPaddedSampler:
    data = TensorDataset(torch.arange(7))

    def sampler(self, cls=DistributedSampler, **options):
        return cls(self.data, num_replicas=2, rank=1, **options)

    def test_known(self):
        sampler = self.sampler()
        assert padded_sampler(DataLoader(self.data, sampler=sampler)) is sampler
        batches = torch.utils.data.BatchSampler(sampler, 2, drop_last=False)
        assert padded_sampler(DataLoader(self.data, batch_sampler=batches)) is sampler

    def test_nothing_to_leave_out(self):
        assert padded_sampler(DataLoader(self.data)) is None
        assert padded_sampler(DataLoader(self.data, sampler=self.sampler(drop_last=True))) is None
        assert padded_sampler([1, 2, 3]) is None
        assert padded_sampler(None) is None
        assert padded_sampler(DataLoader(self.data, batch_size=None, sampler=self.sampler())) is None

    def test_an_order_of_its_own_is_not_guessed(self):
        class InBlocks(DistributedSampler):
            def __iter__(self):
                return iter(range(self.rank * 4, self.rank * 4 + 4))

        class Backwards(torch.utils.data.BatchSampler):
            def __iter__(self):
                return reversed(list(super().__iter__()))

        for loader in (
            DataLoader(self.data, sampler=self.sampler(InBlocks)),
            DataLoader(self.data, batch_sampler=Backwards(self.sampler(), 2, False)),
        ):
            with pytest.warns(UserWarning, match="has an order of its own, so the samples that DistributedSampler"):
                assert padded_sampler(loader) is None
