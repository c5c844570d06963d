"""Several real processes: the same number as one, whatever share of the data each has."""

import json
import os
import subprocess
import sys
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torchrun_run
from cases import GRID, pair
from kinds import KINDS, OF_TOKENS, make, same, value_of, without_order
from processes import Processes, as_launched, free_port
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.regression import KLDivergence as TorchmetricsKL
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from klmetric import KLDivergence, kl_divergence
from klmetric.distributed import deal_of, real_samples
from klmetric.totals import vector

# Any numbers pass for the log-probabilities of drawn tokens here.
pytestmark = pytest.mark.filterwarnings("ignore:`log_p` and `log_q` should be logarithms")

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


def compute_in_processes(rank, size, name, kind, updates):
    p, q = shares_of(rank, size, name)
    metric = make(kind)
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
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["even", "uneven", "one_empty"])
def test_same_value_as_one_process(processes: Processes, name, kind, updates):
    exact = value_of(kind, *pair(10, 5))
    for value in processes(compute_in_processes, name, kind, updates):
        same(value, exact)


def test_nobody_has_data(processes: Processes):
    for value in processes(compute_in_processes, "all_empty", "mean", "all"):
        assert value.isnan()
    for value in processes(compute_in_processes, "all_empty", "none", "those with data"):
        assert value.shape == (0,)


def fabric_in_processes(rank, size, shuffle):
    fabric_module = pytest.importorskip("lightning.fabric")
    with as_launched(rank, size):
        fabric = fabric_module.Fabric(accelerator="cpu", devices=size, strategy="ddp")
        fabric.launch()
        data = TensorDataset(*pair(7, 5))
        loader = fabric.setup_dataloaders(DataLoader(data, batch_size=2, shuffle=shuffle))
        metric, seen = KLDivergence(), 0
        for p, q in loader:
            metric.update(p, q, real_samples(loader, seen, len(p)))
            seen += len(p)
        return seen, metric.compute()


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loader_of_fabric(processes: Processes, shuffle):
    replies = processes(fabric_in_processes, shuffle)
    assert sum(seen for seen, _ in replies) > 7
    for _, value in replies:
        assert torch.equal(value, kl_divergence(*pair(7, 5)))


def forward_in_processes(rank, size, dist_sync_on_step):
    p, q = shares_of(rank, size, "uneven")
    metric = KLDivergence(dist_sync_on_step=dist_sync_on_step)
    return metric(p, q), metric.compute(), metric.totals[:4].tolist()


def test_forward(processes: Processes):
    exact = kl_divergence(*pair(10, 5))
    for rank, (batch, total, own) in enumerate(processes(forward_in_processes, False)):
        torch.testing.assert_close(batch, kl_divergence(*shares_of(rank, processes.size, "uneven")), rtol=0, atol=0)
        torch.testing.assert_close(total, exact, rtol=0, atol=0)
        assert own[3] == SHARES[processes.size]["uneven"][rank]
    for batch, total, _ in processes(forward_in_processes, True):
        torch.testing.assert_close(batch, exact, rtol=0, atol=0)
        torch.testing.assert_close(total, exact, rtol=0, atol=0)


def collection_in_processes(rank, size):
    collection = MetricCollection({"mean": KLDivergence(), "sum": KLDivergence(reduction="sum")})
    p, q = shares_of(rank, size, "uneven")
    collection.update(p, q)
    collection.update(p, q)
    return collection.compute()


def test_collection(processes: Processes):
    p, q = pair(10, 5)
    for values in processes(collection_in_processes):
        torch.testing.assert_close(values["mean"], kl_divergence(p, q), rtol=0, atol=0)
        torch.testing.assert_close(values["sum"], 2 * kl_divergence(p, q, reduction="sum"), rtol=0, atol=0)


@pytest.mark.slow
def test_same_bits_under_torchrun(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=3",
        "--master-addr=127.0.0.1",
    ]
    command += [f"--master-port={free_port()}", torchrun_run.__file__]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("values"))
    same_bits_as_one_batch(json.loads(line.removeprefix("values")))


def same_bits_as_one_batch(values):
    for (count, batch_size), (mean, total) in zip(GRID, values, strict=True):
        p, q = pair(count, 5, seed=count)
        one = KLDivergence(reduction="sum").set_dtype(torch.float64)
        one.update(p, q)
        assert mean == kl_divergence(p, q).item(), (count, batch_size)
        assert total == one.compute().item(), (count, batch_size)


def grid_in_processes(rank, size):
    return [torchrun_run.evaluate(*case) for case in GRID]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_same_bits_on_any_number_of_processes(group, size):
    for values in group(size)(grid_in_processes):
        same_bits_as_one_batch(values)


