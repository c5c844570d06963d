"""Classes on several processes: the divergence of the whole rows, on every process, by two collectives."""

import contextlib
import copy
import math
import warnings
from functools import cache
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from cases import DIRECTIONS, FORMATS, pair
from every_kind import cases, reference
from kinds import OF_CLASSES, make, value_of
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributions import Categorical
from torchmetrics import MetricCollection

from klmetric import Head, KLDivergence, KLDivergenceSummary, TopK, kl_divergence
from klmetric.arithmetic import native

F64 = torch.float64
# How many of so many classes each of some processes has.
SPLITS = {
    "even": lambda classes, size: [classes * (i + 1) // size - classes * i // size for i in range(size)],
    "uneven": lambda classes, size: [classes - size + 1] + [1] * (size - 1),
    "none": lambda classes, size: [0] * (size - 1) + [classes],
}


def part(x, rank, size, split="even", dim=-1):
    lengths = SPLITS[split](x.shape[dim], size)
    return x.narrow(dim, sum(lengths[:rank]), lengths[rank])


@pytest.fixture(params=[1, 2, 3, 4])
def sharers(request, group):
    return group(request.param)


# ---- the divergence of a row -----------------------------------------------------------------------------------------
def without_kernel(ranks=range(9)):
    """On these processes, measure as where there is none."""
    return patch.object(native, "serves", lambda *_: False) if dist.get_rank() in ranks else contextlib.nullcontext()


def every_kind(rank, size, direction, split, ranks):
    values = []
    with without_kernel(ranks):
        for _, p, q, formats, temperature in cases((7, 300)):
            values.append(
                kl_divergence(part(p, rank, size, split), part(q, rank, size, split), reduction="none",
                              input_format=formats, temperature=temperature, direction=direction, nan_strategy="ignore",
                              class_group=dist.group.WORLD)
            )  # fmt: skip
    return values


@cache
def expected_of_every_kind(direction):
    return [
        torch.tensor([reference(*rows, formats, temperature, direction) for rows in zip(p, q, strict=True)], dtype=F64)
        for _, p, q, formats, temperature in cases((7, 300))
    ]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("direction", ["forward", "jensen_shannon"])
@pytest.mark.parametrize("ranks", [(), (0, 1, 2, 3), (1,)], ids=["kernel", "plain", "both"])
def test_rows_of_every_kind(sharers, direction, split, ranks):
    """Against sixty digits: near and far, offset, masked, peaked, warm, and no distributions at all."""
    names = [name for name, *_ in cases((7, 300))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        everyone = sharers(every_kind, direction, split, ranks)
    for values in everyone:
        for name, value, first, expected in zip(
            names, values, everyone[0], expected_of_every_kind(direction), strict=True
        ):
            torch.testing.assert_close(value, first, rtol=0, atol=0, equal_nan=True)
            expected = expected.nan_to_num(0, math.inf)  # rows that are ignored are 0
            torch.testing.assert_close(
                value.double(), expected, rtol=1e-6, atol=1e-19, msg=lambda m, n=name: f"{n}: {m}"
            )


def near(rank, size):
    p, q = near_rows()
    return kl_divergence(part(p, rank, size), part(q, rank, size), reduction="none", input_format="logits",
                         class_group=dist.group.WORLD)  # fmt: skip


def near_rows():
    p = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0), dtype=F64)
    return p, p + torch.tensor([[4e-7], [1e-5]]) * p.flip(-1)


def test_near_and_wide(three_processes):
    """From 1e-13 nats on, in more classes than are added up at once."""
    p, q = near_rows()
    expected = torch.tensor([reference(a, b) for a, b in zip(p, q, strict=True)], dtype=F64)
    assert 5e-14 < expected[0] < 2e-13
    for value in three_processes(near):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)


