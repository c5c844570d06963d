"""Plain loops under `torchrun`, for the tests: what the metric makes of every data set and batch size, as JSON."""

import json

import torch
import torch.distributed as dist
from cases import GRID, pair
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from klmetric import KLDivergence
from klmetric.distributed import real_samples


def evaluate(count: int, batch_size: int) -> list[float]:
    data = TensorDataset(*pair(count, 5, seed=count))
    loader = DataLoader(data, batch_size=batch_size, sampler=DistributedSampler(data))
    metric, sums = KLDivergence(), KLDivergence(reduction="sum").set_dtype(torch.float64)
    for index, (p, q) in enumerate(loader):
        real = real_samples(loader, index * batch_size, len(p))
        metric.update(p, q, weight=real)
        sums.update(p, q, weight=real)
    return [metric.compute().item(), sums.compute().item()]


if __name__ == "__main__":
    dist.init_process_group("gloo")
    values = [evaluate(*case) for case in GRID]
    if dist.get_rank() == 0:
        print("values", json.dumps(values))
    dist.destroy_process_group()