COLLECTIVES = [
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "barrier", "broadcast"),
    *("broadcast_object_list", "gather", "gather_object", "monitored_barrier", "reduce", "reduce_scatter", "scatter"),
]


class Counted:
    """Counts the collectives that run while it is in force."""

    def __enter__(self):
        self.calls, self.originals = [], {name: getattr(dist, name) for name in COLLECTIVES}
        for name, original in self.originals.items():
            setattr(
                dist, name, lambda *args, _name=name, _original=original, **kw: self.call(_name, _original, args, kw)
            )
        return self

    def call(self, name, original, args, kwargs):
        self.calls.append(name)
        return original(*args, **kwargs)

    def __exit__(self, *_):
        for name, original in self.originals.items():
            setattr(dist, name, original)


def collectives_in_processes(rank, size, kind, share):
    metric = TorchmetricsKL() if kind == "torchmetrics" else make(kind)
    metric.update(*shares_of(rank, size, share))
    with Counted() as counted:
        metric.compute()
        metric.compute()  # answers from before
    return counted.calls


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", ["even", "uneven", "one_empty"])
def test_collectives_of_one_compute(processes: Processes, kind, share):
    expected = ["all_gather"] * (2 if kind == "none" else 1)
    for calls in processes(collectives_in_processes, kind, share):
        assert calls == expected


def test_collectives_are_counted(two_processes: Processes):
    # Of a state in torchmetrics: a barrier, and the state; it has two.
    for calls in two_processes(collectives_in_processes, "torchmetrics", "even"):
        assert calls == ["barrier", "all_gather", "barrier", "all_gather"]


class Counting(KLDivergence):
    """A state of its own beside ours."""

    def __init__(self, **options):
        super().__init__(**options)
        self.add_state("calls", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, *args):
        super().update(*args)
        self.calls = self.calls + 1

    def compute(self):
        return self.calls.item(), super().compute()


def subclass_in_processes(rank, size, reduction):
    metric = Counting(reduction=reduction)
    metric.update(*shares_of(rank, size, "uneven"))
    return metric.compute()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_subclass_with_a_state_of_its_own(processes: Processes, reduction):
    for calls, value in processes(subclass_in_processes, reduction):
        assert calls == processes.size
        assert torch.equal(value, kl_divergence(*pair(10, 5), reduction=reduction))


