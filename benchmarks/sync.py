"""What does one `compute()` cost among several processes, and how many collectives and bytes are in it?"""

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from side_by_side import report, table

from klmetric.totals import vector

PROCESSES = (1, 2, 4, 8, 16)
COLLECTIVES = ("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "barrier", "broadcast")
MANY = (100, 1_000, 10_000)
CALLS = 20


def metrics() -> dict[str, Callable[[], object]]:
    """The `compute` of each contender, after one batch."""
    from ignite.metrics import KLDivergence as Ignites
    from torchmetrics.regression import KLDivergence as Theirs

    from klmetric import KLDivergence as Ours

    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(32, 10, generator=generator) for _ in range(2))
    ours, theirs, ignites = Ours(input_format="logits"), Theirs(log_prob=True), Ignites()
    ours.update(p, q)
    theirs.update(p.log_softmax(-1), q.log_softmax(-1))
    ignites.update((q, p))

    def anew(metric: Any) -> Callable[[], object]:
        def compute() -> object:
            metric._computed = None  # or it would only look up what it knows
            return metric.compute()

        return compute

    return {"klmetric": anew(ours), "torchmetrics": anew(theirs), "ignite": ignites.compute}


def counted(compute: Callable[[], object]) -> dict[str, int]:
    """The collectives of one call, and the bytes that they bring to this process."""
    counts = {"collectives": 0, "bytes": 0}
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts["collectives"] += 1
            brought = args[0] if args and isinstance(args[0], list) else args[:1]
            counts["bytes"] += sum(t.nbytes for t in brought if isinstance(t, torch.Tensor))
            return original(*args, **kwargs)

        return call

    for name, original in originals.items():
        setattr(dist, name, wrap(original))
    try:
        compute()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return counts


def work(rank: int, size: int, folder: str, rounds: int) -> None:
    """One process: all contenders in turns; the first process writes down what it saw."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(minutes=5))
    warnings.filterwarnings("ignore", message="Local rank information")  # ignite asks for more than it needs here
    contenders = metrics()
    for compute in contenders.values():
        compute()  # ignite finds out where it is
    counts = {name: counted(compute) for name, compute in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, compute in contenders.items():
            compute()
            dist.barrier()
            start = time.perf_counter()
            for _ in range(CALLS):
                compute()
            seconds[name].append((time.perf_counter() - start) / CALLS)
    if rank == 0:
        result = {name: {"seconds": statistics.median(seconds[name]), **counts[name]} for name in contenders}
        torch.save(result, Path(folder) / "result.pt")
    dist.barrier()
    dist.destroy_process_group()


def merging(size: int) -> float:
    """Seconds that a process takes to add up what so many have sent it."""
    parts = (
        torch.cat([vector.of_rows(torch.rand(100), None) for _ in range(100)]).reshape(100, -1).repeat(size // 100, 1)
    )
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        vector.merge(parts)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    """Start every number of processes; `--quick` takes fewer rounds."""
    rounds = 5 if "--quick" in sys.argv else 15
    figures, lines = [], []
    for size in PROCESSES:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(work, (size, folder, rounds), nprocs=size)
            result = torch.load(Path(folder) / "result.pt")
        figures.append({"processes": size, **result})
        ours = result["klmetric"]
        cells = [str(size), f"{1e3 * ours['seconds']:.2f}", str(ours["collectives"]), f"{ours['bytes']:,}"]
        for name in ("torchmetrics", "ignite"):
            theirs = result[name]
            times = f"{theirs['seconds'] / ours['seconds']:.1f}"
            cells += [times, str(theirs["collectives"]), f"{theirs['bytes']:,}"]
        lines.append(cells)
        print(*cells, file=sys.stderr)
    header = ["processes", "klmetric (ms)", "collectives", "bytes"]
    for name in ("torchmetrics", "ignite"):
        header += [f"{name}, times slower", "collectives", "bytes"]
    explained = (
        "One `compute()` of a mean over gloo processes on one machine, by the clock of the first process; the bytes are"
        " those that the collectives bring to one process. With more processes than cores they wait for one another's"
        " turn on a core."
    )
    merges = {size: merging(size) for size in MANY}
    second = table(
        ["processes", "adding up (ms)", "bytes"],
        [[f"{size:,}", f"{1e3 * seconds:.1f}", f"{size * vector.SIZE * 8:,}"] for size, seconds in merges.items()],
    )
    text = f"{explained}\n\n{table(header, lines)}\n\nWhat klmetric does with the totals of more processes:\n\n{second}"
    report("Sync", text, {"compute": figures, "adding up": merges})


if __name__ == "__main__":
    main()
