"""The metric of one dataloader while an epoch runs: what is real of each batch, and what a checkpoint keeps."""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities.data import dim_zero_cat, dim_zero_max, dim_zero_min, dim_zero_sum

from klmetric.accumulate.loading import Loadable
from klmetric.distributed import deal_of
from klmetric.rows.measure import Input
from klmetric.rows.shards import first_places, local_part
from klmetric.rows.tensors import is_sharded

# What merges states of other metrics so that one process can have those of all.
_MERGE = {dim_zero_sum, dim_zero_cat, dim_zero_max, dim_zero_min}


class Running:
    """The metric of one dataloader while an epoch runs.

    Args:
        metric: a copy of it measures.
        device: of the copy.
        loader: where the batches come from.
        drop_padding: whether to leave out its repeated samples.
        suffix: what is appended to the names of its values.
        first: the index of its first batch, in an epoch that goes on where a checkpoint was made.
    """

    def __init__(
        self,
        metric: Metric | MetricCollection,
        device: torch.device,
        loader: Any,
        drop_padding: bool,
        suffix: str = "",
        first: int = 0,
    ) -> None:
        self.metric = metric.clone().to(device)
        self.metric.reset()
        self.deal = deal_of(loader) if drop_padding else None
        batches = getattr(loader, "batch_sampler", None)
        batches = getattr(loader, "sampler", None) if batches is None else batches  # with `batch_size=None` it may be
        self.batch_size: int | None = getattr(batches, "batch_size", None)
        self.suffix = suffix
        # A loader that cannot continue starts over, as Lightning warns.
        self.first = 0 if hasattr(loader, "load_state_dict") else first
        self.seen = 0
        self.batches = 0
        self.skipped = 0  # of the batches

    def state(self) -> list[dict[str, Any]]:
        """The totals of all processes."""
        states = []
        for metric in metrics_of(self.metric):
            with metric.sync_context():
                states.append({name: _copy(state) for name, state in metric.metric_state.items()})
        return states

    @property
    def can_continue(self) -> bool:
        """Whether one process can take over the totals of all: not those that are averaged, or kept side by side."""
        return all(
            metric._reductions and (isinstance(metric, Loadable) or set(metric._reductions.values()) <= _MERGE)
            for metric in metrics_of(self.metric)
        )

    def fits(self, states: list[dict[str, Any]]) -> bool:
        """Whether these are totals of the same metrics, with the same options."""
        metrics = metrics_of(self.metric)
        return len(metrics) == len(states) and all(
            metric._defaults  # a wrapper has none, and its metrics are not looked at
            and metric._defaults.keys() == state.keys()
            and not (isinstance(metric, Loadable) and metric.problem_of(state))
            for metric, state in zip(metrics, states, strict=True)
        )

    def load(self, states: list[dict[str, Any]]) -> None:
        """Continue from these totals."""
        for metric, state in zip(metrics_of(self.metric), states, strict=True):
            for name, value in state.items():
                is_list = isinstance(metric._defaults[name], list) and isinstance(value, Tensor)
                setattr(metric, name, [value] if is_list else value)
            metric._update_count = 1
            metric.to(metric.device)

    def update(self, p: Input, q: Input, weight: Tensor | None, batch_idx: int, targets: Tensor | None = None) -> None:
        """Add the batch, without the samples that are repeated."""
        self.batches += 1
        if self.deal is not None:
            real = self._real(p, batch_idx)
            if not bool(real.all()):
                if isinstance(p, Tensor) and isinstance(q, Tensor) and not (is_sharded(p) or is_sharded(q)):
                    # By index, not by weight: that serves metrics without weights as well.
                    p, q = p[real], q[real]
                    weight, targets = _of_samples(weight, real), _of_samples(targets, real)
                else:
                    weight = local_part("weight", weight, p) if is_sharded(p) else weight
                    weight = real if weight is None else weight * _as_prefix(real, weight)
        others = {"weight": weight, "targets": targets}
        self.metric.update(p, q, **{name: x for name, x in others.items() if x is not None})

    def skip(self) -> None:
        """Leave the batch out."""
        if self.deal is not None and self.batch_size is None:
            raise ValueError(
                "`drop_padding` counts the samples, so a batch that is left out must have a known size. Got a step that"
                " returned nothing, and a batch sampler without `batch_size`. Give the batch the weight 0 instead."
            )
        self.batches += 1
        self.skipped += 1

    def compute(self) -> Any:
        """The value, of all processes."""
        with warnings.catch_warnings():
            # This process may have had no batch where others had some.
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric .* was called before")
            return self.metric.compute()

    def _real(self, p: Any, batch_idx: int) -> Tensor:
        assert self.deal is not None
        shape = p.batch_shape if isinstance(p, Distribution) else p.shape
        start = self.seen if self.batch_size is None else (batch_idx - self.first) * self.batch_size
        left = self.deal.samples - start
        expected = left if self.batch_size is None else min(self.batch_size, left)
        size = shape[0] if shape else 1
        here = None
        if is_sharded(p) and any(place.is_shard(0) for place in p.placements):
            if self.batch_size is None:
                raise ValueError(
                    "`drop_padding` must know the size of the batch where a DTensor is sharded along the samples. Got"
                    f" {p.placements}, and a batch sampler without `batch_size`. Give it one, or shard p and q along"
                    " other axes."
                )
            # It may hold the batches of several processes one after another, or this one alone.
            here = first_places(p)
            batches = len(set((here // expected).tolist()))
            if size % expected == 0 and self.deal.processes % (size // expected) == 0 and batches <= 1:
                size = expected
        if size > expected or (self.batch_size is not None and size != expected):
            raise ValueError(
                "`drop_padding` needs one entry of `p` and `q` per sample, on the first axis: the samples that"
                f" DistributedSampler repeats are left out. Got shape {tuple(shape)} for a batch of {expected} samples."
                " Return (samples, positions, classes) from the step. (With drop_padding=False the value would depend"
                " on the number of processes.)"
            )
        self.seen = start + size
        real = self.deal.real(start, size)
        real = real if here is None else real[here % size]
        return real.to(p.device if isinstance(p, Tensor) else None)


def metrics_of(metric: Metric | MetricCollection) -> list[Metric]:
    """The metrics of a collection, or the only one."""
    return [metric] if isinstance(metric, Metric) else list(metric.values(copy_state=False))


def _copy(state: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    return state.detach().clone() if isinstance(state, Tensor) else [part.detach().clone() for part in state]


def _of_samples(x: Tensor | None, real: Tensor) -> Tensor | None:
    return x if x is None or x.ndim == 0 else x[real.to(x.device)]


def _as_prefix(real: Tensor, weight: Tensor) -> Tensor:
    return real.to(weight.device).reshape(real.shape + (1,) * max(weight.ndim - 1, 0))