def order_in_processes(rank, size, name):
    p, q = shares_of(rank, size, name)
    metric = KLDivergence(reduction="none", nan_strategy="ignore")
    if rank == 0 and len(p):
        p[0] = -1
    metric.update(p, q, torch.ones(len(p)).index_fill(0, torch.tensor(len(p) - 1 if len(p) else []).long(), 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return metric.compute()


@pytest.mark.parametrize("name", ["even", "uneven", "one_empty"])
def test_rows_in_the_order_of_the_ranks(processes: Processes, name):
    rows = list(kl_divergence(*pair(10, 5), reduction="none").split(SHARES[processes.size][name]))
    rows = [part[:-1] for part in rows]  # weight 0
    rows[0] = rows[0][1:]  # no distribution
    for value in processes(order_in_processes, name):
        assert torch.equal(value, torch.cat(rows))


def own_gather_in_processes(rank, size):
    asked = []

    def gather(tensor, group=None):
        asked.append(len(tensor))
        return [tensor] * 3

    metric = KLDivergence(dist_sync_fn=gather)
    metric.update(*shares_of(0, size, "even"))
    with Counted() as counted:
        value = metric.compute()
        with metric.sync_context():
            rows = metric.totals[vector.ROWS].item()
        metric.sync(dist_sync_fn=lambda tensor, group=None: [tensor] * 7)
        more = metric.totals[vector.ROWS].item()
        metric.unsync()
    assert (counted.calls, asked) == ([], [vector.SIZE] * 2)
    own = metric.totals[vector.ROWS].item()
    assert (rows, more) == (3 * own, 7 * own)
    return value


def test_a_gather_of_the_users_own(two_processes: Processes):
    for value in two_processes(own_gather_in_processes):
        torch.testing.assert_close(value, kl_divergence(*shares_of(0, 2, "even")), rtol=0, atol=0)


def group_in_processes(rank, size):
    group = dist.new_group([0, 1])
    metric = KLDivergence(process_group=group, distributed_available_fn=lambda: rank < 2)
    metric.update(*shares_of(rank, size, "even"))
    return metric.compute()


def test_sub_group(three_processes: Processes):
    values = three_processes(group_in_processes)
    p, q = pair(10, 5)
    exact = [kl_divergence(p[:7], q[:7])] * 2 + [kl_divergence(p[7:], q[7:])]
    torch.testing.assert_close(values, exact, rtol=0, atol=0)


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
        torch.testing.assert_close(value, kl_divergence(*pair(10, 5)), rtol=0, atol=0)


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


def synced_in_processes(rank, size, kind):
    p, q = shares_of(rank, size, "uneven")
    metric = make(kind)
    metric.persistent(True)
    metric.update(p, q)
    own, before = metric.totals, metric.state_dict()
    with metric.sync_context():
        assert metric.totals[vector.ROWS] == (50 if kind in OF_TOKENS else 10)
        with Counted() as counted:
            value = metric.compute()
        assert counted.calls == []
        everything = metric.state_dict()
        for call, text in (
            (metric.sync, "has already been synced"),
            (lambda: metric.update(p, q), "must not be synced when a batch is added"),
            (lambda: metric(p, q), "must not be synced when a batch is added"),
            (lambda: metric.merge_state(make(kind)), "Nothing can be merged into a synced metric"),
            (lambda: metric.load_state_dict(before), "Nothing can be loaded into a synced metric"),
        ):
            with pytest.raises(TorchMetricsUserError, match=text):
                call()
        assert metric.totals[vector.ROWS] == (50 if kind in OF_TOKENS else 10)
    with pytest.raises(TorchMetricsUserError, match="has already been un-synced"):
        metric.unsync()
    assert torch.equal(metric.totals, own)
    same(metric.compute(), value)
    alone = make(kind, sync_on_compute=False)
    alone.load_state_dict(everything)
    same(alone.compute(), value)
    metric.sync()
    metric.reset()
    assert metric.totals[vector.ROWS] == 0
    assert not metric._is_synced
    return value


@pytest.mark.parametrize("kind", KINDS)
def test_a_synced_metric(processes: Processes, kind):
    for value in processes(synced_in_processes, kind):
        same(value, value_of(kind, *pair(10, 5)))


def local_values_in_processes(rank, size):
    p, q = shares_of(rank, size, "uneven")
    metric = KLDivergence(sync_on_compute=False)
    metric.update(p, q)
    own = metric.compute()
    metric.sync()
    everything = metric.compute()
    metric.unsync()
    return own, everything, metric.compute()


def test_sync_by_hand(processes: Processes):
    for rank, (own, everything, after) in enumerate(processes(local_values_in_processes)):
        assert torch.equal(own, kl_divergence(*shares_of(rank, processes.size, "uneven")))
        assert torch.equal(own, after)
        assert torch.equal(everything, kl_divergence(*pair(10, 5)))


def other_options_in_processes(rank, size, options):
    metric = KLDivergence(**(options if rank == 1 else {}))
    metric.update(*shares_of(rank, size, "even"))
    own = metric.totals
    with pytest.raises(ValueError, match=r"must measure with the same options.*others on the ranks \[1\]"):
        metric.compute()
    assert torch.equal(metric.totals, own)
    dist.barrier()  # nobody is left waiting in a collective


@pytest.mark.parametrize("options", [{"temperature": 2.0}, {"reduction": "none"}], ids=str)
def test_other_options_on_one_rank(processes: Processes, options):
    processes(other_options_in_processes, options)


def fault_in_processes(rank, size, fault):
    metric = KLDivergence(direction="reverse")
    metric.update(*shares_of(rank, size, "even"))
    before = metric.totals
    dist.barrier()
    # From here on, where all are connected, which on a busy machine may take long.
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=3))
    if rank == 1:
        if fault == "dies":
            os._exit(1)
        return None  # it never computes
    with pytest.raises(RuntimeError) as caught:
        metric.compute()
    assert torch.equal(metric.totals, before)
    assert not metric._is_synced
    return type(caught.value).__name__, type(caught.value.__cause__).__name__, str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["dies", "never computes"])
def test_a_rank_that_fails(tmp_path, fault):
    processes = Processes(2, str(tmp_path / "store"))
    try:
        replies = processes(fault_in_processes, fault, dying=(1,) if fault == "dies" else ())
    finally:
        processes.stop()
    kind, cause, text = replies[0]
    assert kind == cause
    assert text.startswith("KLDivergence(direction='reverse') could not gather its totals from the other processes")


def interrupted_in_processes(rank, size, folder, kind, merged):
    """The first six batches of twelve, and a checkpoint."""
    metric = make(kind)
    metric.persistent(True)
    for p, q in batches()[rank:6:size]:
        metric.update(p, q)
    if merged:
        with metric.sync_context():
            state = metric.state_dict()
        if rank == 0:
            torch.save(state, folder / "merged.pt")
    else:
        torch.save(metric.state_dict(), folder / f"{rank}.pt")
    return metric.compute()


