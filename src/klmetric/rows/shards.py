"""Rows of whose classes each process has some, as the heads of tensor-parallel models leave them.

Two collectives measure them: an `all_gather` of what each process finds in its classes, and one of what these add.
"""

import math
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from klmetric.arithmetic import sharded
from klmetric.arithmetic.plain import result_dtype
from klmetric.arithmetic.tracing import has_gradient
from klmetric.options import Options
from klmetric.rows.fields import FIRST, OF_CLASSES, log_of_targets, values_of
from klmetric.rows.rows import Rows
from klmetric.rows.targets import check_targets
from klmetric.rows.tensors import check_tensors, is_sharded, weight_of_rows


@dataclass(frozen=True)
class Shards:
    """What this process has of a batch.

    Attributes:
        p: its part of the reference, the classes last.
        q: its part of the approximation.
        weight: of its rows, as it was given.
        targets: of its rows, as they were given.
        group: the processes that have the other classes, in the order of these; None where each has all.
        holders: the processes that have the same rows, by their global ranks. Each counts them, and a sync takes those
            of the first.
        width: how many classes a process has, all but the last.
    """

    p: Tensor
    q: Tensor
    weight: Tensor | None
    targets: Tensor | None
    group: Any
    holders: tuple[int, ...]
    width: int


def check_group(group: Any) -> tuple[int, ...]:
    """Check `class_group`, and return the global ranks of its processes."""
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "`class_group` must be a torch.distributed.ProcessGroup that this process is in, or None. Got"
            f" {type(group).__name__}. Of a device mesh, give mesh.get_group('tp')."
        )
    return tuple(dist.get_process_group_ranks(group))


def taken_apart(p: Any, q: Any, weight: Tensor | None, targets: Tensor | None, options: Options, group: Any) -> Shards:
    """What this process has of p and q, both `DTensor`s, or both its classes alone with a group of processes."""
    if is_sharded(p) or is_sharded(q):
        if group is not None:
            raise TypeError(
                "`class_group` is for tensors with the classes of this process. Got a DTensor, which knows where its"
                " classes are. Leave `class_group` out."
            )
        return _of_dtensors(p, q, weight, targets, options)
    for name, x in (("p", p), ("q", q)):
        if not isinstance(x, Tensor):
            raise TypeError(
                f"`{name}` must be a torch.Tensor with `class_group`: the classes of this process. Got"
                f" {type(x).__name__}."
            )
    holders = check_group(group)
    width = p.shape[options.dim] if -p.ndim <= options.dim < p.ndim else 0  # else it is said later
    return Shards(p, q, weight, targets, group, holders, width)


