"""Which samples of a batch the data set really holds, when several processes share it."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler


def padded_sampler(loader: Any) -> DistributedSampler[Any] | None:
    """The sampler of `loader`, if it is one that repeats samples so that every process gets equally many."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    sampler = getattr(batch_sampler, "sampler", None) or getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        return None
    # A subclass with an order of its own may put its repeats anywhere. The wrappers of Lightning keep the order.
    order = type(sampler).__iter__.__module__.partition(".")[0]
    if order not in ("torch", "lightning", "pytorch_lightning"):
        return None
    return sampler if sampler.total_size > len(sampler.dataset) else None  # type: ignore[arg-type]


def real_samples(sampler: DistributedSampler[Any], start: int, size: int) -> Tensor:
    """Tell the samples of the data set from those that a `DistributedSampler` repeats to even out the processes.

    The sampler appends its repeats to the (shuffled) data set, then deals it out in turns: sample j of process r of R
    is number r + jR, and a repeat if the data set is no longer than that.

    Args:
        sampler: of this process.
        start: how many samples the process drew before this batch, in this epoch.
        size: the number of samples in the batch.

    Returns:
        bool, shape (size,), True where the sample is real.
    """
    number = sampler.rank + sampler.num_replicas * torch.arange(start, start + size)
    size_of_data: int = len(sampler.dataset)  # type: ignore[arg-type]
    return number < size_of_data