def other_directions(rank, size, formats, dtype):
    p, q = (x.to(dtype) for x in pair(5, 4, 50))
    a, b = (x if f == "logits" else x.log_softmax(-1) if f == "log_probs" else x.softmax(-1)
            for x, f in zip((p, q), formats, strict=True))  # fmt: skip
    values = []
    for direction in DIRECTIONS:
        options = {"input_format": formats, "direction": direction, "reduction": "none", "base": 2.0}
        value = kl_divergence(part(a, rank, size, "uneven"), part(b, rank, size, "uneven"),
                              class_group=dist.group.WORLD, **options)  # fmt: skip
        values.append((value, kl_divergence(a.double(), b.double(), **options)))
    return values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p_format", FORMATS)
@pytest.mark.parametrize("q_format", FORMATS)
def test_formats_directions_and_dtypes(three_processes, p_format, q_format, dtype):
    everyone = three_processes(other_directions, (p_format, q_format), dtype)
    for (value, expected), *others in zip(*everyone, strict=True):
        assert value.shape == (5, 4)
        assert value.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-13)
        assert all(torch.equal(value, other) for other, _ in others), "the same bits everywhere"


def shapes(rank, size, shape, dim):
    p, q = pair(*shape, input_format="logits")
    if dim is not None:
        p, q = p.movedim(-1, dim), q.movedim(-1, dim)
    options = {"input_format": "logits", "reduction": "none", "dim": -1 if dim is None else dim}
    value = kl_divergence(
        *(part(x, rank, size, dim=options["dim"]) for x in (p, q)), class_group=dist.group.WORLD, **options
    )
    return value, kl_divergence(p, q, **options)


@pytest.mark.parametrize(
    ("shape", "dim"), [((9,), None), ((0, 9), None), ((3, 0, 9), None), ((4, 9), 0), ((2, 3, 5, 9), 1), ((2, 1), None)]
)
def test_shapes(two_processes, shape, dim):
    for value, expected in two_processes(shapes, shape, dim):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-12)


def with_a_floor(rank, size, direction):
    p, q = pair(5, 4, 12, input_format="logits", dtype=F64)
    q[0, 0, :7], p[0, 1, 3:], q[1, 0, 2] = -math.inf, -math.inf, -800
    options = {"input_format": "logits", "eps": 1e-3, "direction": direction, "reduction": "none"}
    with collectives() as called:
        value = kl_divergence(*(part(x, rank, size, "none") for x in (p, q)), class_group=dist.group.WORLD, **options)
    assert called == ["all_gather"] * 2
    return value, kl_divergence(p, q, **options)


@pytest.mark.parametrize("direction", ["forward", "reverse", "jeffreys"])
def test_a_floor(sharers, direction):
    for value, expected in sharers(with_a_floor, direction):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)


def of_heads(rank, size, split, kind):
    """Each process has the rows of the heads that are of its classes."""
    draw = torch.Generator().manual_seed(0)
    h_p, h_q = (torch.randn(4, 6, width, generator=draw) for width in (5, 3))
    w_p, w_q = (torch.randn(40, width, generator=draw) for width in (5, 3))
    bias, weight, targets = torch.randn(40, generator=draw), torch.ones(4, 6), torch.arange(24).view(4, 6)
    weight[1, 2], h_p[1, 2] = 0, math.nan
    values = []
    for group, mine in ((dist.group.WORLD, lambda x: part(x, rank, size, split, 0)), (None, lambda x: x)):
        p, q = Head(h_p, mine(w_p), mine(bias), softcap=5.0), Head(h_q, mine(w_q))
        whole = (h_q @ w_q.T / 2).softmax(-1)
        probs = whole if group is None else part(whole, rank, size, split)
        for a, b in ((p, q), (p, probs), (probs, q)):
            metric = make(kind, class_group=group) if kind != "perplexity" else KLDivergenceSummary(
                perplexity=True, class_group=group
            )  # fmt: skip
            metric.sync_on_compute = metric._to_sync = group is not None
            with collectives() as called:
                metric.update(a, b, weight, targets)
            assert len(called) == 2 * (group is not None)
            values.append(metric.compute())
    return zip(values[:3], values[3:], strict=True)


@pytest.mark.parametrize("split", ["even", "uneven"])
@pytest.mark.parametrize("kind", ["mean", "none", "measures", "perplexity"])
def test_heads(three_processes, split, kind):
    for values in three_processes(of_heads, split, kind):
        for value, expected in values:
            close(value, expected)