def _of_dtensors(p: Any, q: Any, weight: Tensor | None, targets: Tensor | None, options: Options) -> Shards:
    for name, x in (("p", p), ("q", q)):
        if not is_sharded(x):
            raise TypeError(
                f"`p` and `q` must both be DTensors, or neither. Got {type(x).__name__} as `{name}`. Make it one with"
                " torch.distributed.tensor.DTensor.from_local, or give local tensors with `class_group`."
            )
    if p.device_mesh != q.device_mesh or tuple(p.placements) != tuple(q.placements) or p.shape != q.shape:
        raise ValueError(
            "`p` and `q` must be sharded alike, and have one shape. Got"
            f" {tuple(p.shape)}, {p.placements} and {tuple(q.shape)}, {q.placements}. Use q.redistribute(p.device_mesh,"
            " p.placements)."
        )
    axis, mesh, place = options.dim % max(p.ndim, 1), p.device_mesh, p.device_mesh.get_coordinate()
    of_classes = [i for i, x in enumerate(p.placements) if x.is_shard(axis)]
    if len(of_classes) > 1 or any(x.is_partial() for x in p.placements) or place is None:
        raise ValueError(
            "A DTensor must be in the mesh of this process, its classes sharded along one axis of the mesh at most, and"
            f" nowhere partial. Got placements {p.placements}. Use redistribute first."
        )
    # Along the other axes each process has its own rows.
    here = tuple(slice(None) if x.is_replicate() or i in of_classes else place[i] for i, x in enumerate(p.placements))
    holders = tuple(mesh.mesh[here].flatten().tolist())
    group = mesh.get_group(of_classes[0]) if of_classes else None
    width = -(-p.shape[axis] // mesh.size(of_classes[0])) if of_classes else p.shape[axis]
    weight, targets = (_local(name, x, p) for name, x in (("weight", weight), ("targets", targets)))
    return Shards(p.to_local(), q.to_local(), weight, targets, group, holders, width)


def _local(name: str, x: Any, p: Any) -> Any:
    """The part of the weights, or targets, that are of the rows of this process."""
    if not is_sharded(x):
        return x
    for i, (mine, rows) in enumerate(zip(x.placements, p.placements, strict=False)):
        wanted = rows.dim if rows.is_shard() and rows.dim < x.ndim else None
        if x.device_mesh != p.device_mesh or (mine.dim if mine.is_shard() else None) != wanted or mine.is_partial():
            raise ValueError(
                f"`{name}` must be sharded along the rows as `p` is. Got {x.placements} and p {p.placements}, which"
                f" part along axis {i} of the mesh. Use redistribute, or give the local rows as a tensor."
            )
    return x.to_local()


def measure_shards(shards: Shards, options: Options, agrees: bool, fields: tuple[str, ...]) -> Rows:
    """Measure each row, together with the other processes of the group.

    Args:
        shards: what this process has.
        options: see `klmetric.kl_divergence`.
        agrees: whether to find out if the most likely class is the same.
        fields: what else to ask of each row, by the names of `klmetric.rows.fields`.
    """
    has_measures = not OF_CLASSES.keys().isdisjoint(fields)
    ks = FIRST if has_measures else FIRST[:1]
    try:
        p, q, weight, width = _checked(shards, options)
    except (TypeError, ValueError):
        _gather_first(None, shards, 0, ks[-1], options)  # the others learn that it failed, and do not wait
        raise
    batch, targets = p.shape[:-1], shards.targets
    with torch.no_grad():
        found, widths = _gather_first(sharded.look(p, q, options, ks[-1]), shards, width, ks[-1], options)
        first = [sum(widths[:j]) for j in range(len(widths))]
        whole = sharded.look_together(found, first, options)
        names = sharded.names_for(options.direction, has_measures)
        parts = [sharded.terms(p, q, options, whole, names)]
        if targets is not None:
            like = p[..., :1].expand(*batch, sum(widths))
            targets, weight = check_targets(targets, like, weight, options)
            parts.append(_of_targets(p, q, targets - first[dist.get_rank(shards.group)], width, options))
        sums = _gather(torch.cat(parts), shards.group)
        by_name = sharded.terms_together(sums[:, : len(names)], names)
        kl = sharded.divergence(by_name, options.direction)
        known = sharded.statistics_of(by_name, whole, kl, options.temperature, ks)
        logs = sums[:, len(names) :].sum(0) if targets is not None else None
        values = values_of(fields, known, logs).view(len(fields), *batch) if fields else None
        kl, same = kl.view(batch), known.agree[:, 0].view(batch)
    if has_gradient(shards.p, shards.q):
        kl = _WithoutGradient.apply(kl, shards.p, shards.q)  # type: ignore[no-untyped-call]
    return Rows(kl, weight, same if agrees else None, result_dtype(p, q), fields=values, holders=shards.holders)


def _checked(shards: Shards, options: Options) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """The classes of this process that count, last, one at least; the weights of the rows; how many classes count."""
    if options.eps:
        raise ValueError(
            f"`eps` must be 0 where the classes are on several processes. Got {options.eps!r}. The floor depends on the"
            " whole row: gather it, or leave eps out."
        )
    p, q, dim = shards.p, shards.q, options.dim
    width = p.shape[dim] if p.shape == q.shape and -p.ndim <= dim < p.ndim else -1
    if width and options.classes is not None:
        width = min(max(options.classes - dist.get_rank(shards.group) * shards.width, 0), width)
    if not width:
        p, q = (_nothing(x, form, dim) for x, form in zip((p, q), options.input_format, strict=True))
    check_tensors(p, q, dim)
    p, q = (x.detach().movedim(dim, -1)[..., : max(width, 1)] for x in (p, q))
    weight = None if shards.weight is None else weight_of_rows(shards.weight, p.shape[:-1], p.device)
    return p, q, weight, width


def _nothing(x: Tensor, input_format: str, dim: int) -> Tensor:
    """One class without any probability, where there is none that counts."""
    return x.new_full(
        (*x.shape[: dim % x.ndim], 1, *x.shape[dim % x.ndim + 1 :]), 0 if input_format == "probs" else -math.inf
    )


def _of_targets(p: Tensor, q: Tensor, targets: Tensor, width: int, options: Options) -> Tensor:
    """The logarithms of what rows give their targets, shape (2, rows): 0 where these are classes of another process."""
    is_here = (targets >= 0) & (targets < width)
    inside = targets.clamp(0, max(width - 1, 0))
    sides = zip((p, q), options.input_format, strict=True)
    logs = [log_of_targets(x, form, inside, options.temperature) for x, form in sides]
    return torch.stack([torch.where(is_here, x, 0).reshape(-1) for x in logs])


def _gather(x: Tensor, group: Any) -> Tensor:
    """One tensor of every process, in their order, in one collective."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group)
    return torch.stack(parts)


def _gather_first(
    found: Tensor | None, shards: Shards, width: int, k: int, options: Options
) -> tuple[Tensor, list[int]]:
    """What all have found, shape (shards, fields, rows), and how many classes each has; raises where one could not.

    Before it stands what has to be the same everywhere, so that a process with other rows is found out. For that to
    arrive, there is room for as many rows as the next power of two.
    """
    dim = options.dim % max(shards.p.ndim, 1)
    shape = [size for axis, size in enumerate(shards.p.shape) if axis != dim]
    rows = math.prod(shape)
    room = torch.zeros(2 * (1 + 2 * k), 1 << max(rows - 1, 0).bit_length(), dtype=torch.float64, device=shards.p.device)
    if found is not None:
        room[:, :rows] = found
    about = repr((shape, options, options.classes, options.ignore_index, shards.targets is None))
    marks = torch.tensor([crc32(about.encode()), found is not None, width, shards.width], dtype=torch.float64)
    gathered = _gather(torch.cat([marks.to(room), room.flatten()]), shards.group)
    columns = gathered[:, : len(marks)].long().T.tolist()
    if found is None:
        return gathered, []
    same, done, widths, steps = columns
    failed = [rank for rank, is_done in enumerate(done) if not is_done]
    if failed:
        raise ValueError(
            "All processes of `class_group` must measure their classes. Got an error on the ranks"
            f" {failed} of the group: see what was raised there."
        )
    others = [rank for rank, mark in enumerate(same) if mark != same[0]]
    if others:
        raise ValueError(
            "All processes of `class_group` must have the same rows, and measure with the same options. Got others on"
            f" the ranks {others} of the group than on its rank 0. This one has batch shape {tuple(shape)}."
        )
    if options.classes is not None and (len(set(steps)) > 1 or sum(widths) < options.classes):
        raise ValueError(
            "`classes` must be no more than there are, and with `class_group` every process must have as many classes."
            f" Got classes={options.classes} and {steps} classes. Give a DTensor, or leave the padding out of the last."
        )
    return gathered[:, len(marks) :].view(len(widths), *room.shape)[..., :rows], widths


class _WithoutGradient(torch.autograd.Function):
    """What says that there is none, when it is asked for."""

    @staticmethod
    def forward(ctx: Any, kl: Tensor, p: Tensor, q: Tensor) -> Tensor:
        """The divergences as they are."""
        return kl.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        """Raise."""
        raise RuntimeError(
            "There is no gradient of a divergence whose classes are on several processes. Got backward(). Detach p and"
            " q, or gather the classes before."
        )
