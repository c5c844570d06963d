"""Which of the ways to the divergence of each row is taken."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from klmetric import blocks, rows
from klmetric.gradient import KLOfRows
from klmetric.options import Options
from klmetric.tracing import transforms


def kl_of_rows(p: Tensor, q: Tensor, options: Options) -> Tensor:
    """KL divergence of each row in nats, in the direction and at the temperature of `options`.

    Args:
        p: reference, shape (..., classes), in the first of `options.input_format`.
        q: approximation, of the shape of `p`, in the second format.
        options: see `klmetric.kl_divergence`.

    Returns:
        shape (...), in the dtype that p and q promote to, at least float32; NaN where a row is no distribution.
    """
    if torch.compiler.is_compiling() or transforms() or p.device.type != "cpu":
        # One expression, for the compiler to fuse, and for `torch.func` to take apart.
        return rows.plain(p, q, options)
    if not has_gradient(p, q):
        return blocks.kl_rows(p, q, options)
    # Also where gradients are disabled: it disables them for the arithmetic.
    kl: Tensor = KLOfRows.apply(p, q, options)  # type: ignore[no-untyped-call]
    return kl


def has_gradient(*xs: Tensor) -> bool:
    """Whether derivatives may be wanted of what is made of these tensors."""
    # Forward mode marks no tensor, but has a level while it is on.
    return forward_ad._current_level >= 0 or any(x.requires_grad for x in xs)
