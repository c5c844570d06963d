"""Rows that several processes measure together, each looking at its classes of them (`klmetric.rows.shards`).

It takes two collectives, both an `all_gather`: of a few numbers that say whether all measure the same rows, and of what
each has found. Where a second look is needed (other divergences, a floor `eps`, what p and q give their targets) the
two go at once, and the second one is of what is found then.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from klmetric.arithmetic import sharded
from klmetric.arithmetic.gradient_of_shards import Refused, WithGradientOfShards
from klmetric.arithmetic.plain import result_dtype
from klmetric.arithmetic.sharded import Again, Masses, Whole
from klmetric.arithmetic.statistics import Statistics
from klmetric.arithmetic.tracing import has_gradient
from klmetric.options import Options
from klmetric.rows.exchange import exchange, gather
from klmetric.rows.fields import OF_CLASSES, OF_TARGETS, log_of_targets, values_of
from klmetric.rows.head import Head, as_logits, measure_in_blocks, stand_in
from klmetric.rows.rows import Rows
from klmetric.rows.shards import Shards
from klmetric.rows.targets import check_kind_of_targets, check_targets, check_targets_are_there
from klmetric.rows.tensors import check_tensors, weight_of_rows


class _Part(NamedTuple):
    """What a process looks at: its classes that count, the last axis; and how many these are."""

    p: Tensor | Head
    q: Tensor | Head
    weight: Tensor | None
    options: Options
    width: int


class _Asks(NamedTuple):
    """What takes a second look: other divergences, a floor `eps`, and what is given to the targets."""

    looks: bool
    has_floor: bool
    of_targets: bool


def _asks(options: Options, fields: tuple[str, ...]) -> _Asks:
    looks = options.direction == "jensen_shannon" or not OF_CLASSES.keys().isdisjoint(fields)
    return _Asks(looks, bool(options.eps), not OF_TARGETS.keys().isdisjoint(fields))


def measure_together(shards: Shards, options: Options, agrees: bool, fields: tuple[str, ...]) -> Rows:
    """Measure each row, together with the other processes of the group.

    Args:
        shards: what this process has.
        options: see `klmetric.kl_divergence`.
        agrees: whether to find out if the most likely class is the same.
        fields: what else to ask of each row, by the names of `klmetric.rows.fields`.
    """
    asks = _asks(options, fields)
    everywhere = shards, options, (asks, fields, shards.targets is None), any(asks)
    try:
        if shards.targets is None:
            check_targets_are_there(fields)
        part = _checked(shards, options)
        with torch.no_grad():
            found = _look(part, lambda a, b, _: sharded.look(a, b, part.options))
    except Exception:
        exchange(None, 0, sharded.LOOK, *everywhere)  # the others learn that it failed, and do not wait
        raise
    p, q, weight, its_options, _ = part
    like = _rows_of(p)
    with torch.no_grad():
        gathered, widths = exchange(found, part.width, sharded.LOOK, *everywhere)
        first = [sum(widths[:j]) for j in range(len(widths))]
        whole = sharded.together(gathered, first, its_options)
        targets = shards.targets
        if targets is not None:
            targets, weight = check_targets(targets, like.expand(*like.shape[:-1], sum(widths)), weight, options)
        kls, again, logs = _second_exchange(part, shards, whole, first, targets, asks)
        kl = torch.stack(kls).sum(0).view(like.shape[:-1])
        known = _statistics(whole, again, kl.flatten(), options.temperature)
        same = known.agree[:, 0].view(kl.shape)
        values = values_of(fields, known, logs).view(len(fields), *kl.shape) if fields else None
    kl = _with_gradient(kl, part, whole.masses, kls)
    return Rows(
        kl, weight, same if agrees else None, result_dtype(like, _rows_of(q)), fields=values, holders=shards.holders
    )


# ---- what this process has -------------------------------------------------------------------------------------------
def _checked(shards: Shards, options: Options) -> _Part:
    p, q = shards.p, shards.q
    for name, x in (("p", p), ("q", q)):
        if not isinstance(x, (Tensor, Head)):
            raise TypeError(
                f"`{name}` must be a torch.Tensor with `class_group`, or a Head: the classes of this process. Got"
                f" {type(x).__name__}."
            )
    if options.eps and options.direction == "jensen_shannon":
        raise ValueError(
            "`eps` must be 0 for the Jensen-Shannon divergence where the classes are on several processes. Got"
            f" {options.eps!r}. The floor depends on the whole row, and the mean of p and q on both: gather, or leave"
            " eps out."
        )
    counted, options = options.classes, replace(options, classes=None)
    if isinstance(p, Head) or isinstance(q, Head):
        p, q, options = as_logits(p, q, options)
    dim, shape = options.dim, tuple(p.shape)
    is_empty = shape == tuple(q.shape) and -len(shape) <= dim < len(shape) and not shape[dim]
    like_p, like_q = (_with_a_class(stand_in(x), dim) if is_empty else stand_in(x) for x in (p, q))
    check_tensors(like_p, like_q, dim)
    width = shape[dim]
    if counted is not None:
        width = min(max(counted - dist.get_rank(shards.group) * shards.width, 0), width)
    p, q = (_first_classes(x, width, dim) for x in (p, q))
    like = _rows_of(p)
    weight = None if shards.weight is None else weight_of_rows(shards.weight, like.shape[:-1], like.device)
    if shards.targets is not None:
        check_kind_of_targets(shards.targets, like)
    return _Part(p, q, weight, options, width)


def _with_a_class(x: Tensor, dim: int) -> Tensor:
    """Something of the same kind that has classes."""
    return x.new_empty([*x.shape[: dim % x.ndim], 1, *x.shape[dim % x.ndim + 1 :]])


def _first_classes(x: Tensor | Head, width: int, dim: int) -> Tensor | Head:
    if isinstance(x, Tensor):
        return x.movedim(dim, -1)[..., :width]
    return x.first(width) if width else stand_in(x)[..., :0]


def _rows_of(x: Tensor | Head) -> Tensor:
    """One number of each row, shape (..., 1), of the dtype and on the device of x."""
    return torch.empty((), dtype=x.dtype, device=x.device).expand(*x.shape[:-1], 1)


def _look(part: _Part, what: Callable[[Tensor, Tensor, Tensor | None], Tensor], beside: Tensor | None = None) -> Tensor:
    """What there is to say of each row, shape (numbers, rows); of logits that are not there yet, block by block."""
    if not (isinstance(part.p, Head) or isinstance(part.q, Head)):
        return what(part.p.detach(), part.q.detach(), beside)

    def of_block(p: Tensor, q: Tensor, beside: Tensor | None) -> Rows:
        found = what(p, q, beside)
        return Rows(found[0], None, fields=found)

    found = measure_in_blocks(part.p, part.q, part.weight, beside, of_block).fields
    assert found is not None
    return found.flatten(1)


def _second_exchange(
    part: _Part, shards: Shards, whole: Whole, first: list[int], targets: Tensor | None, asks: _Asks
) -> tuple[list[Tensor], Again | None, Tensor | None]:
    """The divergences that make up the direction, and what else was asked of the rows, and of their targets."""
    options = part.options
    if not any(asks):
        return whole.kls, None, None
    here = None if targets is None else targets.flatten() - first[dist.get_rank(shards.group)]
    columns = [*whole.masses] if here is None else [*whole.masses, here.double()]

    def what(p: Tensor, q: Tensor, beside: Tensor | None) -> Tensor:
        assert beside is not None
        columns = beside.view(-1, beside.shape[-1]).T
        masses, found = Masses(*columns[:4]), []
        if asks.looks:
            found.append(sharded.look_again(p, q, options, masses))
        if asks.has_floor:
            found.append(sharded.floored(p, q, options, masses))
        if asks.of_targets:
            found.append(_of_targets(p, q, columns[4].long().view(p.shape[:-1]), options))
        return torch.cat(found)

    beside = torch.stack(columns, -1).view(*_rows_of(part.p).shape[:-1], len(columns))
    gathered = gather(_look(part, what, beside), shards.group)
    sizes = [sharded.AGAIN * asks.looks, 2 * len(whole.kls) * asks.has_floor, 2 * asks.of_targets]
    of_looks, of_floors, of_targets = torch.split(gathered, sizes, 1)
    kls, again = whole.kls, None
    if asks.looks:
        again = sharded.together_again(of_looks, first, options, whole)
    if asks.has_floor:
        kls = sharded.floored_together(of_floors)
    elif options.direction == "jensen_shannon" and again is not None:
        kls = [again.jensen_shannon]
    return kls, again, sharded.added(of_targets) if asks.of_targets else None


def _of_targets(p: Tensor, q: Tensor, targets: Tensor, options: Options) -> Tensor:
    """The logarithms of what rows give their targets, shape (2, rows): 0 where these are classes of another process."""
    if not p.shape[-1]:
        return torch.zeros(2, targets.numel(), dtype=torch.float64, device=p.device)
    is_here = (targets >= 0) & (targets < p.shape[-1])
    inside = targets.clamp(0, p.shape[-1] - 1)
    sides = zip((p, q), options.input_format, strict=True)
    logs = [log_of_targets(x, form, inside, options.temperature) for x, form in sides]
    return torch.stack([torch.where(is_here, x, 0).flatten() for x in logs])


def _statistics(whole: Whole, again: Again | None, kl: Tensor, temperature: float) -> Statistics:
    """The same as of rows that one process has; what nobody asked for is NaN."""
    log_masses, unknown = whole.masses.logs(temperature), torch.full_like(kl, math.nan)
    if again is None:
        others, same = (unknown, unknown, unknown), (whole.leaders[0] == whole.leaders[1]).unsqueeze(-1)
    else:
        others, same = again[:3], (again.ranked[0] == again.ranked[1]).cumprod(-1).bool()
        same = same[:, [k - 1 for k in sharded.FIRST]]
    return Statistics(kl, *others, *log_masses, unknown, same & ~kl.isnan().unsqueeze(-1))


def _with_gradient(kl: Tensor, part: _Part, masses: Masses, kls: list[Tensor]) -> Tensor:
    """The divergences with their derivatives by the classes of this process."""
    p, q, options = part.p, part.q, part.options
    made_of = [x for side in (p, q) for x in (side.made_of if isinstance(side, Head) else [side])]
    if not has_gradient(*made_of):
        return kl
    refused = {
        "of a Head": isinstance(p, Head) or isinstance(q, Head),
        "in the direction 'jensen_shannon'": options.direction == "jensen_shannon",
        f"with eps={options.eps!r}": bool(options.eps),
        f"of probabilities at temperature={options.temperature!r}": options.temperature != 1
        and "probs" in options.input_format,
    }
    if reason := next((text for text, is_so in refused.items() if is_so), None):
        said = (
            "Where the classes are on several processes, there are gradients of logits and log-probabilities, and of"
            f" probabilities at temperature 1, without eps. Got backward() {reason}. Detach p and q, or gather the"
            " classes before."
        )
        return Refused.apply(kl, said, *made_of)  # type: ignore[no-untyped-call,no-any-return]
    return WithGradientOfShards.apply(kl, p, q, options, masses, kls)  # type: ignore[no-untyped-call,no-any-return]
