r"""The derivatives of the divergence of each row, in the memory of the inputs.

With t the difference of the logits from its mean under p, the derivatives by the logits a (of p) and b (of q) are

.. math:: \frac{\partial KL}{\partial a} = -p \, t, \qquad \frac{\partial KL}{\partial b} = q - p
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from klmetric.arithmetic.plain import SWAPPED, blocks, plain, result_dtype

if TYPE_CHECKING:
    from klmetric.options import Options

# Elements of a block.
BLOCK = 3 * 2**17
# As `is_grads_batched` makes them, and `torch.func`.
_IS_BATCH = (torch._C._functorch.is_legacy_batchedtensor, torch._C._functorch.is_batchedtensor)


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
        elif any(is_batch(gradient) for is_batch in _IS_BATCH):
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
    is_plain = "probs" not in options.input_format and not options.eps and options.direction in SWAPPED
    of_block = _of_logits if is_plain else _of_anything
    for a, b, g, *targets in blocks(max(1, BLOCK // p.shape[-1]), p, q, gradient, *results):
        for target, x in zip(targets, of_block(a, b, g, wanted, options), strict=True):
            target.copy_(x)
    return results


def _of_logits(a: Tensor, b: Tensor, g: Tensor, wanted: tuple[bool, bool], options: "Options") -> list[Tensor]:
    a, b = (x.to(g.dtype) for x in (a, b))
    if options.temperature != 1:
        a, b, g = a / options.temperature, b / options.temperature, g / options.temperature
    p, q = a.softmax(-1), b.softmax(-1)
    totals = [torch.zeros_like(p) if is_wanted else None for is_wanted in wanted]
    for swapped in SWAPPED[options.direction]:
        of_p, of_q = reversed(totals) if swapped else totals
        first, second = (q, p) if swapped else (p, q)
        if of_q is not None:
            of_q += second - first
        if of_p is not None:
            d = torch.where(first == 0, 0, (a - b) if swapped else (b - a))
            of_p -= first * (d - (first * d).sum(-1, keepdim=True))
    return [total.mul_(g.unsqueeze(-1)) for total in totals if total is not None]


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