def masked_where_p_is(rank, size, mask):
    """In the share where p has most, q has nothing."""
    p, q = torch.tensor([[2.0, 0.0, 1.0, 0.5]]), torch.tensor([[mask, 0.1, 0.9, 0.2]])
    p, q = p.expand(5, -1), q.expand(5, -1)
    metric = KLDivergenceSummary(input_format="logits", measures=True, perplexity=True, class_group=dist.group.WORLD)
    metric.update(*(part(x, rank, size) for x in (p, q)), None, torch.ones(5).long())
    return metric.compute()


@pytest.mark.parametrize("mask", [-1e9, -1e12, torch.finfo(torch.float32).min])
def test_a_mask_of_q_where_p_has_most(sharers, mask):
    p, q = torch.tensor([2.0, 0.0, 1.0, 0.5], dtype=F64).softmax(-1), torch.tensor([-math.inf, 0.1, 0.9, 0.2]).double()
    q = q.softmax(-1)
    m = (p + q) / 2
    expected = {
        "jensen_shannon": (torch.special.xlogy(p, p / m) + torch.special.xlogy(q, q / m)).sum() / 2,
        "total_variation": (p - q).abs().sum() / 2,
        "reverse": torch.special.xlogy(q, q / p).sum(),
        "perplexity_model": 1 / q[1],
    }
    for value in sharers(masked_where_p_is, mask):
        for name, x in expected.items():
            torch.testing.assert_close(value[name].double(), x, rtol=1e-6, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def empty_batches(rank, size):
    p, q = (part(x, rank, size) for x in pair(0, 3, 12, input_format="logits"))
    group = dist.group.WORLD
    for kind in OF_CLASSES:
        metric = make(kind, input_format="logits", class_group=group)
        metric.update(p, q, torch.ones(0), torch.ones(0, 3).long())
        torch.testing.assert_close(metric.totals, metric._empty(), rtol=0, atol=0, equal_nan=True)
    for options in ({"direction": "jensen_shannon"}, {"eps": 1e-3}):
        value = kl_divergence(p, q, input_format="logits", reduction="sum", class_group=group, **options)
        assert value == 0


def test_empty_batches(sharers):
    sharers(empty_batches)


def few_classes(rank, size):
    p, q = torch.tensor([[1.0, -math.inf, -math.inf]] * 3), torch.tensor([[1.0, 0.0, -1.0]] * 3)
    p[1], q[2, 1:] = torch.tensor([1.0, -math.inf, 0.5]), -math.inf
    ours, whole = (KLDivergenceSummary(input_format="logits", measures=True, class_group=group)
                   for group in (dist.group.WORLD, None))  # fmt: skip
    whole.sync_on_compute = whole._to_sync = False
    ours.update(*(part(x, rank, size) for x in (p, q)))
    whole.update(p, q)
    return [{k: x for k, x in m.compute().items() if "agreement" in k} for m in (ours, whole)]


def test_the_order_of_classes_without_mass(sharers):
    for value, expected in sharers(few_classes):
        close(value, expected)


# ---- metrics ---------------------------------------------------------------------------------------------------------
COLLECTIVES = ("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "barrier", "broadcast")


@contextlib.contextmanager
def collectives():
    """The names of those that are called."""
    called = []

    def noting(name, function):
        return lambda *args, **kwargs: called.append(name) or function(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(patch.object(dist, name, noting(name, getattr(dist, name))))
        yield called


def close(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(
                a[key], b[key], rtol=1e-6, atol=1e-9, equal_nan=True, msg=lambda m, k=key: f"{k}: {m}"
            )
    else:
        torch.testing.assert_close(a, b.view(a.shape), rtol=1e-6, atol=1e-12, equal_nan=True)


def batch_of_rows():
    p, q = pair(6, 5, 30, input_format="logits")
    p[0, 0] = q[0, 0] = 0  # equally likely classes, on all processes
    p[1, 0, 3], p[2, 0, 20:], q[1, 1, -1], q[2, 0, 20:] = [-math.inf] * 4
    q[2, 2] = p[2, 2]
    p[3, 1, 5] = math.nan
    return p, q, torch.tensor([1, 2, 1, 0, 1, 1.5])


def of_a_metric(rank, size, kind, split):
    p, q, weight = batch_of_rows()
    metric = make(kind, input_format="logits", class_group=dist.group.WORLD)
    for i in range(0, 6, 2):
        here = slice(i, i + 2)
        with collectives() as called:
            metric.update(*(part(x[here], rank, size, split) for x in (p, q)), weight[here])
        assert called == ["all_gather"] * 2
    with collectives() as called:
        value = metric.compute()
    assert called == ["all_gather"] * ((kind == "none") + 1)
    again = make(kind, input_format="logits", class_group=dist.group.WORLD, sync_on_compute=False)
    again.update(*(part(x, rank, size, split) for x in (p, q)), weight)
    return value, again.compute()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", OF_CLASSES)
def test_every_metric(sharers, kind, split):
    """Each row counts once, though all processes have measured it."""
    p, q, weight = batch_of_rows()
    expected = value_of(kind, p, q, weight, input_format="logits")
    for value, of_one in sharers(of_a_metric, kind, split):
        close(value, expected)
        close(of_one, expected)


def with_targets(rank, size):
    p, q, weight = batch_of_rows()
    targets = torch.arange(30).view(6, 5)
    targets[:, 0] = -100
    metrics = [KLDivergenceSummary(input_format="logits", perplexity=True, measures=True, class_group=group)
               for group in (dist.group.WORLD, None)]  # fmt: skip
    metrics[1].sync_on_compute = metrics[1]._to_sync = False
    for metric in metrics:
        sides = (part(x, rank, size, "uneven") if metric is metrics[0] else x for x in (p, q))
        with collectives() as called:
            metric.update(*sides, weight, targets)
        assert len(called) == 2 * (metric is metrics[0])
    return [metric.compute() for metric in metrics]


def test_targets_and_perplexities(sharers):
    for value, expected in sharers(with_targets):
        assert value["perplexity_model"].isfinite()
        close(value, expected)


def agreement(rank, size):
    """Ties, and the ten most likely of fewer classes than ten on each process."""
    p = torch.randint(0, 3, (200, 17), generator=torch.Generator().manual_seed(0)).float()
    q = p.clone()
    q[::3] = q[::3].roll(1, 0)
    p[5, :14], q[5, :14], q[6, 3:], p[6, 3:] = [-math.inf] * 4
    sharded = KLDivergenceSummary(input_format="logits", measures=True, class_group=dist.group.WORLD)
    sharded.update(part(p, rank, size), part(q, rank, size))
    whole = KLDivergenceSummary(input_format="logits", measures=True, sync_on_compute=False)
    whole.update(p, q)
    return sharded.compute(), whole.compute()


def test_agreement(sharers):
    for value, expected in sharers(agreement):
        assert value["agreement"] == value["agreement_1"] < 1
        close(value, expected)


def of_a_padded_vocabulary(rank, size):
    p, q = pair(5, 4 * size, input_format="logits")
    options = {"input_format": "logits", "classes": 4 * size - 5, "reduction": "none"}
    mine = [part(x, rank, size) for x in (p, q)]
    value = kl_divergence(*mine, class_group=dist.group.WORLD, **options)
    try:
        kl_divergence(*(part(x, rank, size, "uneven") for x in (p, q)), class_group=dist.group.WORLD, **options)
        said = ""
    except ValueError as error:
        said = str(error)
    with pytest.raises(ValueError, match="`classes` must be no more than there are"):
        kl_divergence(*mine, class_group=dist.group.WORLD, input_format="logits", classes=4 * size + 1)
    return value, kl_divergence(p, q, **options), said


def test_a_padded_vocabulary(three_processes):
    """The last process has no class that counts."""
    for value, expected, said in three_processes(of_a_padded_vocabulary):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-12)
        assert "every process must have as many classes. Got classes=7 and [10, 1, 1] classes" in said


def copies(rank, size):
    p, q, weight = batch_of_rows()
    mine = [part(x, rank, size) for x in (p, q)]
    options = {"input_format": "logits", "class_group": dist.group.WORLD}
    collection = MetricCollection({"sum": KLDivergence(reduction="sum", **options), "mean": KLDivergence(**options),
                                   "all": KLDivergenceSummary(**options)}).clone()  # fmt: skip
    values = []
    for _ in range(2):
        collection.update(*mine, weight)
        values.append(collection.compute())
        collection.reset()
    metric = copy.deepcopy(KLDivergence(reduction="sum", **options))
    values.append({"sum": metric(*mine, weight)})
    values.append({"sum": metric.compute()})
    on_step = KLDivergence(reduction="sum", dist_sync_on_step=True, **options)
    values.append({"sum": on_step(*mine, weight)})
    return values


def test_copies_and_collections(two_processes):
    p, q, weight = batch_of_rows()
    total = kl_divergence(p, q, input_format="logits", reduction="sum", weight=weight)
    for values in two_processes(copies):
        for value in values:
            torch.testing.assert_close(value["sum"], total, rtol=1e-6, atol=0)
        assert values[0]["all_count"] == values[1]["all_count"] == 25


# ---- with processes that have other rows -----------------------------------------------------------------------------
def two_by_two(rank, size, how, kind):
    """Four processes: two pairs, each with two shares of the classes of its rows."""
    p, q, weight = batch_of_rows()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    pairs, over = mesh.get_group("tp"), mesh.get_group("dp")
    rows = slice(0, 4) if rank < 2 else slice(4, 6)  # not equally many
    options = {"input_format": "logits"}
    if how == "class_group":
        metric = make(kind, class_group=pairs, **options)
    elif how == "class_group, process_group":
        metric = make(kind, class_group=pairs, process_group=over, **options)
    else:
        metric = make(kind, **options)
    if how.startswith("class_group"):
        for i in range(rows.start, rows.stop):
            metric.update(*(part(x[i : i + 1], rank % 2, 2) for x in (p, q)), weight[i : i + 1])
        return metric.compute()
    placements = {
        "classes": (Shard(0), Shard(2)),
        "positions": (Shard(0), Shard(1)),
        "nothing": (Shard(0), Replicate()),
        "nothing at all": (Replicate(), Replicate()),
    }[how]
    p, q = (distribute_tensor(x, mesh, placements) for x in (p, q))
    weight = weight.unsqueeze(-1).expand(6, 5)
    mine = tuple(x if x.is_shard() and x.dim < 2 else Replicate() for x in placements)
    with collectives() as called:
        metric.update(p, q, distribute_tensor(weight.contiguous(), mesh, mine))
    assert called.count("all_gather") == 2 * (how == "classes")
    return metric.compute()


@pytest.mark.parametrize("kind", ["sum", "none", "summary", "measures"])
@pytest.mark.parametrize(
    "how",
    ["class_group", "class_group, process_group", "classes", "positions", "nothing", "nothing at all"],
)
def test_each_row_counts_once(group, how, kind):
    p, q, weight = batch_of_rows()
    expected = value_of(kind, p, q, weight, input_format="logits")
    for value in group(4)(two_by_two, how, kind):
        if how == "positions" and kind != "sum":  # the rows of a sample are on two processes
            value, target = (
                {k: x for k, x in v.items() if "stderr" not in k and "top" not in k}
                if isinstance(v, dict) else v[~v.isnan()].sort().values for v in (value, expected)
            )  # fmt: skip
            close(value, target)
        else:
            close(value, expected)


def uneven_dtensor(rank, size):
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
    p, q = pair(3, 7, input_format="logits")
    options = {"input_format": "logits", "reduction": "none", "classes": 4}
    value = kl_divergence(*(distribute_tensor(x, mesh, [Shard(-1)]) for x in (p, q)), **options)
    return value, kl_divergence(p, q, **options)


def test_uneven_dtensors(sharers):
    for value, expected in sharers(uneven_dtensor):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-12)


# ---- what is refused -------------------------------------------------------------------------------------------------
def errors(rank, size):
    """What each call raises, in this order; those that one process alone makes, too."""
    p, q = (part(x, rank, size) for x in pair(6, 12, input_format="logits"))
    world, said = dist.group.WORLD, {}

    def raises(name, *args, **options):
        metric = KLDivergence(**{"input_format": "logits", "class_group": world, **options})
        try:
            metric.update(*args)
            said[name] = "nothing"
        except (TypeError, ValueError) as error:
            said[name] = f"{type(error).__name__}: {error}"
            assert metric.totals.sum() == metric._empty().sum(), "nothing has changed"

    alone = rank == 1
    raises("rows", p[: 5 if alone else 6], q[: 5 if alone else 6])
    raises("half the rows", p[: 3 if alone else 6], q[: 3 if alone else 6])
    raises("shape", p.view(2, 3, -1) if alone else p, q.view(2, 3, -1) if alone else q)
    raises("options", p, q, temperature=2.0 if alone else 1.0)
    raises("a shape on one", p[:, :-1] if alone else p, q)
    raises("a dtype on one", p.long() if alone else p, q)
    raises("a weight on one", p, q, torch.ones(5 if alone else 6))
    raises("no dim on one", p, q, dim=5 if alone else -1)
    raises("no tensor on one", None if alone else p, q)
    raises("another direction on one", p, q, direction="jeffreys" if alone else "forward")
    raises("targets on one", p, q, None, torch.zeros(6) if alone else torch.zeros(6).long())
    raises("another dtype on one", p.double() if alone else p, q)
    said["no targets on one"] = "nothing"
    summary = KLDivergenceSummary(input_format="logits", perplexity=True, class_group=world)
    try:
        summary.update(p, q, None, None if alone else torch.zeros(6).long())
    except ValueError as error:
        said["no targets on one"] = f"ValueError: {error}"
    raises("targets", p, q, None, torch.full((6,), 12))
    raises("other targets", p, q, None, torch.full((6,), 12 if alone else 11))
    raises("other weights", p, q, torch.tensor([1, 1, 1, 1, 0, 1 - alone]))
    raises("weights on one", p, q, torch.ones(6) if alone else None)
    raises("eps", p, q, eps=1e-3, direction="jensen_shannon")
    raises("TopK", TopK(torch.ones(6, 1), torch.ones(6, 1).long(), 6, "probs"), q)
    raises("Head and dim", Head(torch.ones(6, 2), torch.ones(6, 2)), q, dim=0)
    raises("Categorical", Categorical(logits=p), Categorical(logits=q))
    bad = p.clone()
    bad[3, 1] = math.nan if alone else 0
    raises("a bad row", bad, q, nan_strategy="error")
    mesh = init_device_mesh("cpu", (size,))
    sharded, other = (DTensor.from_local(p, mesh, [x]) for x in (Shard(1), Shard(0)))
    raises("both", sharded, sharded)
    raises("one DTensor", sharded, q, class_group=None)
    raises("others", sharded, other, class_group=None)
    raises("partial", *[DTensor.from_local(p, mesh, [Partial()])] * 2, class_group=None)
    weight = DTensor.from_local(torch.ones(6), mesh, [Shard(0)])
    raises("weight", sharded, sharded, weight, class_group=None)
    metric = KLDivergence(input_format="logits")
    metric.update(p, q)
    with pytest.raises(
        ValueError, match=r"All batches must be held by the same processes.* \(0, 1\) hold after others"
    ):
        metric.update(sharded, sharded)
    metric.reset()
    metric.update(sharded, sharded)
    return said


SAID = {
    "rows": "ValueError: All processes of `class_group` must have the same rows, and measure with the same options. Got"
            " others on the ranks [1] of the group than on its rank 0. This one has batch shape ",
    "half the rows": "must have the same rows, and measure with the same options",
    "shape": "must have the same rows, and measure with the same options",
    "options": "must have the same rows, and measure with the same options",
    "targets": "ValueError: `targets` must be classes, from 0 to 11, or ignore_index=-100",
    "another dtype on one": "must have the same rows, and measure with the same options",
    "another direction on one": "must have the same rows, and measure with the same options",
    "other targets": "ValueError: All processes of `class_group` must have the same targets. Got others on the ranks"
                     " [1] of the group than on its rank 0. This one has batch shape (6,)",
    "other weights": "ValueError: All processes of `class_group` must have the same weights. Got others on the ranks",
    "weights on one": "ValueError: All processes of `class_group` must have the same weights",
    "eps": "ValueError: `eps` must be 0 for the Jensen-Shannon divergence where the classes are on several processes."
           " Got 0.001",
    "TopK": "TypeError: `p` must be a torch.Tensor with `class_group`, or a Head: the classes of this process. Got Top",
    "Head and dim": "ValueError: `dim` must be -1 with a Head",
    "Categorical": "the classes of this process. Got Categorical",
    "a bad row": "1 of 6 rows are not; the first is row 3: its divergence is NaN",
    "both": "TypeError: `class_group` is for tensors with the classes of this process. Got a DTensor",
    "one DTensor": "TypeError: `p` and `q` must both be DTensors, or neither. Got Tensor as `q`",
    "others": "ValueError: `p` and `q` must be sharded alike, and have one shape. Got (6, 12)",
    "partial": "nowhere partial. Got placements (Partial(sum),)",
    "weight": "ValueError: `weight` must be sharded along the rows as `p` is. Got (Shard(dim=0),) and p (Shard",
}  # fmt: skip
# What is raised on the one where it is wrong; the other hears of it.
ON_ONE = {
    "a shape on one": "ValueError: `q` must have the shape of `p`",
    "a dtype on one": "TypeError: `p` must hold floating-point",
    "a weight on one": "ValueError: `weight` must have one entry per sample or per row",
    "no dim on one": "ValueError: `dim` must be an axis of the input",
    "no tensor on one": "TypeError: `p` must be a torch.Tensor with `class_group`, or a Head",
    "targets on one": "TypeError: `targets` must be integers",
    "no targets on one": "ValueError: `targets` must come with every batch, for the perplexity. Got none",
}
HEARD = (
    "ValueError: All processes of `class_group` must measure their classes. Got an error on the ranks [1] of the group"
)


def test_errors(two_processes):
    first, second = two_processes(errors)
    for name, text in SAID.items():
        assert text in first[name], name
        assert text in second[name], name
    for name, text in ON_ONE.items():
        assert text in second[name], name
        assert HEARD in first[name], name
    assert first.keys() == second.keys() == SAID.keys() | ON_ONE.keys()


def test_no_group():
    for group in ("tp", 2, object()):
        with pytest.raises(TypeError, match=r"must be a torch.distributed.ProcessGroup that this process is in"):
            KLDivergence(class_group=group)
        with pytest.raises(TypeError, match=r"Of a device mesh, give mesh.get_group\('tp'\)"):
            kl_divergence(torch.ones(1, 2), torch.ones(1, 2), class_group=group)


# ---- gradients -------------------------------------------------------------------------------------------------------
def expression(p, q, formats, temperature, direction):
    """The divergence of each row as it stands in the books."""
    log_p, log_q = ((x.log() if f == "probs" else x).div(temperature).log_softmax(-1)
                    for x, f in zip((p, q), formats, strict=True))  # fmt: skip
    forward, reverse = (log_p.exp() * (log_p - log_q)).sum(-1), (log_q.exp() * (log_q - log_p)).sum(-1)
    return {"forward": forward, "reverse": reverse, "jeffreys": forward + reverse}[direction]


def gradients(rank, size, formats, temperature, direction, split):
    p, q = (x if f == "logits" else x.log_softmax(-1) if f == "log_probs" else 3 * x.softmax(-1)
            for x, f in zip(pair(6, 5, 12, input_format="logits", dtype=F64), formats, strict=True))  # fmt: skip
    weight = torch.rand(6, 5, generator=torch.Generator().manual_seed(1))
    weight[2, 3] = weight[4, 0] = 0
    whole = [x.clone().requires_grad_() for x in (p, q)]
    expected = expression(*whole, formats, temperature, direction)
    ((expected * weight).sum() / weight.sum()).backward()
    p[2, 3] = q[4, 0] = math.nan  # no gradient comes of them, and no NaN
    mine = [part(x, rank, size, split).clone().requires_grad_() for x in (p, q)]
    with collectives() as called:
        kl_divergence(*mine, input_format=formats, temperature=temperature, direction=direction, weight=weight,
                      class_group=dist.group.WORLD).backward()  # fmt: skip
    assert called == ["all_gather"] * 2, "none more for the gradients"
    return [(x.grad, part(of_all.grad, rank, size, split)) for x, of_all in zip(mine, whole, strict=True)]


@pytest.mark.parametrize("direction", ["forward", "reverse", "jeffreys"])
@pytest.mark.parametrize(
    ("formats", "temperature"),
    [
        (("logits", "logits"), 2.0),
        (("log_probs", "logits"), 0.7),
        (("probs", "probs"), 1.0),
        (("probs", "logits"), 1.0),
    ],
)
@pytest.mark.parametrize("split", SPLITS)
def test_gradients(three_processes, formats, temperature, direction, split):
    """Of its own classes, on each process."""
    for sides in three_processes(gradients, formats, temperature, direction, split):
        for grad, expected in sides:
            torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-12)


def near_gradients(rank, size):
    p, q = near_rows()
    mine = [part(x, rank, size).clone().requires_grad_() for x in (p, q)]
    kl_divergence(*mine, input_format="logits", reduction="sum", class_group=dist.group.WORLD).backward()
    probs, t = p.softmax(-1), q - p
    t = t - (probs * t.expm1()).sum(-1, keepdim=True).log1p()  # log q - log p, to the last digits of small ones
    kl = (probs * (t.expm1() - t)).sum(-1, keepdim=True)
    expected = -probs * (t + kl), probs * t.expm1()
    return [(x.grad, part(of_all, rank, size)) for x, of_all in zip(mine, expected, strict=True)]


def test_gradients_of_near_rows(three_processes):
    for sides in three_processes(near_gradients):
        for grad, expected in sides:
            torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-18)


