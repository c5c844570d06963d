"""Several processes, each of which measures a share of the samples."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed

from klmetric.accumulate.sync import gather
from klmetric.command.comparison import Comparison, together
from klmetric.totals import sketch


@contextmanager
def processes_of_this_run() -> Iterator[tuple[int, int]]:
    """The rank and the number of processes: of the group that there is, or that torchrun asks for."""
    is_ours = not torch.distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if is_ours:
        torch.distributed.init_process_group("gloo")
    try:
        if torch.distributed.is_initialized():
            yield torch.distributed.get_rank(), torch.distributed.get_world_size()
        else:
            yield 0, 1
    finally:
        if is_ours:
            torch.distributed.destroy_process_group()


def merge_over_processes(result: Comparison, rank: int, processes: int, has_failed: bool) -> bool:
    """Bring together what all processes have measured, in one collective.

    Args:
        result: of this process; afterwards, of all.
        rank: of this process.
        processes: how many share the samples.
        has_failed: whether it could not measure its share.

    Returns:
        Whether none has failed.
    """
    summaries = [summary for measured in result.models for summary in measured.summaries]
    begin, end = result.task.share(rank, processes)
    for summary in summaries:
        # If it was interrupted: the samples of the next process are numbered by where they are.
        summary.totals = summary.totals.index_fill(0, torch.tensor(sketch.SEEN), end - begin)
    steps = [result.step, *(measured.step for measured in result.models)]
    head = torch.tensor([has_failed, result.samples, *steps], dtype=torch.float64)
    of_models = [part for measured in result.models for part in (measured.clipped, measured.moments)]
    sums = [*result.differences.values(), *of_models]
    states = [head, *(summary.totals for summary in summaries), *sums]
    gathered = torch.stack(gather(torch.cat(states)))
    head, *parts = torch.split(gathered, [len(state) for state in states], 1)
    result.samples = int(head[:, 1].sum())
    result.step, *steps = head[:, 2:].amax(0).tolist()
    for measured, step in zip(result.models, steps, strict=True):
        measured.step = step
    for summary, part in zip(summaries, parts[: len(summaries)], strict=True):
        summary.totals = summary._merging()(part)
        summary._update_count, summary._computed = 1, None
    merged = iter([together(*part) for part in parts[len(summaries) :]])
    result.differences = {pair: next(merged) for pair in result.differences}
    for measured in result.models:
        measured.clipped, measured.moments = next(merged), next(merged)
    return not bool(head[:, 0].any())
