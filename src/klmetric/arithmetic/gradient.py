r"""The derivatives of the divergence of each row, in the memory of the inputs.

With t the difference of the logits from its mean under p, the derivatives by the logits a (of p) and b (of q) are

.. math:: \frac{\partial KL}{\partial a} = -p \, t, \qquad \frac{\partial KL}{\partial b} = q - p
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from klmetric.arithmetic import plain
from klmetric.arithmetic.matrices import matrices_of

if TYPE_CHECKING:
    from klmetric.options import Options

# Elements of a block.
BLOCK = 3 * 2**17


def in_blocks(
    p: Tensor, q: Tensor, gradient: Tensor, wanted: tuple[bool, bool], options: "Options"
) -> list[Tensor | None]:
    """Gradients of p and q, where they are wanted, block by block."""
    results = [
        torch.empty(p.shape, dtype=x.dtype) if is_wanted else None for x, is_wanted in zip((p, q), wanted, strict=True)
    ]
    gradient = gradient.to(plain.result_dtype(p, q)).contiguous()
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


def _of_logits(a: Tensor, b: Tensor, g: Tensor, wanted: tuple[bool, bool], options: "Options") -> list[Tensor]:
    a, b = (x.to(g.dtype) for x in (a, b))
    if options.temperature != 1:
        a, b, g = a / options.temperature, b / options.temperature, g / options.temperature
    p, q = a.softmax(-1), b.softmax(-1)
    totals = [torch.zeros_like(p) if is_wanted else None for is_wanted in wanted]
    for swapped in plain.SWAPPED[options.direction]:
        of_p, of_q = reversed(totals) if swapped else totals
        first, second = (q, p) if swapped else (p, q)
        if of_q is not None:
            of_q += second - first
        if of_p is not None:
            d = torch.where(first == 0, 0, (a - b) if swapped else (b - a))
            of_p -= first * (d - (first * d).sum(-1, keepdim=True))
    return [total.mul_(g) for total in totals if total is not None]


def _of_anything(a: Tensor, b: Tensor, g: Tensor, wanted: tuple[bool, bool], options: "Options") -> list[Tensor]:
    """By the expression of `klmetric.arithmetic.plain`."""
    with torch.enable_grad():
        pair = [x.detach().requires_grad_(is_wanted) for x, is_wanted in zip((a, b), wanted, strict=True)]
        kl = plain.plain(pair[0], pair[1], options)
        chosen = [x for x, is_wanted in zip(pair, wanted, strict=True) if is_wanted]
        return list(torch.autograd.grad(kl, chosen, g.squeeze(1)))
