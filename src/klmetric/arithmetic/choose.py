"""Which of the ways to the divergence of each row is taken."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from klmetric.arithmetic import accelerator, bounded, native, plain
from klmetric.arithmetic.gradient import in_blocks
from klmetric.arithmetic.level import level
from klmetric.arithmetic.native import Measured, Totals
from klmetric.arithmetic.tracing import has_gradient, is_recorded

if TYPE_CHECKING:
    from klmetric.options import Options


def measure_rows(
    p: Tensor,
    q: Tensor,
    options: "Options",
    weight: Tensor | None = None,
    agrees: bool = False,
    totals: Totals | None = None,
    before: Tensor | None = None,
) -> Measured:
    """Measure each row, in the direction and at the temperature of `options`.

    Args:
        p: reference, shape (..., classes), in the first of `options.input_format`.
        q: approximation, of the shape of `p`, in the second format.
        options: see `klmetric.kl_divergence`.
        weight: of each row, for the totals that may come with them; None for 1.
        agrees: whether to compare the most likely classes.
        totals: those to make in the same pass, where there is a kernel.
        before: what to add them to, on the CPU.
    """
    if not p.is_cpu and not is_recorded() and not has_gradient(p, q):
        found = accelerator.measure_if_it_serves(p, q, options, agrees)
        if found is not None:
            return Measured(*found)
    if not p.is_cpu or is_recorded():
        kl = _recorded(p, q, options)
    elif has_gradient(p, q):
        kl = KLOfRows.apply(p, q, options)  # type: ignore[no-untyped-call]
    elif _serves(p, q, options):
        return native.measure(p, q, *_asked(options), weight=weight, agrees=agrees, totals=totals, before=before)
    else:
        kl = bounded.kl_rows(p, q, options)
    return Measured(kl, p.argmax(-1) == q.argmax(-1) if agrees else None)


def _serves(p: Tensor, q: Tensor, options: "Options") -> bool:
    """Whether the kernel does."""
    return not options.eps and native.serves(p, q)


def _asked(options: "Options") -> tuple[tuple[str, str], str, float]:
    """What the kernel is asked for."""
    return options.input_format, options.direction, options.temperature


def _recorded(p: Tensor, q: Tensor, options: "Options") -> Tensor:
    """One operation, the kernel's, or one expression, for a compiler to fuse and for `torch.func` to take apart."""
    is_compiled = torch.compiler.is_compiling() and p.device.type == "cpu"
    if is_compiled and HAS_KERNEL and not options.eps and not has_gradient(p, q):
        kl: Tensor = kl_by_kernel(p, q, *options.input_format, options.direction, options.temperature)
        return kl
    if p.device.type == "cpu":  # float32 has no digits for near-equal logits that a constant keeps apart
        p, q = p.double(), q.double()
    return plain.plain(p, q, options)


# Known before anything is compiled, which could not find out.
HAS_KERNEL = level() is not None


@torch.library.custom_op("klmetric::kl_rows", mutates_args=())
def kl_by_kernel(p: Tensor, q: Tensor, p_format: str, q_format: str, direction: str, temperature: float) -> Tensor:
    """The kernel as one operation of a compiled graph."""
    return native.measure(p, q, (p_format, q_format), direction, temperature).kl


@kl_by_kernel.register_fake
def _(p: Tensor, *_: object) -> Tensor:
    return p.new_empty(p.shape[:-1], dtype=torch.float64)


class KLOfRows(torch.autograd.Function):
    """The divergence of each row on the CPU, with derivatives. Saved for them are p and q alone."""

    @staticmethod
    def forward(p: Tensor, q: Tensor, options: "Options") -> Tensor:
        """KL of each row."""
        if _serves(p, q, options):
            return native.measure(p, q, *_asked(options)).kl
        return bounded.kl_rows(p, q, options)

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
            results = iter(torch.autograd.grad(kl, chosen, gradients[0].to(kl.dtype), create_graph=True))
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
        return sum(parts[1:], parts[0]).double()


# As `is_grads_batched` makes them, and `torch.func`.
_IS_BATCH = (torch._C._functorch.is_legacy_batchedtensor, torch._C._functorch.is_batchedtensor)
