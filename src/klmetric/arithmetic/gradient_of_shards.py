"""The derivatives of the divergence of rows by some of their classes, of which other processes have the rest.

They take no word with these: what they need of the whole rows is known since the divergence was measured.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from klmetric.arithmetic import sharded
from klmetric.arithmetic.gradient import Side, by_sides
from klmetric.arithmetic.plain import blocks

if TYPE_CHECKING:
    from klmetric.options import Options


class WithGradientOfShards(torch.autograd.Function):
    """The divergence of whole rows, measured already, with its derivatives by the classes of this process."""

    @staticmethod
    def forward(
        ctx: Any, kl: Tensor, p: Tensor, q: Tensor, options: "Options", masses: sharded.Masses, kls: list[Tensor]
    ) -> Tensor:
        """KL of each row; `masses` and the parts `kls` of the direction have one number for each."""
        ctx.save_for_backward(p, q, *masses, *kls)
        ctx.options = options
        return kl.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of p and q."""
        p, q, *numbers = ctx.saved_tensors
        wanted, options = ctx.needs_input_grad[1:3], ctx.options
        results = [torch.zeros_like(x) if is_wanted else None for x, is_wanted in zip((p, q), wanted, strict=True)]
        targets = [x for x in results if x is not None]
        of_rows = [x.view(gradient.shape) for x in numbers]
        size = sharded.rows_at_once(p) if p.shape[-1] else 0
        for a, b, g, *rest in blocks(size, p, q, gradient.double(), *of_rows, *targets) if size else ():
            masses, kls = sharded.Masses(*rest[:4]), rest[4 : len(numbers)]
            logs_and_probs = sharded.normalised(a, b, options, masses)
            sides = [
                Side(probs, logs, log_mass.exp().unsqueeze(-1) if form == "probs" else None, options.temperature)
                for (logs, probs), log_mass, form in zip(
                    logs_and_probs, masses.logs(options.temperature), options.input_format, strict=True
                )
            ]
            for target, x in zip(rest[len(numbers) :], by_sides(sides, g, wanted, options, kls), strict=True):
                target.copy_(torch.where(g.unsqueeze(-1) == 0, 0, x))  # also where a row that is left out has NaN
        return None, *results, None, None, None


class Refused(torch.autograd.Function):
    """Divergences that have no derivatives, which is said when these are asked for."""

    @staticmethod
    def forward(ctx: Any, kl: Tensor, reason: str, *made_of: Tensor) -> Tensor:
        """The divergences as they are."""
        ctx.reason = reason
        return kl.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        """Raise."""
        raise RuntimeError(ctx.reason)