def resumed_in_processes(rank, size, folder, kind, merged):
    """The checkpoint, and the last six batches."""
    metric = make(kind)
    if merged:
        if rank == 0:
            metric.load_state_dict(torch.load(folder / "merged.pt"))
    else:
        for file in sorted(folder.glob("*.pt"))[rank::size]:
            metric.merge_state(torch.load(file))
    for p, q in batches()[6 + rank :: size]:
        metric.update(p, q)
    return metric.compute()


def batches():
    return list(zip(*(x.split(3) for x in pair(34, 5)), strict=True))


@pytest.mark.parametrize("kind", ["mean", "none", "summary"])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 3), (3, 2), (3, 1)])
def test_resumed_from_a_checkpoint(group, tmp_path, before, after, merged, kind):
    group(before)(interrupted_in_processes, tmp_path, kind, merged)
    arguments = (tmp_path, kind, merged)
    alone = after == 1  # without a group
    for value in [resumed_in_processes(0, 1, *arguments)] if alone else group(after)(resumed_in_processes, *arguments):
        same(*map(without_order, (value, value_of(kind, *pair(34, 5)))))


def sampler_in_processes(rank, size, count, shuffle, drop_last, batch_size):
    p, q = pair(count, 5)
    data = TensorDataset(p, q)
    sampler = DistributedSampler(data, shuffle=shuffle, drop_last=drop_last)
    loader = DataLoader(data, batch_size=batch_size, sampler=sampler)
    metric = KLDivergence()
    for index, (p, q) in enumerate(loader):
        metric.update(p, q, real_samples(loader, index * batch_size, len(p)))
    return metric.compute(), metric.totals[3].item()


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("count", [1, 2, 7, 8, 100])
def test_samples_that_the_sampler_repeats(processes: Processes, count, shuffle, batch_size):
    exact = kl_divergence(*pair(count, 5))
    replies = processes(sampler_in_processes, count, shuffle, False, batch_size)
    for value, _ in replies:
        torch.testing.assert_close(value, exact, rtol=0, atol=0)
    assert sum(rows for _, rows in replies) == count


def test_drop_last_leaves_nothing_to_leave_out(processes: Processes):
    replies = processes(sampler_in_processes, 7, False, True, 3)
    assert sum(rows for _, rows in replies) == 7 - 7 % processes.size


def numbered(count, **options):
    """A data set that says which sample it gives: a sample is real where its number comes for the first time."""
    return DataLoader(TensorDataset(torch.arange(count)), **options)


