"""Bringing the totals of all processes together: one collective, and each process's own come back whatever happens."""

import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from klmetric.options import Options
from klmetric.totals import vector


def gather(tensor: Tensor, group: Any = None, lengths: Sequence[int] | None = None) -> list[Tensor]:
    """One tensor from every process, in the order of the ranks, in one collective.

    Args:
        tensor: of the same shape and dtype everywhere; or of one dimension, with `lengths`.
        group: the processes; None for all.
        lengths: of the tensor of every process, known to all of them.
    """
    size = torch.distributed.get_world_size(group)
    tensor = tensor.detach().contiguous()
    lengths = None if lengths is None or len(set(lengths)) == 1 else lengths
    if lengths is not None:
        tensor = torch.cat([tensor, tensor.new_zeros(max(lengths) - len(tensor))])
    gathered = [torch.empty_like(tensor) for _ in range(size)]
    torch.distributed.all_gather(gathered, tensor, group)
    return gathered if lengths is None else [part[:n] for part, n in zip(gathered, lengths, strict=True)]


class Synced(Metric):
    """A metric whose states are `totals` and perhaps `rows`, gathered from all processes in one collective each."""

    if TYPE_CHECKING:  # torch.jit takes an annotation for a type of its own
        options: Options
    keeps_rows: bool
    # The processes that have the same rows as this one; None where it alone has them.
    _holders: "tuple[int, ...] | None" = None

    def sync(
        self,
        dist_sync_fn: Callable[..., Any] | None = None,
        process_group: Any = None,
        should_sync: bool = True,
        distributed_available: Callable[[], bool] | None = None,
    ) -> None:
        """Take over the totals of all processes; a failure leaves this process's own in place.

        It takes one collective, an `all_gather` of the totals; two with `reduction="none"`, for the rows. Of processes
        that have the same rows, such as those of a `class_group`, the first one counts.

        Args:
            dist_sync_fn: gathers one tensor from all processes, as in `torchmetrics.Metric`; None for the metric's own.
            process_group: the processes to gather from; None for all.
            should_sync: False does nothing.
            distributed_available: whether there is anything to gather from.
        """
        self._computed = None  # of the totals that were here
        gather_state = dist_sync_fn or self.dist_sync_fn or self._gathering()
        try:
            super().sync(gather_state, process_group, should_sync, distributed_available)
        except BaseException:
            if self._cache is not None and not self._is_synced:
                self._set(self._cache)
                self._cache = None
            raise

    def _set(self, states: dict[str, Any]) -> None:
        for name, state in states.items():
            setattr(self, name, state)

    def unsync(self, should_unsync: bool = True) -> None:
        """Take back this process's own totals.

        Args:
            should_unsync: False does nothing.
        """
        if should_unsync:
            self._computed = None
        super().unsync(should_unsync)

    def _gathering(self) -> Callable[..., list[Tensor]]:
        """What brings one state after the other together, in the order in which they were added."""
        names = iter(self._defaults)
        lengths: list[int] = []

        def gather_state(state: Tensor, group: Any = None) -> list[Tensor]:
            name = next(names, "")
            counts = self._counts_in(group)
            try:
                if name == "totals":  # of one shape everywhere, and they say how many rows each process has
                    gathered = gather(state if counts else self._nothing_like(state), group)
                    self._check_options_of_all(gathered)
                    lengths.extend([vector.number_of_rows(part, self.options) for part in gathered])
                    return gathered
                if name == "rows":
                    return gather(state if counts else state[:0], group, lengths)
                parts: list[Tensor] = gather_all_tensors(state, group)  # a state of a subclass
                return parts
            except RuntimeError as error:
                raise type(error)(
                    f"{self!r} could not gather its totals from the other processes: has one of them failed, or not"
                    f" called compute()? This process still has its own totals. {error}"
                ) from error

        return gather_state

    def _counts_in(self, group: Any) -> bool:
        """Whether this process is the first one, of those in a group, that has its rows."""
        if self._holders is None:
            return True
        group = torch.distributed.group.WORLD if group is None else group
        present = set(torch.distributed.get_process_group_ranks(group))
        return torch.distributed.get_rank() == next(rank for rank in self._holders if rank in present)

    def _nothing_like(self, totals: Tensor) -> Tensor:
        empty: Any = self._defaults["totals"]
        nothing: Tensor = empty.to(totals, copy=True)
        nothing[vector.MARKS] = totals[vector.MARKS]  # those of one batch have none
        return nothing

    def _check_options_of_all(self, gathered: list[Tensor]) -> None:
        marks = [part[vector.MARKS].tolist() for part in gathered]
        others = [rank for rank, mark in enumerate(marks) if mark != marks[0]]
        if others:
            raise ValueError(
                "All processes must measure with the same options, and all of them with reduction='none' or none."
                f" Got others on the ranks {others} than on rank 0. This process has {self!r}."
            )

    @contextmanager
    def sync_context(
        self,
        dist_sync_fn: Callable[..., Any] | None = None,
        process_group: Any = None,
        should_sync: bool = True,
        should_unsync: bool = True,
        distributed_available: Callable[[], bool] | None = None,
    ) -> Generator[None, None, None]:
        """Hold the totals of all processes for a while; this process's own come back even if the body raises.

        Every process must enter it. `state_dict()` within it is what all have counted together: to be loaded on one
        process, or it counts once on each.

        Args:
            dist_sync_fn: see `sync`.
            process_group: see `sync`.
            should_sync: see `sync`.
            should_unsync: False leaves the totals of all processes in place.
            distributed_available: see `sync`.
        """
        was_synced = self._is_synced
        self.sync(dist_sync_fn, process_group, should_sync, distributed_available)
        try:
            yield
        finally:
            if self._is_synced and should_unsync and not was_synced:
                self.unsync()

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        wrapped: Callable[..., Any] = super()._wrap_compute(compute)

        @functools.wraps(compute)
        def compute_once(*args: Any, **kwargs: Any) -> Any:
            # Within `sync_context` the totals are of all processes already: torchmetrics would sync again, and raise.
            to_sync, self._to_sync = self._to_sync, self._to_sync and not self._is_synced
            try:
                value = wrapped(*args, **kwargs)
            finally:
                self._to_sync = to_sync
            if isinstance(value, Mapping):
                return {**value}  # the other is kept, to answer again
            # torchmetrics makes a scalar of a single row.
            return value.reshape(-1) if self.keeps_rows and isinstance(value, Tensor) else value

        return compute_once
