"""What is measured: the divergence of each row, and what the row counts."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """The divergence of each row, and what it counts.

    Attributes:
        kl: in nats, of the batch shape (N, ...); NaN where a row is no pair of distributions.
        weight: of the shape of `kl`, or None where every row counts 1.
        agrees: whether p and q have the same most likely class, of the shape of `kl`; None where nobody asked, or
            where there are no classes.
        dtype: of the result.
        totals: those that were asked for, with what they were added to; None where they did not come at once.
        fields: what else was asked, shape (fields, N, ...), in float64; None where nobody asked.
        holders: the processes that have measured these same rows; None where this one alone has them.
    """

    kl: Tensor
    weight: Tensor | None
    agrees: Tensor | None = None
    dtype: torch.dtype = torch.float32
    totals: Tensor | None = None
    fields: Tensor | None = None
    holders: tuple[int, ...] | None = None

    @property
    def left_out(self) -> Tensor:
        """Rows of weight 0, as a mask of the shape of `kl`."""
        return torch.zeros_like(self.kl, dtype=torch.bool) if self.weight is None else self.weight == 0
