"""The callback under Lightning's ModelParallelStrategy: data-parallel processes, the classes of each on several."""

import re
from functools import cache

import pytest
import torch
import torch.distributed as dist
from cases import pair
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_run import trainer
from processes import as_launched
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from klmetric import KLDivergence, KLDivergenceSummary
from klmetric.lightning import KLDivergenceCallback
from klmetric.lightning.running import Running

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning:lightning")]

SAMPLES = 11
# What a step returns: DTensors on the mesh of its tensor-parallel group, or on that of all processes.
PLACEMENTS = {
    "classes": (Shard(2),),
    "positions": (Shard(1),),
    "samples": (Shard(0),),
    "whole": (Replicate(),),
    "data_parallel_and_classes": (Shard(0), Shard(2)),
    "data_parallel_and_positions": (Shard(0), Shard(1)),
    "data_parallel_and_samples": (Shard(0), Shard(0)),
}


def data():
    weight = torch.rand(SAMPLES, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return *pair(SAMPLES, 3, 37, input_format="logits"), weight


def sharded(x, mesh, placements):
    """The batches of all processes, of which this one has x: each process takes its own part."""
    shape, axes = list(x.shape), zip(mesh.mesh_dim_names, placements, mesh.get_coordinate(), strict=True)
    placements = [Replicate() if place.is_shard() and place.dim >= x.ndim else place for place in placements]
    for i, (name, place, index) in enumerate(axes):
        if name == "data_parallel":
            shape[0] *= mesh.size(i)
        elif place.is_shard() and place.dim < x.ndim:
            x = x.tensor_split([-(-x.shape[place.dim] // 2)], place.dim)[index]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(x, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


class Parallel(LightningModule):
    """Predicts what its data say, and returns a part of it."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def configure_model(self):
        pass

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        p, q, weight = batch
        group = self.device_mesh["tensor_parallel"]
        if self.kind == "class_group":
            p, q = (x.tensor_split(2, -1)[group.get_local_rank()] for x in (p, q))
            return {"p": p, "q": q, "weight": weight, "local_weight": weight}
        placements = PLACEMENTS[self.kind]
        mesh = self.device_mesh if len(placements) == 2 else group
        p, q, weight = (sharded(x, mesh, placements) for x in batch)
        return {"p": p, "q": q, "weight": weight, "local_weight": weight.to_local()}


BATCH_SIZES = (3, 4)


def metrics(**options):
    """Each with what its rows weigh."""
    options["input_format"] = "logits"
    summary = KLDivergenceSummary(measures=True, **options)
    return {None: KLDivergence(**options), "weight": summary, "local_weight": KLDivergence(**options)}


def validated(rank, size, root, kind):
    # As the strategy makes them, but the metric is there before.
    groups = [dist.new_group([i, i + 1]) for i in range(0, size, 2)] if kind == "class_group" else []
    of_kind = metrics(class_group=groups[rank // 2] if groups else None)
    callbacks = [KLDivergenceCallback(metric, weight=key, name=f"kl_{key}") for key, metric in of_kind.items()]
    loaders = {str(batch_size): DataLoader(TensorDataset(*data()), batch_size) for batch_size in BATCH_SIZES}
    with as_launched(rank, size):
        strategy = ModelParallelStrategy(data_parallel_size=size // 2, tensor_parallel_size=2)
        run = trainer(root, strategy=strategy, devices=size, callbacks=callbacks)
        run.validate(Parallel(kind), loaders, verbose=False)
    return {name: value.item() for name, value in run.callback_metrics.items()}


@cache
def expected():
    """Of whole rows, in one process."""
    p, q, weight = data()
    values = {}
    for key, metric in metrics().items():
        metric.update(p, q, weight if key else None)
        value = metric.compute()
        named = {f"_{name}": x for name, x in value.items()} if isinstance(value, dict) else {"": value}
        values |= {f"kl_{key}{name}/{size}": x.item() for name, x in named.items() for size in BATCH_SIZES}
    assert values["kl_weight_count/3"] == 3 * SAMPLES
    return values


@pytest.mark.parametrize(("kind", "size"), [("classes", 2), *((kind, 4) for kind in (*PLACEMENTS, "class_group"))])
def test_the_same_as_of_whole_rows(tmp_path, group, kind, size):
    """Two data-parallel processes have six samples each of the eleven: one is repeated."""
    for logged in group(size)(validated, tmp_path, kind):
        assert logged.keys() == expected().keys()
        for name, value in logged.items():
            # Where the positions of a sample are on several processes, each takes its own for a sample.
            if not ("stderr" in name and "positions" in kind):
                assert value == pytest.approx(expected()[name], rel=1e-6, abs=1e-9), name


def test_what_cannot_be_told_apart(group):
    group(4)(refused)


def running(batch_size):
    x = torch.zeros(SAMPLES)
    sampler = DistributedSampler(x, num_replicas=2, rank=dist.get_rank() // 2, shuffle=False)
    one = Running(KLDivergence(), torch.device("cpu"), DataLoader(x, batch_size=4, sampler=sampler), True)
    one.batch_size = batch_size
    return one


def refused(rank, size):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    flat, _ = pair(12, 5)
    for placements in [(Shard(0), Shard(1)), (Replicate(), Shard(1)), (Shard(0), Shard(0))]:
        p = sharded(flat, mesh, placements)
        text = f"Got shape {tuple(p.shape)} for a batch of 4 samples. Return (samples, positions, classes) from"
        with pytest.raises(ValueError, match=re.escape(text)):
            running(4).update(p, p, None, 0)
    p = sharded(flat[:3], mesh, (Shard(0), Shard(1)))
    text = (
        "`drop_padding` must know the size of the batch where a DTensor is sharded along the samples. Got"
        f" {p.placements}, and a batch sampler without `batch_size`. Give it one, or shard p and q along other axes."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        running(None).update(p, p, None, 0)
    p = sharded(flat[:3], mesh["tensor_parallel"], (Shard(1),))
    running(None).update(p, p, None, 0)
