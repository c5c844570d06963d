"""Totals from elsewhere: of another metric, or of a checkpoint. They are taken whole, or refused."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from klmetric.options import Options
from klmetric.totals import vector


class Loadable(Metric):
    """A metric whose states are `totals` and perhaps `rows`, which can be merged and loaded."""

    totals: Tensor
    rows: list[Tensor]
    if TYPE_CHECKING:  # torch.jit takes an annotation for a type of its own
        options: Options
    keeps_rows: bool

    def _merging(self) -> Callable[[Tensor], Tensor]:
        """What makes one of the totals of several parts, shape (parts, ...); a function that can be pickled."""
        raise NotImplementedError

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
        state: Any = incoming_state.metric_state if isinstance(incoming_state, Loadable) else incoming_state
        if isinstance(state, dict):
            if problem := self.problem_of(state):
                raise ValueError(f"Only what was measured with the same options can be merged. {problem}")
            incoming_state = state = self._on_this_device(state)
        own_totals, own_rows = self.totals, self.rows if self.keeps_rows else []
        super().merge_state(incoming_state)
        # torchmetrics puts what comes in first, goes on answering from before, and warns that there was no update.
        self.totals = self._merging()(torch.stack([own_totals, state["totals"]]))
        if self.keeps_rows:
            self.rows = own_rows + state["rows"]
        self._computed = None
        if self.totals[vector.ROWS]:
            self._update_count = max(self._update_count, 1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """What `load_state_dict` does: the totals are taken over if they were measured with the same options."""
        if self._is_synced:
            raise TorchMetricsUserError(
                f"Nothing can be loaded into a synced metric: `unsync` loses it. Got {self!r}. Call `unsync` first."
            )
        state = {key: state_dict[prefix + key] for key in self._defaults if prefix + key in state_dict}
        if state:
            if problem := self.problem_of(state):
                for key in state:
                    del state_dict[prefix + key]
                error_messages = args[-1]
                error_messages.append(f"Only what was measured with the same options can be loaded. {problem}")
                return
            state_dict |= {prefix + key: value for key, value in self._on_this_device(state).items()}
            self._computed = None
            if state["totals"][vector.ROWS]:
                self._update_count = max(self._update_count, 1)  # or torchmetrics warns that there was no update
        else:
            missing_keys = args[2]
            missing_keys += [prefix + key for key, persistent in self._persistent.items() if persistent]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def problem_of(self, state: dict[str, Any]) -> str:
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
        if theirs[vector.MARKS].tolist() != self.totals[vector.MARKS].tolist():
            return f"Got totals with other options than those of {self!r}: compare the metric that made them."
        number = vector.number_of_rows(theirs, self.options)
        if self.keeps_rows and _length(state["rows"]) != number:
            return f"Got totals of {number} rows, and other rows than these, for {self!r}."
        return ""

    def _on_this_device(self, state: dict[str, Any]) -> dict[str, Any]:
        moved = {**state, "totals": state["totals"].to(self.totals)}
        if self.keeps_rows:
            rows = state["rows"]
            rows = [rows] if isinstance(rows, Tensor) else rows  # it is one tensor in a synced metric
            moved["rows"] = [part.to(self.device, self.dtype) for part in rows]
        return moved


def _length(rows: Tensor | list[Tensor]) -> int:
    return rows.numel() if isinstance(rows, Tensor) else sum(part.numel() for part in rows)
