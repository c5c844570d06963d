"""The one path from p, q and weight to the divergence of each row."""

import math
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributions import Distribution

from klmetric.arithmetic.choose import measure_rows
from klmetric.arithmetic.closed_forms import IN_PLACE_OF
from klmetric.arithmetic.device import device_of_float64
from klmetric.arithmetic.native import Totals
from klmetric.arithmetic.plain import result_dtype
from klmetric.arithmetic.tracing import may_look
from klmetric.options import Options
from klmetric.rows.at_most import at_most
from klmetric.rows.coarse import Coarse, coarse
from klmetric.rows.distributions import CATEGORICAL, kl_of_distributions, tensors_of
from klmetric.rows.fields import OF_TAILS, fields_of
from klmetric.rows.head import Head, as_logits, measure_in_blocks, stand_in
from klmetric.rows.invalid import check_rows
from klmetric.rows.rows import Rows
from klmetric.rows.targets import check_targets, check_targets_are_there
from klmetric.rows.tensors import check_tensors, first_classes, is_sharded, warn_of_one_class, weight_of_rows
from klmetric.rows.topk import TopK, check_with_topk

Input: TypeAlias = Tensor | Distribution | Head | TopK


def measure(
    p: Input,
    q: Input,
    weight: Tensor | None,
    options: Options,
    agrees: bool = False,
    totals: Totals | None = None,
    before: Tensor | None = None,
    targets: Tensor | None = None,
    fields: tuple[str, ...] = (),
    class_group: Any = None,
) -> Rows:
    """Check the inputs and measure each row.

    Args:
        p: reference.
        q: approximation.
        weight: of each row or sample.
        options: see `klmetric.kl_divergence`, as p, q and weight.
        agrees: whether to find out if the most likely class is the same.
        totals: those to make in the same pass, where that can be done.
        before: what to add them to, on the CPU.
        targets: the class that came true in each row, or `options.ignore_index` where the row does not count.
        fields: what else to ask of each row, by the names of `klmetric.rows.fields`.
        class_group: the processes that have the other classes.
    """
    if class_group is not None or (not type(p) is type(q) is Tensor and (is_sharded(p) or is_sharded(q))):
        # torch may be without torch.distributed
        from klmetric.rows.shards import taken_apart
        from klmetric.rows.together import measure_together

        shards = taken_apart(p, q, weight, targets, options, class_group)
        if shards.group is None:  # each process has all classes of its rows
            rows = measure(shards.p, shards.q, shards.weight, options, agrees, totals, before, shards.targets, fields)
            return rows._replace(holders=shards.holders)
        rows = measure_together(shards, options, agrees, fields)
        check_rows(rows, None, options)
        return rows
    if targets is None and fields:
        check_targets_are_there(fields)
    if isinstance(p, Head) or isinstance(q, Head):
        return _measure_heads(p, q, weight, options, agrees, targets, fields)
    if isinstance(p, TopK) or isinstance(q, TopK):
        return _measure_topk(p, q, weight, options, agrees, totals, before, targets, fields)
    is_of_tensors = isinstance(p, Tensor)
    if isinstance(p, Distribution) and isinstance(q, Distribution):
        if not (isinstance(p, CATEGORICAL) and isinstance(q, CATEGORICAL)):
            for name, asked in (("targets", targets is not None), ("measures", fields)):
                if asked:
                    raise ValueError(
                        f"`{name}` is for categorical distributions. Got {type(p).__name__} and {type(q).__name__}."
                    )
            kl = kl_of_distributions(p, q, options, IN_PLACE_OF)
            weight = None if weight is None else weight_of_rows(weight, kl.shape, kl.device)
            rows = Rows(kl, weight, dtype=kl.dtype)
            check_rows(rows, None, options)
            return rows
        p, q, options = tensors_of(p, q, options)
    elif isinstance(p, Distribution) or isinstance(q, Distribution):
        raise TypeError(
            "`p` and `q` must both be tensors or both be distributions."
            f" Got {type(p).__name__} and {type(q).__name__}. Wrap the tensor: Categorical(probs=...)."
        )
    dim = options.dim
    if options.classes is not None:
        p, q = first_classes("p", p, options), first_classes("q", q, options)
    check_tensors(p, q, dim)
    if p.shape[dim] == 1 and is_of_tensors and not torch.compiler.is_compiling():
        warn_of_one_class(p, dim)
    if dim not in (-1, p.ndim - 1):
        p, q = p.movedim(dim, -1), q.movedim(dim, -1)
    if weight is not None:
        weight = weight_of_rows(weight, p.shape[:-1], p.device)
    if targets is not None:
        targets, weight = check_targets(targets, p, weight, options)
    if fields:
        rows = _with_fields(fields, p.detach(), q.detach(), weight, targets, options)
    else:
        measured = measure_rows(p, q, options, weight, agrees, totals, before)
        rows = Rows(measured.kl, weight, measured.agrees, result_dtype(p, q), measured.totals)
    check_rows(rows, (p, q), options)
    return _without_gradient_of_left_out(rows, p, q, options)


