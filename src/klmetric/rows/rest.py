"""Rows that are there in full, in two parts: some classes one by one, and what all the others have in sum."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from klmetric.arithmetic.plain import MOST, WIDTH, blocks
from klmetric.arithmetic.tracing import is_batched, is_recorded

# Between these a sum of exponentials has all its digits: none of them has overflown, nor one that counts vanished.
LEAST, GREATEST = 1e-200, 1e200


class Apart(NamedTuple):
    """Rows in two parts, in float64.

    Attributes:
        values: of the chosen classes, shape (..., k); anything where there is none.
        others: the sum over all other classes, shape (...); the logarithm of that of exponentials.
        largest: of the others, shape (...), without a gradient; None where it did not come with the sum.
    """

    values: Tensor
    others: Tensor
    largest: Tensor | None


def taken_apart(x: Tensor, index: Tensor, are_probs: bool, largest: bool = False) -> Apart:
    """Take rows apart. No copy is made but of blocks of rows, and both parts have one gradient, not one each.

    The sum is added up from its own terms: what 1 leaves of the classes that are known would have no digits beside a
    tail that is small.

    Args:
        x: probabilities, or logits, shape (..., classes).
        index: the chosen classes, shape (..., k); `classes` for none.
        are_probs: which of the two x is.
        largest: whether to find the largest of the others.
    """
    if is_recorded() or forward_ad._current_level >= 0 or not x.numel():
        values = x.gather(-1, index.clamp_max(x.shape[-1] - 1)).double()
        rest = x.double().masked_fill(_mask(x, index), 0 if are_probs else -math.inf)
        return Apart(values, _checked(rest.sum(-1), x) if are_probs else rest.logsumexp(-1), None)
    return Apart(*_Apart.apply(x, index, are_probs, largest))  # type: ignore[no-untyped-call]


class _Apart(torch.autograd.Function):
    """Both parts, and the gradient of both, block by block."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, are_probs: bool, largest: bool) -> tuple[Tensor | None, ...]:
        values = x.gather(-1, index.clamp_max(x.shape[-1] - 1)).double()
        # Many small results would lie between the blocks in memory, and let none of it be used again.
        others = torch.empty(x.shape[:-1], dtype=torch.float64, device=x.device)
        most = torch.empty_like(others) if largest and x.is_cpu else None
        rows, classes = _rows_at_once(x), x.shape[-1]
        # One place at least is left over, for the classes that are none.
        parts = classes // WIDTH + 1
        terms = torch.empty(
            min(rows, others.numel()), parts, classes // parts + 1, dtype=torch.float64, device=x.device
        )
        for block, i, target, *of_most in blocks(rows, x, index, others, *([] if most is None else [most])):
            target.copy_(_sums(block, i, are_probs, terms[: len(block)], *of_most))
        ctx.save_for_backward(x, index, others)
        ctx.are_probs = are_probs
        if most is not None:
            ctx.mark_non_differentiable(most)
        return values, others, most

    @staticmethod
    def backward(ctx: Any, of_values: Tensor, of_others: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        x, index, others = ctx.saved_tensors
        # The derivative of the logarithm is the share of each class, and there are none in an empty tail.
        others = torch.where(others > -math.inf, others, 0).unsqueeze(-1)
        of_others = of_others.unsqueeze(-1)
        # A row that does not count has the gradient 0, whatever is in it.
        has_none = of_others == 0
        # In the place of a class that is none stands one that is left out as well.
        index = torch.where(index < x.shape[-1], index, index[..., :1]).clamp_max(x.shape[-1] - 1)
        if torch.is_grad_enabled() or any(map(is_batched, (of_values, of_others))):
            shares = torch.ones_like(x) if ctx.are_probs else (x.double() - others).exp()
            whole = torch.where(_mask(x, index) | has_none, 0, shares * of_others)
            return whole.scatter_add(-1, index, of_values).to(x.dtype), None, None, None
        dtype = torch.promote_types(x.dtype, torch.float32)
        rounded = others.to(dtype)
        factor = (of_others if ctx.are_probs else of_others * (rounded.double() - others).exp()).to(dtype)
        result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for target, block, i, *numbers in blocks(
            _rows_at_once(x), result, x, index, rounded, factor, has_none, of_values
        ):
            v, g, is_none, of_chosen = numbers
            slopes = target if target.dtype is dtype else torch.empty(block.shape, dtype=dtype, device=x.device)
            if ctx.are_probs:
                slopes.copy_(g.expand_as(slopes))
            else:
                torch.sub(block, v, out=slopes).exp_().mul_(g).masked_fill_(is_none, 0)
            slopes.scatter_(-1, i, 0).scatter_add_(-1, i, of_chosen.to(dtype))
            if slopes is not target:
                target.copy_(slopes)
        return result, None, None, None


def _sums(x: Tensor, index: Tensor, are_probs: bool, memory: Tensor, largest: Tensor | None = None) -> Tensor:
    """Of a block, made in memory of shape (rows, parts, width), with a place at least beyond the classes."""
    classes, terms, nothing = x.shape[-1], memory.view(len(x), -1), 0.0 if are_probs else -math.inf

    def put() -> Tensor:
        terms[:, :classes].copy_(x)
        terms[:, classes:] = nothing
        return terms.scatter_(-1, index, nothing)

    def total() -> Tensor:
        # In an order that depends on the row alone: a part is so short that torch does not split its sum over threads.
        return memory.sum(-1).sum(-1)

    put()
    if largest is not None:
        torch.amax(terms, -1, out=largest)
    if are_probs:
        return _checked(total(), terms)
    value = is_whole = None
    if x.is_cpu:  # elsewhere it would have to be waited for
        terms.exp_()
        value = total()
        is_whole = (value > LEAST) & (value < GREATEST)
        if is_whole.all():
            return value.log()
        put()
    peak = terms.amax(-1, keepdim=True)
    peak = torch.where(peak > -math.inf, peak, 0)
    terms.sub_(peak).exp_()
    apart = total().log() + peak.squeeze(-1)
    return apart if value is None or is_whole is None else torch.where(is_whole, value.log(), apart)


def _mask(x: Tensor, index: Tensor) -> Tensor:
    """The classes to leave out, of the shape of x."""
    mask = torch.zeros(*x.shape[:-1], x.shape[-1] + 1, dtype=torch.bool, device=x.device)
    return mask.scatter(-1, index, True)[..., :-1]


def _rows_at_once(x: Tensor) -> int:
    return max(1, MOST // x.shape[-1])


def _checked(total: Tensor, x: Tensor) -> Tensor:
    """NaN where a probability is negative, which does not show in the sum."""
    return total.masked_fill(x.amin(-1) < 0, math.nan)
