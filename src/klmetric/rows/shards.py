"""What one process has of rows that are on several: some of the classes, as tensor-parallel heads leave them.

`klmetric.rows.together` measures them.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from klmetric.options import Options
from klmetric.rows.tensors import is_sharded


@dataclass(frozen=True)
class Shards:
    """What this process has of a batch.

    Attributes:
        p: its classes of the reference, a tensor or a `Head`, if it is as it should be.
        q: its classes of the approximation.
        weight: of its rows, as it was given.
        targets: of its rows, as they were given.
        group: the processes that have the other classes, in the order of these; None where each has all.
        holders: the processes that have the same rows, by their global ranks. Each counts them, and a sync takes those
            of the first.
        width: how many classes a process has, all but the last.
    """

    p: Any
    q: Any
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
    """What this process has of p and q: both `DTensor`s, or both its classes alone, with a group of processes."""
    if is_sharded(p) or is_sharded(q):
        if group is not None:
            raise TypeError(
                "`class_group` is for tensors with the classes of this process. Got a DTensor, which knows where its"
                " classes are. Leave `class_group` out."
            )
        return _of_dtensors(p, q, weight, targets, options)
    holders = check_group(group)
    shape = next((tuple(x.shape) for x in (p, q) if hasattr(x, "shape")), ())
    width = shape[options.dim] if -len(shape) <= options.dim < len(shape) else 0  # else it is said later
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
    weight, targets = (local_part(name, x, p) for name, x in (("weight", weight), ("targets", targets)))
    return Shards(p.to_local(), q.to_local(), weight, targets, group, holders, width)


def local_part(name: str, x: Any, p: Any) -> Any:
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


def first_places(x: Any) -> Tensor:
    """Which places along its first axis a `DTensor` has on this process, on the CPU."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = x.device_mesh
    everywhere = DTensor.from_local(
        torch.arange(x.shape[0], device=mesh.device_type), mesh, [Replicate()] * mesh.ndim, run_check=False
    )
    # Each takes its own of what all have, so that nothing is sent.
    placements = [place if place.is_shard(0) else Replicate() for place in x.placements]
    return everywhere.redistribute(mesh, placements).to_local().cpu()
