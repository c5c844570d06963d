"""Which of the ways to the divergence of each row is taken."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from klmetric.arithmetic import blocks, plain
from klmetric.arithmetic.gradient import in_blocks
from klmetric.arithmetic.tracing import has_gradient, transforms

if TYPE_CHECKING:
    from klmetric.options import Options


def kl_of_rows(p: Tensor, q: Tensor, options: "Options") -> Tensor:
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


class KLOfRows(torch.autograd.Function):
    """`klmetric.arithmetic.blocks`, with derivatives. Saved for them are p and q alone."""

    @staticmethod
    def forward(p: Tensor, q: Tensor, options: "Options") -> Tensor:
        """KL of each row."""
        return blocks.kl_rows(p, q, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, "Options"], output: Tensor) -> None:
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
            return *in_blocks(p, q, gradients[0], wanted, ctx.options), None
        # A batch of gradients cannot be written in place. But a row has one value, so that they differ by a factor.
        one = torch.ones(p.shape[:-1], dtype=plain.result_dtype(p, q))
        found = in_blocks(p, q, one, wanted, ctx.options)
        return *(None if x is None else (x * gradients[0].unsqueeze(-1)).to(x.dtype) for x in found), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        """Forward mode: the derivative along the tangents of p and q."""
        p, q = ctx.saved_tensors
        along = [(x, tangent) for x, tangent in zip((p, q), tangents[:2], strict=True) if tangent is not None]
        wanted = (tangents[0] is not None, tangents[1] is not None)
        one = torch.ones(p.shape[:-1], dtype=plain.result_dtype(p, q))
        found = [x for x in in_blocks(p, q, one, wanted, ctx.options) if x is not None]
        parts = [(gradient * tangent).sum(-1) for gradient, (_, tangent) in zip(found, along, strict=True)]
        return sum(parts[1:], parts[0]).to(one.dtype)


# As `is_grads_batched` makes them, and `torch.func`.
_IS_BATCH = (torch._C._functorch.is_legacy_batchedtensor, torch._C._functorch.is_batchedtensor)
