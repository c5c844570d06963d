"""Which of the ways to the divergence of each row is taken."""

import torch
from torch import Tensor

from klmetric.arithmetic import blocks, plain
from klmetric.arithmetic.gradient import KLOfRows
from klmetric.arithmetic.tracing import has_gradient, transforms
from klmetric.options import Options


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
        return plain.plain(p, q, options)
    if not has_gradient(p, q):
        return blocks.kl_rows(p, q, options)
    # Also where gradients are disabled: it disables them for the arithmetic.
    kl: Tensor = KLOfRows.apply(p, q, options)  # type: ignore[no-untyped-call]
    return kl
