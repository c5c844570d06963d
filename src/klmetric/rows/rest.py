"""What all classes but some have in sum, of rows that are there in full."""

from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor
from torch.autograd import forward_ad

from klmetric.arithmetic.plain import MOST, OF_A_THREAD, WIDTH, blocks
from klmetric.arithmetic.tracing import is_recorded


def sum_of_others(x: Tensor, index: Tensor, are_probs: bool) -> Tensor:
    """The sum over all classes but those, shape (...), in float64; the logarithm of that of exponentials.

    It is added up from its own terms: what 1 leaves of the classes that are known would have no digits beside a
    tail that is small. No copy is made but of blocks of rows.

    Args:
        x: probabilities, or logits, shape (..., classes).
        index: of the classes to leave out, shape (..., k); `classes` for none.
        are_probs: which of the two x is.
    """
    if is_recorded() or forward_ad._current_level >= 0:
        rest = x.double().masked_fill(_mask(x, index), 0 if are_probs else -torch.inf)
        return _checked(rest.sum(-1), x) if are_probs else rest.logsumexp(-1)
    value: Tensor = _Sum.apply(x, index, are_probs)  # type: ignore[no-untyped-call]
    return value


class _Sum(torch.autograd.Function):
    """The sum, and its gradient, block by block."""

    @staticmethod
    def forward(ctx, x, index, are_probs):  # type: ignore[no-untyped-def]
        peaks = torch.zeros_like(x[..., :1]) if are_probs else x.amax(-1, keepdim=True)
        found = [x.new_zeros(0, dtype=torch.float64)]
        for block, i, peak in blocks(_rows_at_once(x), x, index, peaks):
            # The order of the sum depends on the row alone.
            parts = [terms.sum(-1) for _, terms in _terms(block, i, peak, are_probs)]
            found.append(reduce(torch.add, parts))
        total = torch.cat(found).view(x.shape[:-1])
        value = _checked(total, x) if are_probs else total.log() + peaks.squeeze(-1)
        ctx.save_for_backward(x, index, value)
        ctx.are_probs = are_probs
        return value

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        x, index, value = ctx.saved_tensors
        value, gradient = value.unsqueeze(-1), gradient.unsqueeze(-1)
        if torch.is_grad_enabled():  # it is to be differentiated itself
            slopes = torch.ones_like(x) if ctx.are_probs else (x.double() - value).exp()
            slopes = torch.where(_mask(x, index) | (gradient == 0), 0, slopes * gradient)
            return slopes.to(x.dtype), None, None
        # The derivative of the logarithm is the share of each class; that of a sum is 1.
        slopes = torch.ones_like(x[..., :1]).expand_as(x) if ctx.are_probs else x
        result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for block, i, v, g, target in blocks(_rows_at_once(x), slopes, index, value, gradient, result):
            for start, terms in _terms(block, i, v, ctx.are_probs):
                # A row that does not count has the gradient 0, whatever is in it.
                target[:, start : start + WIDTH] = torch.where(g == 0, 0, terms * g)
        return result, None, None


def _mask(x: Tensor, index: Tensor) -> Tensor:
    """The classes to leave out, of the shape of x."""
    mask = torch.zeros(*x.shape[:-1], x.shape[-1] + 1, dtype=torch.bool, device=x.device)
    return mask.scatter(-1, index, True)[..., :-1]


def _rows_at_once(x: Tensor) -> int:
    size = min(MOST, OF_A_THREAD * torch.get_num_threads()) if x.is_cpu else MOST
    return max(1, size // min(WIDTH, x.shape[-1]))


def _terms(x: Tensor, index: Tensor, peak: Tensor, are_probs: bool) -> Iterator[tuple[int, Tensor]]:
    """What each class adds to the sum, part by part, each with its place: 0 for the classes that are left out."""
    for start in range(0, x.shape[-1], WIDTH):
        part = x[:, start : start + WIDTH]
        width = part.shape[-1]
        # One place more, for the classes that are elsewhere.
        terms = torch.empty(len(x), width + 1, dtype=torch.float64, device=x.device)
        of_part = terms[:, :width].copy_(part)
        if not are_probs:
            of_part.sub_(peak).exp_()
        within = index - start
        terms.scatter_(-1, torch.where((within >= 0) & (within < width), within, width), 0)
        yield start, of_part


def _checked(total: Tensor, x: Tensor) -> Tensor:
    """NaN where a probability is negative, which does not show in the sum."""
    return total.masked_fill(x.amin(-1) < 0, torch.nan)
