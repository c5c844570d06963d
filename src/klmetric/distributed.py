"""One data set on several processes: which samples each one really has, and how totals come together."""

import operator
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset, DistributedSampler


def real_samples(loader: Any, start: int, size: int) -> Tensor:
    """Tell the samples of the data set from those that are repeated to give every process equally many.

    Pass it as `weight`, and the result is the same for every number of processes. It knows torch's `DistributedSampler`
    and the loaders that Lightning, Fabric and Accelerate prepare for several processes (Accelerate's unless it is asked
    to dispatch batches). Of any other loader, one of a single process or of an iterable data set, every sample is real.

    Args:
        loader: the `DataLoader` of this process, or its sampler or batch sampler.
        start: how many samples this process drew from it before this batch, in this epoch: a running sum of
            `len(batch)`, or the index of the batch times the batch size.
        size: the number of samples in the batch.

    Returns:
        bool, shape (size,), True where the sample is real, on the CPU.

    Raises:
        TypeError: for a data set, or numbers that are not whole.
        ValueError: for a negative `start` or `size`, or more samples than this process gets.

    Examples:
        >>> import torch
        >>> from torch.utils.data import DataLoader, DistributedSampler
        >>> from klmetric import KLDivergence
        >>> from klmetric.distributed import real_samples
        >>> data = torch.rand(7, 2, 3)
        >>> sampler = DistributedSampler(data, num_replicas=2, rank=1, shuffle=False)  # of four samples, to be even
        >>> loader = DataLoader(data, batch_size=3, sampler=sampler)
        >>> metric = KLDivergence()
        >>> seen = 0
        >>> for batch in loader:
        ...     real = real_samples(loader, seen, len(batch))
        ...     seen += len(batch)
        ...     metric.update(batch[:, 0], batch[:, 1], weight=real)
        ...     print(real)
        tensor([True, True, True])
        tensor([False])
    """
    if isinstance(loader, Dataset):
        raise TypeError(f"`loader` must be the DataLoader, or its sampler. Got the data set, {type(loader).__name__}.")
    start, size = operator.index(start), operator.index(size)
    if start < 0 or size < 0:
        raise ValueError(f"`start` and `size` are numbers of samples, at least 0. Got start={start} and size={size}.")
    deal = deal_of(loader)
    if deal is None:
        return torch.ones(size, dtype=torch.bool)
    if start + size > deal.samples:
        raise ValueError(
            f"This process gets {deal.samples} samples in an epoch. Got {start} before this batch and {size} in it."
            " Does `start` begin at 0 in every epoch?"
        )
    return deal.real(start, size)


@dataclass(frozen=True)
class Deal:
    """How a data set is dealt out: repeated past its end, and then to each process in its turn a number of samples.

    Args:
        size: the number of samples in the data set.
        processes: the number of processes.
        rank: of this process.
        turn: how many samples a process is dealt at once.
        skipped: how many samples of this process its loader leaves out at the beginning.
    """

    size: int
    processes: int
    rank: int
    turn: int = 1
    skipped: int = 0

    @property
    def samples(self) -> int:
        """How many samples this process gets, the repeated ones included."""
        return -(-self.size // (self.processes * self.turn)) * self.turn - self.skipped

    def real(self, start: int, size: int) -> Tensor:
        """Whether each of `size` samples after the first `start` of this process is one of the data set."""
        j = torch.arange(self.skipped + start, self.skipped + start + size)
        number = (j // self.turn * self.processes + self.rank) * self.turn + j % self.turn
        return number < self.size


def deal_of(loader: Any) -> Deal | None:
    """How the data set of `loader` is dealt out to the processes; None if nothing is repeated, as far as is known."""
    if type(loader).__name__ == "DataLoaderDispatcher":
        _warn(loader, "sends every process its batches from the first one")
        return None
    if type(getattr(loader, "dataset", None)).__name__ == "IterableDatasetShard":
        _warn(loader.dataset, "does not say how many samples there are")
        return None
    batches = loader if isinstance(loader, BatchSampler) else getattr(loader, "batch_sampler", None)
    if batches is None and isinstance(getattr(loader, "sampler", None), BatchSampler):
        batches = loader.sampler
    if batches is not None and _is_of_accelerate(batches):
        return _deal_of_accelerate(batches)
    # Without batches there is no axis of samples.
    places = (loader,) if batches is None else (getattr(batches, "sampler", None), getattr(loader, "sampler", None))
    sampler = next((place for place in places if isinstance(place, DistributedSampler)), None)
    if sampler is None or sampler.total_size <= len(sampler.dataset):  # type: ignore[arg-type]
        return None
    if getattr(loader, "num_workers", 0) and not getattr(loader, "in_order", True):
        _warn(loader, "gives its batches in any order (in_order=False)")
        return None
    for order in (sampler, batches):
        # One with an order of its own may put the repeats anywhere. The wrappers of torch and Lightning keep the order.
        if order is not None and type(order).__iter__.__module__.partition(".")[0] not in _KNOWN:
            _warn(order, "has an order of its own")
            return None
    # It appends its repeats to the (shuffled) data set and deals it out one by one.
    return Deal(len(sampler.dataset), sampler.num_replicas, sampler.rank)  # type: ignore[arg-type]


_KNOWN = ("torch", "lightning", "pytorch_lightning", "lightning_fabric")


def _is_of_accelerate(batches: Any) -> bool:
    kind = type(batches)
    return kind.__module__ == "accelerate.data_loader" and kind.__name__ in ("BatchSamplerShard", "SkipBatchSampler")


def _deal_of_accelerate(batches: Any) -> Deal | None:
    """Accelerate deals out whole batches, or with `split_batches` equal parts of each."""
    skipped = 0
    while type(batches).__name__ == "SkipBatchSampler":
        skipped += batches.skip_batches
        batches = batches.batch_sampler
    inner = getattr(batches, "batch_sampler", None)
    if not _is_of_accelerate(batches) or batches.drop_last or not batches.even_batches:
        return None
    if type(inner) is not BatchSampler or batches.batch_size is None:
        _warn(inner, "makes batches of its own")
        return None
    turn = batches.batch_size // batches.num_processes if batches.split_batches else batches.batch_size
    size = len(inner.sampler)  # type: ignore[arg-type]
    return Deal(size, batches.num_processes, batches.process_index, turn, skipped * turn)


def _warn(of: Any, reason: str) -> None:
    warnings.warn(
        f"{type(of).__name__} {reason}, so the samples that are repeated to even out the processes cannot be told from"
        " the others: they count, and the value depends on the number of processes.",
        stacklevel=4,
    )
