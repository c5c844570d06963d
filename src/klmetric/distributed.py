"""Which samples of a batch the data set really holds, when several processes share it."""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler


def padded_sampler(loader: Any) -> DistributedSampler[Any] | None:
    """The sampler of `loader`, if it is one that repeats samples so that every process gets equally many."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    if batch_sampler is None:  # it draws no batches, so there is no axis of samples
        return None
    sampler = getattr(batch_sampler, "sampler", None) or getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or sampler.total_size <= len(sampler.dataset):  # type: ignore[arg-type]
        return None
    for order in (sampler, batch_sampler):
        # One with an order of its own may put the repeats anywhere. The wrappers of torch and Lightning keep the order.
        if type(order).__iter__.__module__.partition(".")[0] not in _KNOWN:
            warnings.warn(
                f"{type(order).__name__} has an order of its own, so the samples that DistributedSampler repeats cannot"
                " be told from the others: they count, and the value depends on the number of processes.",
                stacklevel=2,
            )
            return None
    return sampler


_KNOWN = ("torch", "lightning", "pytorch_lightning")


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