def _measure_heads(
    p: Input,
    q: Input,
    weight: Tensor | None,
    options: Options,
    agrees: bool,
    targets: Tensor | None,
    fields: tuple[str, ...],
) -> Rows:
    """The same of logits that are made as they are measured, on one side at least."""
    first, second = (stand_in(x) if isinstance(x, TopK) else x for x in (p, q))
    a: Head | Tensor | TopK
    b: Head | Tensor | TopK
    a, b, its_options = as_logits(first, second, options)
    like, other = stand_in(a), stand_in(b)
    check_tensors(like, other, -1)
    if isinstance(p, TopK):
        check_with_topk(p, other, options)
        a = p
    elif isinstance(q, TopK):
        check_with_topk(like, q, options)
        b = q
    if weight is not None:
        weight = weight_of_rows(weight, like.shape[:-1], like.device)
    if targets is not None:
        targets, weight = check_targets(targets, like, weight, options)

    def of_block(p: Tensor | TopK, q: Tensor | TopK, targets: Tensor | None) -> Rows:
        if isinstance(p, TopK) or isinstance(q, TopK):
            return _of_topk(p, q, its_options, agrees, fields)[0]
        if fields:
            return _with_fields(fields, p.detach(), q.detach(), None, targets, its_options)
        measured = measure_rows(p, q, its_options, agrees=agrees)
        return Rows(measured.kl, None, measured.agrees, result_dtype(p, q))

    rows = measure_in_blocks(a, b, weight, targets, of_block)
    check_rows(rows, (a, b), its_options)
    if rows.kl.requires_grad and options.nan_strategy == "ignore" and bool((invalid := rows.kl.isnan()).any()):
        # A row that is left out sends no NaN back only if it was never there.
        counts = ~invalid if weight is None else weight.masked_fill(invalid, 0)
        again = measure_in_blocks(a, b, counts, targets, of_block)
        rows = rows._replace(kl=again.kl.masked_fill(invalid, math.nan))
    return rows


def _measure_topk(
    p: Input,
    q: Input,
    weight: Tensor | None,
    options: Options,
    agrees: bool,
    totals: Totals | None,
    before: Tensor | None,
    targets: Tensor | None,
    fields: tuple[str, ...],
) -> Rows:
    """The same where of p or q not all classes are known."""
    a, b = check_with_topk(p, q, options)
    if weight is not None:
        weight = weight_of_rows(weight, a.shape[:-1], a.device)
    if targets is not None:
        _, weight = check_targets(targets, a, weight, options)
    rows, pair = _of_topk(a, b, options, agrees, fields, weight, totals, before)
    check_rows(rows, (a, b), options)
    its_options = replace(options, input_format=pair.formats)
    return _without_gradient_of_left_out(rows, pair.p, pair.q, its_options)


def _of_topk(
    p: Tensor | TopK,
    q: Tensor | TopK,
    options: Options,
    agrees: bool,
    fields: tuple[str, ...],
    weight: Tensor | None = None,
    totals: Totals | None = None,
    before: Tensor | None = None,
) -> tuple[Rows, Coarse]:
    """Rows of the classes that both sides know, and one class more for the others."""
    if not {*fields} <= {*OF_TAILS}:
        raise ValueError(
            "`measures` and `perplexity` must have p and q in full. Got a TopK. Of that there are the divergence, and"
            " with bounds=True how large it may be."
        )
    device, host = p.device, device_of_float64(p.device)
    its_weight = weight
    if host != device:
        p, q, its_weight = p.to(host), q.to(host), None if weight is None else weight.to(host)
    pair = coarse(p, q, options.input_format, agrees)
    its_options = replace(options, input_format=pair.formats)
    # Of the pair the tail may be the most likely class.
    its_totals = None if agrees else totals
    measured = measure_rows(pair.p, pair.q, its_options, its_weight, totals=its_totals, before=before)
    values = None
    if fields:
        most = torch.full_like(measured.kl, math.inf)
        if isinstance(p, TopK) and isinstance(q, Tensor) and options.direction == "forward":
            most = at_most(p, q, pair, measured.kl)
        known = {"tail_mass": pair.tail, "at_most": most}
        values = torch.stack([known[name] for name in fields]).detach()
    dtype = result_dtype(*(x.values if isinstance(x, TopK) else x for x in (p, q)))
    kl = measured.kl if host == device else measured.kl.to(device, dtype)
    return Rows(kl, weight, pair.agrees, dtype, measured.totals, values), pair


def _with_fields(
    fields: tuple[str, ...], p: Tensor, q: Tensor, weight: Tensor | None, targets: Tensor | None, options: Options
) -> Rows:
    """Rows with what else is asked of them, without gradients."""
    # On the CPU the divergence comes with the rest.
    measured = None if p.is_cpu and options.direction == "forward" else measure_rows(p, q, options, agrees=True)
    known, values = fields_of(fields, p, q, None if measured is None else measured.kl, targets, options)
    kl, agrees = (known.kl, known.agree[..., 0]) if measured is None else measured[:2]
    return Rows(kl, weight, agrees, result_dtype(p, q), fields=values)


def _without_gradient_of_left_out(rows: Rows, p: Tensor, q: Tensor, options: Options) -> Rows:
    """Keep NaN and infinite gradients of rows that do not count from reaching p and q.

    A gradient of 0 that flows into such a row comes out as 0 times infinity. Only a row that was never there has none:
    measure again with two equal rows in its place.
    """
    ignores = options.nan_strategy == "ignore"
    if not rows.kl.requires_grad or (rows.weight is None and not ignores):
        return rows
    invalid = rows.kl.isnan()
    left_out = rows.left_out | invalid if ignores else rows.left_out
    if may_look(left_out) and not bool(left_out.any()):
        return rows
    mask = left_out.unsqueeze(-1)
    kl = measure_rows(p.masked_fill(mask, 1), q.masked_fill(mask, 1), options).kl
    return rows._replace(kl=kl.masked_fill(invalid & left_out, math.nan))
