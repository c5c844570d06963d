"""Which of the ways to the divergence of each row is taken."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from klmetric.arithmetic import accelerator, native
from klmetric.arithmetic.device import device_of_float64
from klmetric.arithmetic.gradient import WithGradient
from klmetric.arithmetic.level import level
from klmetric.arithmetic.native import Measured, Totals
from klmetric.arithmetic.plain import plain, plain_in_blocks, result_dtype
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
    if not p.is_cpu and (host := device_of_float64(p.device)) != p.device:
        weight = None if weight is None else weight.to(host)
        measured = measure_rows(p.to(host), q.to(host), options, weight, agrees, totals, before)
        return measured._replace(kl=measured.kl.to(p.device, result_dtype(p, q)))
    if is_recorded():
        return Measured(_recorded(p, q, options), _agree(p, q) if agrees else None)
    if has_gradient(p, q):
        # Totals that came with the rows would be without their gradients.
        measured = _measured(p.detach(), q.detach(), options, agrees)
        kl = WithGradient.apply(p, q, measured.kl, options)  # type: ignore[no-untyped-call]
        return Measured(kl, measured.agrees)
    if _serves(p, q, options) and options.direction != "jensen_shannon":
        formats, direction, temperature = _asked(options)
        return native.measure(p, q, formats, direction, temperature, weight, agrees, totals, before)
    return _measured(p, q, options, agrees)


def _measured(p: Tensor, q: Tensor, options: "Options", agrees: bool) -> Measured:
    """The rows alone, without gradients."""
    if not p.is_cpu and (found := accelerator.measure_if_it_serves(p, q, options, agrees)) is not None:
        return Measured(*found)
    if _serves(p, q, options):
        return _by_kernel(p, q, *_asked(options), agrees=agrees)
    return Measured(plain_in_blocks(p, q, options), _agree(p, q) if agrees else None)


def _by_kernel(
    p: Tensor, q: Tensor, formats: tuple[str, str], direction: str, temperature: float, agrees: bool = False
) -> Measured:
    if direction != "jensen_shannon":
        return native.measure(p, q, formats, direction, temperature, agrees=agrees)
    numbers, same = native.statistics(p, q, formats, temperature, True)
    return Measured(numbers[native.JENSEN_SHANNON], same[..., 0] if agrees else None)


def _agree(p: Tensor, q: Tensor) -> Tensor:
    return p.argmax(-1) == q.argmax(-1)


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
    return plain(p, q, options)


# Known before anything is compiled, which could not find out.
HAS_KERNEL = level() is not None


@torch.library.custom_op("klmetric::kl_rows", mutates_args=())
def kl_by_kernel(p: Tensor, q: Tensor, p_format: str, q_format: str, direction: str, temperature: float) -> Tensor:
    """The kernel as one operation of a compiled graph."""
    return _by_kernel(p, q, (p_format, q_format), direction, temperature).kl


@kl_by_kernel.register_fake
def _(p: Tensor, *_: object) -> Tensor:
    return p.new_empty(p.shape[:-1], dtype=torch.float64)
