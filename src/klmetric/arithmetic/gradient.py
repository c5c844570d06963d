r"""The derivatives of the divergence of each row, in the memory of the inputs.

With t the difference of the logits from its mean under p, the derivatives by the logits a (of p) and b (of q) are

.. math:: \frac{\partial KL}{\partial a} = -p \, t, \qquad \frac{\partial KL}{\partial b} = q - p

Those by weights, of which p and q are the shares, are these over the weights: a weight is the exponential of a logit.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from klmetric.arithmetic.plain import SWAPPED, blocks, plain, result_dtype
from klmetric.arithmetic.tracing import is_batched

if TYPE_CHECKING:
    from klmetric.options import Format, Options

# Elements of a block.
BLOCK = 3 * 2**17


class WithGradient(torch.autograd.Function):
    """The divergence of each row, measured already, with its derivatives. Saved for them are p and q alone."""

    @staticmethod
    def forward(p: Tensor, q: Tensor, kl: Tensor, options: "Options") -> Tensor:
        """KL of each row."""
        return kl.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, "Options"], output: Tensor) -> None:
        """Keep the inputs."""
        p, q, _, ctx.options = inputs
        ctx.save_for_backward(p, q)
        ctx.save_for_forward(p, q)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of p and q."""
        (p, q), gradient, wanted = ctx.saved_tensors, gradients[0], ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # they are to be differentiated themselves
            found = _of_anything(p, q, gradient, wanted, ctx.options, create_graph=True)
        elif is_batched(gradient):
            # It cannot be written in place. But a row has one value, so that the gradients differ by a factor.
            found = _in_blocks(p, q, torch.ones(p.shape[:-1], device=p.device), wanted, ctx.options)
            found = [(x * gradient.unsqueeze(-1)).to(x.dtype) for x in found]
        else:
            found = _in_blocks(p, q, gradient, wanted, ctx.options)
        results = iter(found)
        return *(next(results) if is_wanted else None for is_wanted in wanted), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        """Forward mode: the derivative along the tangents of p and q."""
        p, q = ctx.saved_tensors
        wanted = (tangents[0] is not None, tangents[1] is not None)
        found = _in_blocks(p, q, torch.ones(p.shape[:-1], device=p.device), wanted, ctx.options)
        along = [tangent for tangent in tangents[:2] if tangent is not None]
        parts = [(gradient * tangent).sum(-1) for gradient, tangent in zip(found, along, strict=True)]
        return sum(parts[1:], parts[0]).double()


def _in_blocks(p: Tensor, q: Tensor, gradient: Tensor, wanted: tuple[bool, bool], options: "Options") -> list[Tensor]:
    """Gradients of p and q, those that are wanted, block by block."""
    results = [
        torch.empty(p.shape, dtype=x.dtype, device=x.device)
        for x, is_wanted in zip((p, q), wanted, strict=True)
        if is_wanted
    ]
    gradient = gradient.to(result_dtype(p, q)).contiguous()
    is_given = not options.eps and (options.temperature == 1 or "probs" not in options.input_format)
    of_block = _of_rows if is_given and options.direction in SWAPPED else _of_anything
    for a, b, g, *targets in blocks(max(1, BLOCK // p.shape[-1]), p, q, gradient, *results):
        for target, x in zip(targets, of_block(a, b, g, wanted, options), strict=True):
            target.copy_(x)
    return results


def _of_rows(a: Tensor, b: Tensor, g: Tensor, wanted: tuple[bool, bool], options: "Options") -> list[Tensor]:
    # Logarithms of probabilities keep the digits in which they differ in float64 alone.
    is_exact = "probs" in options.input_format
    dtype = torch.float64 if is_exact else g.dtype
    sides = [_Side(x.to(dtype), f, options, is_exact) for x, f in zip((a, b), options.input_format, strict=True)]
    totals: list[Tensor | float] = [0.0, 0.0]
    for swapped in SWAPPED[options.direction]:
        i, j = (1, 0) if swapped else (0, 1)
        if wanted[i]:
            totals[i] += sides[i].as_reference(sides[j])
        if wanted[j]:
            totals[j] += sides[j].as_approximation(sides[i])
    return [total * g.unsqueeze(-1) for total, is_wanted in zip(totals, wanted, strict=True) if is_wanted]


class _Side:
    """Rows of p or q: probabilities, their logarithms (up to a constant), and the derivatives by what was given."""

    def __init__(self, x: Tensor, input_format: "Format", options: "Options", is_exact: bool) -> None:
        self.are_weights, self.temperature = input_format == "probs", options.temperature
        if self.are_weights:
            # A negative one has no logarithm to say so.
            self.mass = x.sum(-1, keepdim=True).masked_fill(x.amin(-1, keepdim=True) < 0, math.nan)
            self.probs = x / self.mass
            self.logs = self.probs.log()
        else:
            x = x if options.temperature == 1 else x / options.temperature
            self.probs, self.logs = x.softmax(-1), x.log_softmax(-1) if is_exact else x

    def as_reference(self, other: "_Side") -> Tensor:
        """Of KL(this ‖ other)."""
        p = self.probs
        t = torch.where(p == 0, 0, other.logs - self.logs)
        mean = (p * t).sum(-1, keepdim=True)
        if not self.are_weights:
            return p * (mean - t) / self.temperature
        # Where p is 0 the slope of p log(p/q) is infinite: that of q - p is taken, the other part of the term.
        return (mean - torch.where(p == 0, 1, t)) / self.mass

    def as_approximation(self, other: "_Side") -> Tensor:
        """Of KL(other ‖ this)."""
        q, p = self.probs, other.probs
        if not self.are_weights:
            return (q - p) / self.temperature
        return torch.where(p == 0, 1, (q - p) / q) / self.mass


def _of_anything(
    a: Tensor, b: Tensor, g: Tensor, wanted: tuple[bool, bool], options: "Options", create_graph: bool = False
) -> list[Tensor]:
    """By the expression of `klmetric.arithmetic.plain`."""
    sides = zip((a, b), wanted, strict=True)
    with torch.enable_grad():
        p, q = (x if create_graph else x.detach().requires_grad_(is_wanted) for x, is_wanted in sides)
        kl = plain(p, q, options)
        chosen = [x for x, is_wanted in zip((p, q), wanted, strict=True) if is_wanted]
        return list(torch.autograd.grad(kl, chosen, g.to(kl), create_graph=create_graph))
