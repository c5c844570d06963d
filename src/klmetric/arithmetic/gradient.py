r"""The divergence of each row with gradients, in the memory of the inputs.

Saved for the backward pass are p and q alone. With t the difference of the logits from its mean under p, as in
`klmetric.arithmetic.blocks`, the derivatives by the logits a (of p) and b (of q) are

.. math:: \frac{\partial KL}{\partial a} = -p \, t, \qquad \frac{\partial KL}{\partial b} = q - p
"""

from typing import Any

import torch
from torch import Tensor

from klmetric.arithmetic import plain
from klmetric.arithmetic.blocks import BLOCK, kl_rows, matrices_of
from klmetric.options import Options


class KLOfRows(torch.autograd.Function):
    """`klmetric.arithmetic.blocks.kl_rows`, with a backward pass in blocks, and a second one."""

    @staticmethod
    def forward(p: Tensor, q: Tensor, options: Options) -> Tensor:
        """KL of each row."""
        return kl_rows(p, q, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Options], output: Tensor) -> None:
        """Keep the inputs."""
        p, q, ctx.options = inputs
        ctx.save_for_backward(p, q)
        ctx.save_for_forward(p, q)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of p and q."""
        p, q = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # they are to be differentiated themselves
            kl = plain.plain(p, q, ctx.options)
            chosen = [x for x, is_wanted in zip((p, q), wanted, strict=True) if is_wanted]
            results = iter(torch.autograd.grad(kl, chosen, gradients[0], create_graph=True))
            return *(next(results) if is_wanted else None for is_wanted in wanted), None
        if not any(is_batch(gradients[0]) for is_batch in _IS_BATCH):
            return *_in_blocks(p, q, gradients[0], wanted, ctx.options), None
        # A batch of gradients cannot be written in place. But a row has one value, so that they differ by a factor.
        one = torch.ones(p.shape[:-1], dtype=plain.result_dtype(p, q))
        found = _in_blocks(p, q, one, wanted, ctx.options)
        return *(None if x is None else (x * gradients[0].unsqueeze(-1)).to(x.dtype) for x in found), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        """Forward mode: the derivative along the tangents of p and q."""
        p, q = ctx.saved_tensors
        along = [(x, tangent) for x, tangent in zip((p, q), tangents[:2], strict=True) if tangent is not None]
        wanted = (tangents[0] is not None, tangents[1] is not None)
        one = torch.ones(p.shape[:-1], dtype=plain.result_dtype(p, q))
        found = [x for x in _in_blocks(p, q, one, wanted, ctx.options) if x is not None]
        parts = [(gradient * tangent).sum(-1) for gradient, (_, tangent) in zip(found, along, strict=True)]
        return sum(parts[1:], parts[0]).to(one.dtype)


# As `is_grads_batched` makes them, and `torch.func`.
_IS_BATCH = (torch._C._functorch.is_legacy_batchedtensor, torch._C._functorch.is_batchedtensor)


def _in_blocks(
    p: Tensor, q: Tensor, gradient: Tensor, wanted: tuple[bool, bool], options: Options
) -> list[Tensor | None]:
    results = [
        torch.empty(p.shape, dtype=x.dtype) if is_wanted else None for x, is_wanted in zip((p, q), wanted, strict=True)
    ]
    gradient = gradient.contiguous()
    of_block = _of_logits if "probs" not in options.input_format and not options.eps else _of_anything
    into = [x for x in results if x is not None]
    for a, b, *targets, g in matrices_of(p, q, *into, gradient):
        size = max(1, BLOCK // a.shape[1])
        for start in range(0, len(a), size):
            block = slice(start, start + size)
            found = of_block(a[block], b[block], g[block].unsqueeze(1), wanted, options)
            for target, x in zip(targets, found, strict=True):
                target[block] = x
    return results


def _of_logits(a: Tensor, b: Tensor, g: Tensor, wanted: tuple[bool, bool], options: Options) -> list[Tensor]:
    a, b = (x.to(g.dtype) for x in (a, b))
    if options.temperature != 1:
        a, b, g = a / options.temperature, b / options.temperature, g / options.temperature
    p, q = a.softmax(-1), b.softmax(-1)
    totals = [torch.zeros_like(p) if is_wanted else None for is_wanted in wanted]
    for swapped in {"forward": (False,), "reverse": (True,), "jeffreys": (False, True)}[options.direction]:
        of_p, of_q = reversed(totals) if swapped else totals
        first, second = (q, p) if swapped else (p, q)
        if of_q is not None:
            of_q += second - first
        if of_p is not None:
            d = torch.where(first == 0, 0, (a - b) if swapped else (b - a))
            of_p -= first * (d - (first * d).sum(-1, keepdim=True))
    return [total.mul_(g) for total in totals if total is not None]


def _of_anything(a: Tensor, b: Tensor, g: Tensor, wanted: tuple[bool, bool], options: Options) -> list[Tensor]:
    """By the expression of `klmetric.arithmetic.plain`."""
    with torch.enable_grad():
        pair = [x.detach().requires_grad_(is_wanted) for x, is_wanted in zip((a, b), wanted, strict=True)]
        kl = plain.plain(pair[0], pair[1], options)
        chosen = [x for x, is_wanted in zip(pair, wanted, strict=True) if is_wanted]
        return list(torch.autograd.grad(kl, chosen, g.squeeze(1)))
