"""From hidden states to logits: the last product of a model, of so few rows at once that logits stay small."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from klmetric.arithmetic.tracing import has_gradient, is_recorded

# Bytes of logits that are made at once. The head is read from memory for each of these blocks, so they must not be
# small; and of several models, the logits of one are held while those of the next are made.
BLOCK = 2**26
# Of a head that has to be converted, so many bytes are at once.
CONVERTED = 2**25


def rows_at_once(classes: int, width: int = 0) -> int:
    """How many rows make a block, of so many classes in float32, with so many hidden states beside them."""
    return max(1, BLOCK // (4 * (classes + width)))


@dataclass(frozen=True, eq=False)
class Projection:
    """A product with a matrix, in float32, or in float64 where one side has that. It is not rounded to 16 bits.

    Attributes:
        weight: shape (classes, width).
        bias: shape (classes,).
        scale: that logits are multiplied by.
        softcap: c of c tanh(logit / c), which keeps them below c.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def dtype_with(self, hidden: Tensor) -> torch.dtype:
        """What the logits of these hidden states are in."""
        return torch.promote_types(torch.promote_types(hidden.dtype, self.weight.dtype), torch.float32)

    def __call__(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits of shape (..., classes), of hidden states (..., width).

        Args:
            hidden: that many rows.
            out: where to put them, shape (at least the rows, classes), in their dtype: memory that was used before is
                sooner at hand than new memory.
        """
        dtype, classes = self.dtype_with(hidden), len(self.weight)
        rows = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        step = classes if self.weight.dtype is dtype else max(1, CONVERTED // (rows.shape[-1] * dtype.itemsize))
        parts = torch.split(self.weight, step)
        with _without_autocast(hidden.device.type):
            if is_recorded() or has_gradient(hidden, self.weight, *([] if bias is None else [bias])):
                x = torch.cat([rows @ part.to(dtype).T for part in parts], -1) * self.scale
                x = x if bias is None else x + bias * self.scale
                x = x if self.softcap is None else (x / self.softcap).tanh() * self.softcap
                return x.view(*hidden.shape[:-1], classes)
            x = rows.new_empty(len(rows), classes) if out is None else out[: len(rows)]
            for part, target in zip(parts, torch.split(x, step, -1), strict=True):
                torch.mm(rows, part.to(dtype).T, out=target)
        if bias is not None:
            x += bias
        if self.scale != 1:
            x *= self.scale
        if self.softcap is not None:
            x.div_(self.softcap).tanh_().mul_(self.softcap)
        return x.view(*hidden.shape[:-1], classes)


def _without_autocast(device: str) -> AbstractContextManager[object]:
    is_known = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if is_known else nullcontext()
