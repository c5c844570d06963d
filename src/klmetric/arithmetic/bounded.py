"""The plain expression on the CPU, without gradients: in float64 and in constant memory, the same bits in any batch.

It serves where the kernel does not: with a floor (`eps`), and in installs without it.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from klmetric.arithmetic import plain
from klmetric.arithmetic.matrices import matrices_of

if TYPE_CHECKING:
    from klmetric.options import Format, Options

# Elements that are taken at once: below the size at which torch splits one sum over several threads, in which case the
# result would depend on whether there are other rows to split. Wider rows are merged from parts of so many classes.
BLOCK = 2**14


def kl_rows(p: Tensor, q: Tensor, options: "Options") -> Tensor:
    """KL divergence of each row in float64; see `klmetric.arithmetic.choose.measure_rows`."""
    out = torch.empty(p.shape[:-1], dtype=torch.float64, device=p.device)
    of_block = _kl_of_rows if p.shape[-1] <= BLOCK else _kl_of_wide_row
    size = max(1, BLOCK // p.shape[-1])
    for a, b, target in matrices_of(p, q, out):
        for start in range(0, len(a), size):
            block = slice(start, start + size)
            target[block] = of_block(a[block], b[block], options)
    return out


def _kl_of_rows(a: Tensor, b: Tensor, options: "Options") -> Tensor:
    # The order of a sum depends on how the rows lie in memory.
    return plain.plain(a.double().contiguous(), b.double().contiguous(), options)


class _Parts:
    """One side of a wide row, in parts of its classes."""

    def __init__(self, x: Tensor, input_format: "Format", options: "Options") -> None:
        self.x, self.input_format, self.options = x, input_format, options
        self.peak = x.amax(-1, keepdim=True).double()

    def __iter__(self) -> Iterator[Tensor]:
        as_they_stand = plain.as_they_stand(self.options) and self.input_format != "probs"
        # Beside a constant in all logits the masses of the parts would have no digits.
        shift = torch.where(self.peak.isfinite(), self.peak, 0) if as_they_stand else 0
        for part in torch.split(self.x, BLOCK, -1):
            part = plain.prepare(part.contiguous(), self.input_format, self.options, torch.float64, self.peak)
            yield part - shift


def _kl_of_wide_row(a: Tensor, b: Tensor, options: "Options") -> Tensor:
    """The divergence of one row, merged from parts of its classes."""
    as_logits = plain.are_logits(options)
    p, q = (_Parts(x, f, options) for x, f in zip((a, b), options.input_format, strict=True))
    if any(bool(plain.invalid(x, y, as_logits)) for x, y in zip(p, q, strict=True)):
        return torch.full((1,), math.nan)  # a bad part of no weight would not show
    first, *second = (
        _merged(*((q, p) if swapped else (p, q)), options) for swapped in plain.SWAPPED[options.direction]
    )
    return sum(second, first)


def _merged(p: _Parts, q: _Parts, options: "Options", mass: Tensor | None = None) -> Tensor:
    """KL(p‖q) of one row. With the logarithm of the whole `mass` of p, classes without any of it are left out."""
    as_logits = plain.are_logits(options)
    floor = plain.floor_of(q, options) if options.eps else None
    blocks = []
    for x, y in zip(p, q, strict=True):
        if floor is not None:
            y = plain.floored(y, floor)
        if mass is not None:
            nothing = (x if as_logits else x.log()) <= mass.unsqueeze(-1) + plain.NOTHING
            x = x.masked_fill(nothing, -math.inf if as_logits else 0)
        masses = [plain.log_mass(z, as_logits).squeeze(-1) for z in (x, y)]
        blocks.append((*masses, plain.kl(x, y, as_logits)))
    log_p, log_q, within = (torch.stack(xs, -1) for xs in zip(*blocks, strict=True))
    mass_of_all, _, kl = plain.merge_classes(log_p, log_q, within)
    if mass is None and bool(kl == math.inf):
        return _merged(p, q, options, mass_of_all)  # it may be so only within a part of no account
    return kl
