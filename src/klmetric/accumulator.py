"""`Accumulator`: what both metrics share, the torchmetrics `Metric` around one vector of totals."""

import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.nn import Module
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from klmetric import totals
from klmetric.distributed import gather
from klmetric.inputs import Input, Rows, measure
from klmetric.options import Options, as_number, check_base


class Accumulator(Metric):
    """A metric whose state is one vector of totals, and with `keeps_rows` the divergence of every row besides.

    A subclass says what the totals are (`_empty`, `_of_batch`, `_merge`, `_add`) and what they come to (`_result`). The
    vector begins with what `klmetric.totals` describes.

    Every batch is measured before anything changes; what `sync`, `merge_state` or `load_state_dict` cannot do whole,
    they leave undone.
    """

    full_state_update = False

    totals: Tensor
    rows: list[Tensor]

    # Whether `_measure` is to tell which rows agree in their most likely class.
    asks_for_agreement = False
    # What the last batch was: a warning about its rows depends on it.
    _of_distributions = False

    def __init__(self, options: Options, base: float | None, keeps_rows: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.options = options
        self._unit = check_base(base)
        self.log_prob = options.input_format == ("log_probs", "log_probs")
        self.base = None if base is None else as_number("base", base)
        self.keeps_rows = keeps_rows
        self._warned = False
        self.add_state("totals", self._empty(), dist_reduce_fx=self._merging())
        if keeps_rows:
            self.add_state("rows", [], dist_reduce_fx="cat")

    def _empty(self) -> Tensor:
        """The totals of no data."""
        raise NotImplementedError

    def _of_batch(self, rows: Rows) -> Tensor:
        """The totals of one batch, without a fingerprint."""
        raise NotImplementedError

    def _merging(self) -> Callable[[Tensor], Tensor]:
        """What makes one of the totals of several parts, shape (parts, ...); a function that can be pickled."""
        raise NotImplementedError

    def _adding(self, sums: Tensor, batch: Tensor) -> Tensor:
        """Totals with one more batch, in a new tensor."""
        raise NotImplementedError

    def _result(self, sums: Tensor, rows: list[Tensor], stacklevel: int) -> Any:
        """What `compute` gives, of any totals."""
        raise NotImplementedError

    def _own_options(self) -> dict[str, tuple[Any, Any]]:
        """The options that only this metric has, each with its default, to be shown."""
        raise NotImplementedError

    def update(self, p: Input, q: Input, weight: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            p: the reference, shape (N, ..., classes), or a `torch.distributions.Distribution`.
            q: the approximation, like `p`.
            weight: bool or non-negative, its shape a prefix of the batch shape (N, ...); there, or on the CPU.
        """
        try:
            batch = self._measure(p, q, weight)
        except BaseException:
            self._update_count -= 1  # torchmetrics counts a call before it has succeeded
            raise
        self._add(batch)

    def compute(self) -> Any:
        """The result of all that was added, over all processes."""
        return self._result(self.totals, self.rows if self.keeps_rows else [], stacklevel=6)

    @torch.jit.unused
    def forward(self, p: Input, q: Input, weight: Tensor | None = None) -> Any:
        """Add a batch and return the value of this batch alone, with its gradient."""
        batch = self._measure(p, q, weight)
        warned = self._warned
        try:
            if self.dist_sync_on_step:
                value = self._result_over_processes(batch)
            else:
                value = self._result(batch["totals"], batch.get("rows", []), stacklevel=5)
        finally:
            self._warned = warned
        self._update_count += 1
        self._computed = None
        if self.keeps_rows:
            self.rows = [*self.rows]  # one of its own: in a MetricCollection, metrics share it
        self._add(batch)
        if self.compute_on_cpu:
            self._move_list_states_to_cpu()
        self._forward_cache = _detached(value)
        return value

    def reset(self) -> None:
        """Forget all that this process has added, also where the metric is synced."""
        if self._is_synced:
            self.unsync()
        super().reset()
        self._warned = False

    def extra_repr(self) -> str:
        """The options that are not the default, for `print(metric)`."""
        usual = vars(Options())
        shown = {**self._own_options(), "base": (self.base, None)}
        shown |= {name: (value, usual[name]) for name, value in vars(self.options).items()}
        return ", ".join(f"{name}={value!r}" for name, (value, default) in shown.items() if value != default)

    def _measure(self, p: Input, q: Input, weight: Tensor | None) -> dict[str, Any]:
        """The states of one batch alone. Raises before anything has changed."""
        if self._is_synced:
            raise TorchMetricsUserError(
                f"The metric must not be synced when a batch is added: `unsync` loses it. Got {self!r}. Leave"
                " `sync_context`, or call `unsync`, first."
            )
        rows = measure(p, q, weight, self.options, self.asks_for_agreement)
        self._of_distributions = isinstance(p, Distribution)
        batch: dict[str, Any] = {"totals": self._of_batch(rows)}
        if batch["totals"].device != self.totals.device:
            raise ValueError(
                f"The metric must be on the device of its input. Got p on {rows.kl.device} and the metric on"
                f" {self.device}. Use metric.to({str(rows.kl.device)!r})."
            )
        if self.keeps_rows:
            kept = ~rows.left_out
            if self.options.nan_strategy == "ignore":
                kept &= ~rows.kl.isnan()
            batch["rows"] = [rows.kl[kept].to(self.dtype)]
        return batch

    def add_rows(self, rows: Rows) -> None:
        """Add rows that were measured already (`klmetric.inputs.measure`) with the options of this metric."""
        self._update_count += 1
        self._computed = None
        self._add({"totals": self._of_batch(rows)})

    def _warn_of_invalid(self, numbers: list[float], stacklevel: int) -> None:
        """Say how many rows were no distributions: with nan_strategy="ignore" once."""
        if not self._warned:
            warned = totals.warn_of_invalid(numbers, self.options, stacklevel + 1, self._of_distributions)
            self._warned = warned and self.options.nan_strategy == "ignore"

    def _result_over_processes(self, batch: dict[str, Any]) -> Any:
        kept = self.metric_state
        try:
            self._set(batch)
            self._computed = None
            self._update_count += 1
            self._to_sync = True
            value = self.compute()
        finally:
            self._update_count -= 1
            self._set(kept)
            self._to_sync = self.sync_on_compute
        return value

    def _add(self, batch: dict[str, Any]) -> None:
        # Out of place: the processes that `ddp_spawn` starts share the memory of this tensor.
        self.totals = self._adding(self.totals, batch["totals"].detach())
        if self.keeps_rows:
            self.rows.extend(rows.detach() for rows in batch["rows"])

    def _set(self, states: dict[str, Any]) -> None:
        for name, state in states.items():
            setattr(self, name, state)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add what another metric, or its state, has counted. What it has seen comes after our own.

        Args:
            incoming_state: a metric with the same options, or its `metric_state` or `state_dict`. `base` and, but for
                "none", `reduction` may be others: they come into `compute` only.

        Raises:
            ValueError: if it has measured something else, or is empty.
            TorchMetricsUserError: if this metric is synced.
        """
        if self._is_synced:
            raise TorchMetricsUserError(
                f"Nothing can be merged into a synced metric: `unsync` loses it. Got {self!r}. Call `unsync` first."
            )
        state: Any = incoming_state.metric_state if isinstance(incoming_state, Accumulator) else incoming_state
        if isinstance(state, dict):
            if problem := self._problem_of(state):
                raise ValueError(f"Only what was measured with the same options can be merged. {problem}")
            incoming_state = state = self._on_this_device(state)
        own_totals, own_rows = self.totals, self.rows if self.keeps_rows else []
        super().merge_state(incoming_state)
        # torchmetrics puts what comes in first, goes on answering from before, and warns that there was no update.
        self.totals = self._merging()(torch.stack([own_totals, state["totals"]]))
        if self.keeps_rows:
            self.rows = own_rows + state["rows"]
        self._computed = None
        if self.totals[totals.ROWS]:
            self._update_count = max(self._update_count, 1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """What `load_state_dict` does: the totals are taken over if they were measured with the same options."""
        if self._is_synced:
            raise TorchMetricsUserError(
                f"Nothing can be loaded into a synced metric: `unsync` loses it. Got {self!r}. Call `unsync` first."
            )
        state = {key: state_dict[prefix + key] for key in self._defaults if prefix + key in state_dict}
        if state:
            if problem := self._problem_of(state):
                for key in state:
                    del state_dict[prefix + key]
                error_messages = args[-1]
                error_messages.append(f"Only what was measured with the same options can be loaded. {problem}")
                return
            state_dict |= {prefix + key: value for key, value in self._on_this_device(state).items()}
            self._computed = None
            if state["totals"][totals.ROWS]:
                self._update_count = max(self._update_count, 1)  # or torchmetrics warns that there was no update
        else:
            missing_keys = args[2]
            missing_keys += [prefix + key for key, persistent in self._persistent.items() if persistent]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _problem_of(self, state: dict[str, Any]) -> str:
        """Why these states cannot be ours; empty if they can."""
        theirs = state.get("totals")
        if not state:
            return f"Got no states for {self!r}. Does `state_dict` hold them? For that, call `persistent(True)` before."
        if state.keys() != self._defaults.keys():
            return f"Got the states {sorted(state)} for {self!r}, which has {sorted(self._defaults)}."
        if not isinstance(theirs, Tensor) or theirs.shape != self.totals.shape:
            what = f"shape {tuple(theirs.shape)}" if isinstance(theirs, Tensor) else f"{type(theirs).__name__}"
            size = self.totals.numel()
            return f"Totals are {size} numbers. Got {what} for {self!r}. Are they of another version, or metric?"
        if theirs[_MARKS].tolist() != self.totals[_MARKS].tolist():
            return f"Got totals with other options than those of {self!r}: compare the metric that made them."
        if self.keeps_rows and _length(state["rows"]) != self._number_of_rows(theirs):
            return f"Got totals of {self._number_of_rows(theirs)} rows, and other rows than these, for {self!r}."
        return ""

    def _on_this_device(self, state: dict[str, Any]) -> dict[str, Any]:
        moved = {**state, "totals": state["totals"].to(self.totals)}
        if self.keeps_rows:
            rows = state["rows"]
            rows = [rows] if isinstance(rows, Tensor) else rows  # it is one tensor in a synced metric
            moved["rows"] = [part.to(self.device, self.dtype) for part in rows]
        return moved

    def sync(
        self,
        dist_sync_fn: Callable[..., Any] | None = None,
        process_group: Any = None,
        should_sync: bool = True,
        distributed_available: Callable[[], bool] | None = None,
    ) -> None:
        """Take over the totals of all processes; a failure leaves this process's own in place.

        It takes one collective, an `all_gather` of the totals; two with `reduction="none"`, for the rows.

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
            try:
                if name == "totals":  # of one shape everywhere, and they say how many rows each process has
                    gathered = gather(state, group)
                    self._check_options_of_all(gathered)
                    lengths.extend([self._number_of_rows(part) for part in gathered])
                    return gathered
                if name == "rows":
                    return gather(state, group, lengths)
                parts: list[Tensor] = gather_all_tensors(state, group)  # a state of a subclass
                return parts
            except RuntimeError as error:
                raise type(error)(
                    f"{self!r} could not gather its totals from the other processes: has one of them failed, or not"
                    f" called compute()? This process still has its own totals. {error}"
                ) from error

        return gather_state

    def _check_options_of_all(self, gathered: list[Tensor]) -> None:
        marks = [part[_MARKS].tolist() for part in gathered]
        others = [rank for rank, mark in enumerate(marks) if mark != marks[0]]
        if others:
            raise ValueError(
                "All processes must measure with the same options, and all of them with reduction='none' or none."
                f" Got others on the ranks {others} than on rank 0. This process has {self!r}."
            )

    def _number_of_rows(self, sums: Tensor) -> int:
        left_out = sums[totals.INVALID] if self.options.nan_strategy == "ignore" else 0
        return int(sums[totals.ROWS] - left_out)

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

    def _apply(  # type: ignore[override]
        self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = (), recurse: bool = True
    ) -> Module:
        # Totals stay float64 whatever the dtype of the metric, and only `set_dtype` changes that: torchmetrics forgets
        # it when the metric moves to another device.
        dtype = self._dtype
        super()._apply(fn, exclude_state=(*self._defaults, *exclude_state))
        if not self._dtype_convert:
            self._dtype = dtype
        device = totals.device_of_totals(self.device)
        self._computed = None  # `to_empty` leaves anything in it
        with device:  # which need not be the default
            empty = self._empty()
        self._defaults["totals"] = empty
        if self.totals.is_meta and not empty.is_meta:  # by `to_empty`: there are no data to move
            self.totals = empty
            self.reset()
            return self
        self.totals = self.totals.to(device)
        if self.keeps_rows:
            self.rows = [rows.to(self.device, self.dtype) for rows in self.rows]
        return self


def _length(rows: Tensor | list[Tensor]) -> int:
    return rows.numel() if isinstance(rows, Tensor) else sum(part.numel() for part in rows)


# The fingerprint of the options, in any totals.
_MARKS = slice(totals.FINGERPRINT, totals.SIZE)


def _detached(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: one.detach() for key, one in value.items()}
    return value.detach()