class TestRealSamples:
    """Without processes: the samplers are told how many there are, and which one they serve."""

    data = TensorDataset(torch.arange(7))

    def sampler(self, cls=DistributedSampler, **options):
        return cls(self.data, num_replicas=2, rank=1, **options)

    def kept(self, loader):
        """What the loader gives and is real."""
        kept, seen = [], 0
        for (batch,) in loader:
            kept += batch[real_samples(loader, seen, len(batch))].tolist()
            seen += len(batch)
        return kept

    @pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
    @pytest.mark.parametrize("processes", [1, 2, 3, 4, 8])
    @pytest.mark.parametrize("shuffle", [False, True])
    @pytest.mark.parametrize("count", [1, 2, 7, 8, 100])
    def test_every_sample_once(self, count, shuffle, processes, batch_size):
        kept = []
        for rank in range(processes):
            data = TensorDataset(torch.arange(count))
            sampler = DistributedSampler(data, processes, rank, shuffle)
            kept += self.kept(DataLoader(data, batch_size=batch_size, sampler=sampler))
        assert sorted(kept) == list(range(count))

    @pytest.mark.parametrize("split_batches", [False, True])
    @pytest.mark.parametrize("batch_size", [4, 8])
    @pytest.mark.parametrize("processes", [1, 2, 4])
    @pytest.mark.parametrize("options", [{}, {"even_batches": False}, {"drop_last": True}, {"skip": 1}], ids=str)
    @pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 31, 32, 100])
    def test_every_sample_once_in_loaders_of_accelerate(self, count, options, processes, batch_size, split_batches):
        data_loader = pytest.importorskip("accelerate.data_loader")
        drop_last, skip = options.get("drop_last", False), options.get("skip", 0)
        kept, given = [], []
        for rank in range(processes):
            loader = numbered(count, batch_size=batch_size, drop_last=drop_last)
            loader = data_loader.prepare_data_loader(
                loader, None, processes, rank, split_batches, even_batches=options.get("even_batches", True)
            )
            if skip:
                loader = data_loader.skip_first_batches(loader, skip)
            kept += self.kept(loader)
            given += [x for (batch,) in loader for x in batch.tolist()]
        skipped = skip * batch_size * (1 if split_batches else processes)
        expected = sorted(set(given)) if drop_last else list(range(min(skipped, count), count))
        assert sorted(kept) == expected

    def test_shuffled_by_accelerate(self):
        data_loader = pytest.importorskip("accelerate.data_loader")
        kept = []
        for rank in range(4):
            torch.manual_seed(0)
            loader = numbered(10, batch_size=3, shuffle=True)
            kept += self.kept(data_loader.prepare_data_loader(loader, None, 4, rank, use_seedable_sampler=True))
        assert sorted(kept) == list(range(10))

    def test_batches_that_accelerate_sends_from_one_process(self):
        data_loader = pytest.importorskip("accelerate.data_loader")
        loader = data_loader.prepare_data_loader(
            numbered(7), torch.device("cpu"), 1, 0, put_on_device=True, dispatch_batches=True
        )
        with pytest.warns(
            UserWarning, match="^DataLoaderDispatcher sends every process its batches from the first one"
        ):
            assert real_samples(loader, 0, 2).all()

    def test_batches_of_their_own_that_accelerate_deals_out(self):
        data_loader = pytest.importorskip("accelerate.data_loader")

        class Growing(torch.utils.data.BatchSampler):
            def __iter__(self):
                yield from ([0], [1, 2], [3, 4, 5], [6])

        loader = numbered(7, batch_sampler=Growing(range(7), 2, False))
        loader = data_loader.prepare_data_loader(loader, None, 2, 1, even_batches=True)
        with pytest.warns(UserWarning, match="^Growing makes batches of its own"):
            assert real_samples(loader, 0, 2).all()

    def test_an_iterable_that_accelerate_deals_out(self):
        data_loader = pytest.importorskip("accelerate.data_loader")
        loader = DataLoader(Endless(), batch_size=2)
        loader = data_loader.prepare_data_loader(loader, None, 2, 0, dispatch_batches=False)
        with pytest.warns(UserWarning, match="^IterableDatasetShard does not say how many samples there are"):
            assert real_samples(loader, 0, 2).all()

    @pytest.mark.skipif("in_order" not in DataLoader.__init__.__annotations__, reason="of a later torch")
    def test_batches_in_any_order(self):
        loader = numbered(7, sampler=self.sampler(), num_workers=1, in_order=False)
        with pytest.warns(UserWarning, match="^DataLoader gives its batches in any order"):
            assert real_samples(loader, 0, 4).all()

    def test_by_sampler_and_by_batch_sampler(self):
        sampler = self.sampler(shuffle=False)
        batches = torch.utils.data.BatchSampler(sampler, 2, drop_last=False)
        for loader in (sampler, batches, numbered(7, sampler=sampler), numbered(7, batch_sampler=batches)):
            assert real_samples(loader, 2, 2).tolist() == [True, False]
            assert real_samples(loader, 4, 0).tolist() == []

    def test_nothing_to_leave_out(self):
        for loader in (
            DataLoader(self.data),
            DataLoader(self.data, sampler=self.sampler(drop_last=True)),
            DataLoader(self.data, batch_size=None, sampler=self.sampler()),
            DataLoader(Endless(), batch_size=2),
            DataLoader(self.data, num_workers=1),
            [1, 2, 3],
            None,
        ):
            assert deal_of(loader) is None
            assert real_samples(loader, 6, 3).tolist() == [True] * 3

    @pytest.mark.parametrize(("start", "size"), [(-1, 2), (0, -2)])
    def test_numbers_that_are_none(self, start, size):
        with pytest.raises(ValueError, match=f"at least 0. Got start={start} and size={size}"):
            real_samples(None, start, size)

    def test_a_data_set_is_no_loader(self):
        with pytest.raises(TypeError, match=r"must be the DataLoader, or its sampler. Got the data set, TensorDataset"):
            real_samples(self.data, 0, 2)

    def test_more_samples_than_there_are(self):
        loader = numbered(7, sampler=self.sampler())
        assert len(real_samples(loader, 2, 2)) == 2
        with pytest.raises(ValueError, match=r"This process gets 4 samples in an epoch. Got 3 before this batch and 2"):
            real_samples(loader, 3, 2)

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
            with pytest.warns(UserWarning, match="has an order of its own, so the samples that are repeated"):
                assert deal_of(loader) is None


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from range(7)
