"""`Accumulator`: what all metrics share, the torchmetrics `Metric` around one vector of totals."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.nn import Module
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from klmetric.accumulate.loading import Loadable
from klmetric.accumulate.seen import Kind, Seen
from klmetric.accumulate.sync import Synced
from klmetric.arithmetic.device import device_of_float64
from klmetric.arithmetic.native import Totals
from klmetric.options import Options, as_number, check_base, meant_by
from klmetric.rows.looks import Doubt, doubt_of_formats
from klmetric.rows.measure import Input, measure
from klmetric.rows.rows import Rows
from klmetric.totals import vector


class Accumulator(Loadable, Synced):
    """A metric whose state is one vector of totals, and with `keeps_rows` the divergence of every row besides.

    A subclass says what the totals are (`_empty`, `_of_batch`, `_merge`, `_add`) and what they come to (`_result`). The
    vector begins with what `klmetric.totals.vector` describes.

    Every batch is measured before anything changes; what `sync`, `merge_state` or `load_state_dict` cannot do whole,
    they leave undone.
    """

    full_state_update = False

    # Whether to find out which rows agree in their most likely class, and the totals to make in the same pass.
    asks_for_agreement = False
    _asked: Totals | None = vector.ASKED
    # What else to ask of each row, by the names of `klmetric.rows.fields`.
    _fields: tuple[str, ...] = ()

    def __init__(
        self,
        options: Options,
        base: float | None,
        keeps_rows: bool = False,
        class_group: Any = None,
        **kwargs: Any,
    ) -> None:
        try:
            super().__init__(**kwargs)
        except ValueError as error:
            known = inspect.signature(type(self).__init__).parameters
            meant = [meant for name in kwargs if (meant := meant_by(name, known))]
            if not meant or not str(error).startswith("Unexpected keyword arguments"):
                raise
            raise ValueError(f"{error}. Did you mean {', '.join(meant)}?") from None
        if class_group is not None:
            from klmetric.rows.shards import check_group

            self._holders = check_group(class_group)
        self._class_group = _Uncopied(class_group)
        self.options = options
        self._unit = check_base(base)
        self.log_prob = options.input_format == ("log_probs", "log_probs")
        self.base = None if base is None else as_number("base", base)
        self.keeps_rows = keeps_rows
        self._warned = False
        self._seen = Seen()
        self.add_state("totals", self._empty(), dist_reduce_fx=self._merging())
        if keeps_rows:
            self.add_state("rows", [], dist_reduce_fx="cat")

    def _empty(self) -> Tensor:
        """The totals of no data."""
        raise NotImplementedError

    def _of_batch(self, rows: Rows) -> Tensor:
        """The totals of one batch, without a fingerprint."""
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

    def __setattr__(self, name: str, value: Any) -> None:
        # Of what changes with every update, a module need not find out that it is no parameter, buffer or module.
        if name in _PLAIN:
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def update(self, p: Input, q: Input, weight: Tensor | None = None, targets: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            p: the reference, shape (N, ..., classes), or a `torch.distributions.Distribution`, a `klmetric.Head`, or a
                `klmetric.TopK`, of which not all classes are known: the divergence is at least what comes then.
            q: the approximation, like `p`.
            weight: bool or non-negative, its shape a prefix of the batch shape (N, ...); there, or on the CPU.
            targets: integers of the batch shape, the class that came true in each row: one of `ignore_index` does not
                count.
        """
        try:
            totals, rows = self._measure(p, q, weight, targets, self.totals)
        except BaseException:
            self._update_count -= 1  # torchmetrics counts a call before it has succeeded
            raise
        self._take(totals, rows)

    def compute(self) -> Any:
        """The result of all that was added, over all processes."""
        self._seen.say()
        is_called_by_a_subclass = type(self).compute is not Accumulator.compute
        return self._result(self.totals, self.rows if self.keeps_rows else [], 5 + is_called_by_a_subclass)

    @torch.jit.unused
    def forward(self, p: Input, q: Input, weight: Tensor | None = None, targets: Tensor | None = None) -> Any:
        """Add a batch and return the value of this batch alone, with its gradient."""
        totals, rows = self._measure(p, q, weight, targets)
        warned = self._warned
        try:
            if self.dist_sync_on_step:
                value = self._result_over_processes({"totals": totals, "rows": rows})
            else:
                is_called_by_a_subclass = type(self).forward is not Accumulator.forward
                value = self._result(totals, rows, 5 + is_called_by_a_subclass)
        finally:
            self._warned = warned
        self._update_count += 1
        self._computed = None
        if self.keeps_rows:
            self.rows = [*self.rows]  # one of its own: in a MetricCollection, metrics share it
        self._take(self._adding(self.totals, totals.detach()), rows)
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
        self._seen.begin_again()

    def extra_repr(self) -> str:
        """The options that are not the default, for `print(metric)`."""
        usual = vars(Options())
        shown = {**self._own_options(), "base": (self.base, None)}
        shown |= {name: (value, usual[name]) for name, value in vars(self.options).items()}
        return ", ".join(f"{name}={value!r}" for name, (value, default) in shown.items() if value != default)

    def _measure(
        self, p: Input, q: Input, weight: Tensor | None, targets: Tensor | None, before: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The totals of one batch, and of what was `before`, and its rows to keep. Raises before anything changed."""
        if self._is_synced:
            raise TorchMetricsUserError(
                f"The metric must not be synced when a batch is added: `unsync` loses it. Got {self!r}. Leave"
                " `sync_context`, or call `unsync`, first."
            )
        rows = self._rows(p, q, weight, targets, before if self.totals.is_cpu else None)
        totals = self._of_batch(rows)
        if totals.device != self.totals.device:
            raise ValueError(
                f"The metric must be on the device of its input. Got p on {rows.kl.device} and the metric on"
                f" {self.device}. Use metric.to({str(rows.kl.device)!r})."
            )
        if rows.holders != self._holders:
            self._take_holders(rows.holders)
        if before is not None and rows.totals is None:
            totals = self._adding(before, totals.detach())
        if (kind := self._kind_of(p, q)) != self._seen.kind:
            self._seen.take(kind, rows, lambda: self._doubt_of(p, q, rows))
        if not self.keeps_rows:
            return totals, []
        ignores = self.options.nan_strategy == "ignore"
        if rows.weight is None and not ignores:  # all are kept, which need not be found out on an accelerator
            return totals, [rows.kl.flatten().to(self.dtype)]
        kept = ~(rows.left_out | rows.kl.isnan()) if ignores else ~rows.left_out
        return totals, [rows.kl[kept].to(self.dtype)]

    def _kind_of(self, p: Input, q: Input) -> Kind:
        """What p and q are, and how many classes they have; None where that may vary."""
        if isinstance(p, Distribution) or self.options.classes is not None or self._class_group.value is not None:
            return type(p), type(q), None
        return type(p), type(q), p.shape[self.options.dim if isinstance(p, Tensor) else -1]

    def _doubt_of(self, p: Input, q: Input, rows: Rows) -> Doubt | None:
        """What may be wrong with the first batch."""
        return doubt_of_formats(p, q, self.options) if self._class_group.value is None else None

    def _take_holders(self, holders: tuple[int, ...] | None) -> None:
        if self.totals[vector.ROWS] > 0:
            raise ValueError(
                "All batches must be held by the same processes, of which a sync counts the first. Got one that the"
                f" processes {holders} hold after others that {self._holders} hold (None: this process alone). Give"
                " each kind a metric of its own."
            )
        self._holders = holders

    def _rows(self, p: Input, q: Input, weight: Tensor | None, targets: Tensor | None, before: Tensor | None) -> Rows:
        """What is measured of one batch."""
        group = self._class_group.value
        return measure(
            p, q, weight, self.options, self.asks_for_agreement, self._asked, before, targets, self._fields, group
        )

    def add_rows(self, rows: Rows) -> None:
        """Add rows that were measured already (`klmetric.rows.measure.measure`) with the options of this metric."""
        self._update_count += 1
        self._computed = None
        self._take(self._adding(self.totals, self._of_batch(rows)), [])

    def _warn_of_invalid(self, numbers: list[float], stacklevel: int) -> None:
        """Say how many rows were no distributions: with nan_strategy="ignore" once."""
        vector.check_weights(numbers)
        if not self._warned:
            warned = self._say_invalid(numbers, stacklevel + 1)
            self._warned = warned and self.options.nan_strategy == "ignore"

    def _say_invalid(self, numbers: list[float], stacklevel: int) -> bool:
        """Say it, if there is anything to say."""
        return vector.warn_of_invalid(numbers, self.options, stacklevel + 1, *(self._seen.kind or ())[:2])

    def _result_over_processes(self, batch: dict[str, Any]) -> Any:
        kept = self.metric_state
        try:
            self._set({name: state for name, state in batch.items() if name in kept})
            self._computed = None
            self._update_count += 1
            self._to_sync = True
            value = self.compute()
        finally:
            self._update_count -= 1
            self._set(kept)
            self._to_sync = self.sync_on_compute
        return value

    def _take(self, totals: Tensor, rows: list[Tensor]) -> None:
        # A new tensor: the processes that `ddp_spawn` starts share the memory of the old one.
        self.totals = totals
        if self.keeps_rows:
            self.rows.extend(part.detach() for part in rows)

    def _apply(  # type: ignore[override]
        self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = (), recurse: bool = True
    ) -> Module:
        # Totals stay float64 whatever the dtype of the metric, and only `set_dtype` changes that: torchmetrics forgets
        # it when the metric moves to another device.
        dtype = self._dtype
        super()._apply(fn, exclude_state=(*self._defaults, *exclude_state))
        if not self._dtype_convert:
            self._dtype = dtype
        device = device_of_float64(self.device)
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


# The names that an error about a wrong argument has: that of this class is nobody's.
for _method in (Accumulator.update, Accumulator.forward):
    _method.__qualname__ = _method.__name__


class _Uncopied:
    """Holds a process group, which cannot be copied: a clone of the metric is in the same one."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Uncopied":
        return self


_PLAIN = {"totals", "_computed", "_update_count", "_warned", "_forward_cache"}


def _detached(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: one.detach() for key, one in value.items()}
    return value.detach()