def gradients_of_dtensors(rank, size):
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
    p, q = pair(6, 7, input_format="logits", dtype=F64)
    whole = q.clone().requires_grad_()
    kl_divergence(p, whole, input_format="logits").backward()
    p, q = (distribute_tensor(x, mesh, [Shard(-1)]) for x in (p, q))
    q.requires_grad_()
    kl_divergence(p, q, input_format="logits").backward()
    return q.grad.full_tensor(), whole.grad


def test_gradients_of_dtensors(two_processes):
    for grad, expected in two_processes(gradients_of_dtensors):
        torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-12)


def no_gradients(rank, size):
    p, q = (part(x, rank, size).requires_grad_() for x in pair(6, 12))
    said = []
    for of_p, options in (
        (p, {"direction": "jensen_shannon"}),
        (p, {"eps": 0.1}),
        (p, {"temperature": 2.0}),
        (Head(torch.ones(6, 2, requires_grad=True), torch.ones(q.shape[-1], 2)), {}),
    ):
        value = kl_divergence(of_p, q, class_group=dist.group.WORLD, **options)
        try:
            value.backward()
        except RuntimeError as error:
            said.append(str(error))
    metric = KLDivergence(class_group=dist.group.WORLD)
    metric.update(p, q)
    return said, metric.compute()


def test_gradients_that_are_refused(two_processes):
    p, q = pair(6, 12)
    for said, value in two_processes(no_gradients):
        torch.testing.assert_close(value, kl_divergence(p, q), rtol=1e-6, atol=0)
        for text, what in zip(said, (r"in the direction 'jensen_shannon'", "with eps=0.1",
                                     "of probabilities at temperature=2.0", "of a Head"), strict=True):  # fmt: skip
            assert f"Got backward() {what}. Detach p and q, or gather the classes before." in text
