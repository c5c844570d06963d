r"""The derivatives of the divergence of each row, in the memory of the inputs.

With t the difference of the logits from its mean under p, the derivatives by the logits a (of p) and b (of q) are

.. math:: \frac{\partial KL}{\partial a} = -p \, t, \qquad \frac{\partial KL}{\partial b} = q - p

Those by weights, of which p and q are the shares, are these over the weights: a weight is the exponential of a logit.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

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


class Side(NamedTuple):
    """Rows of p or q: probabilities, their logarithms (up to a constant), and what the derivatives take.

    Attributes:
        probs: normalised.
        logs: their logarithms; those of p and q are of use together.
        mass: what weights were divided by; None where logits were given.
        temperature: of the logits.
    """

    probs: Tensor
    logs: Tensor
    mass: Tensor | None
    temperature: float

    def as_reference(self, other: "Side", kl: Tensor | None = None) -> Tensor:
        """Of KL(this ‖ other), which is known where these are not all classes."""
        p = self.probs
        t = torch.where(p == 0, 0, other.logs - self.logs)
        mean = (p * t).sum(-1, keepdim=True) if kl is None else -kl.unsqueeze(-1)
        if self.mass is None:
            return p * (mean - t) / self.temperature
        # Where p is 0 the slope of p log(p/q) is infinite: that of q - p is taken, the other part of the term.
        return (mean - torch.where(p == 0, 1, t)) / self.mass

    def as_approximation(self, other: "Side") -> Tensor:
        """Of KL(other ‖ this)."""
        q, p = self.probs, other.probs
        if self.mass is None:
            return (q - p) / self.temperature
        return torch.where(p == 0, 1, (q - p) / q) / self.mass


def _side_of(x: Tensor, input_format: "Format", options: "Options", is_exact: bool) -> Side:
    if input_format == "probs":
        # A negative one has no logarithm to say so.
        mass = x.sum(-1, keepdim=True).masked_fill(x.amin(-1, keepdim=True) < 0, math.nan)
        probs = x / mass
        return Side(probs, probs.log(), mass, options.temperature)
    x = x if options.temperature == 1 else x / options.temperature
    return Side(x.softmax(-1), x.log_softmax(-1) if is_exact else x, None, options.temperature)


def _of_rows(a: Tensor, b: Tensor, g: Tensor, wanted: tuple[bool, bool], options: "Options") -> list[Tensor]:
    # Logarithms of probabilities keep the digits in which they differ in float64 alone.
    is_exact = "probs" in options.input_format
    dtype = torch.float64 if is_exact else g.dtype
    sides = [_side_of(x.to(dtype), f, options, is_exact) for x, f in zip((a, b), options.input_format, strict=True)]
    return by_sides(sides, g, wanted, options)


def by_sides(
    sides: list[Side],
    g: Tensor,
    wanted: Sequence[bool],
    options: "Options",
    kls: Sequence[Tensor | None] = (None, None),
) -> list[Tensor]:
    """The derivatives of rows by those of p and q that are wanted; `kls` of rows of which these are not all classes."""
    totals: list[Tensor | float] = [0.0, 0.0]
    for swapped, kl in zip(SWAPPED[options.direction], kls, strict=False):
        i, j = (1, 0) if swapped else (0, 1)
        if wanted[i]:
            totals[i] += sides[i].as_reference(sides[j], kl)
        if wanted[j]:
            totals[j] += sides[j].as_approximation(sides[i])
    return [total * g.unsqueeze(-1) for total, is_wanted in zip(totals, wanted, strict=True) if is_wanted]


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
