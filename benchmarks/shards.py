"""What do rows cost whose classes are on several processes, beside gathering the classes first?

Both on the same processes, in turns; and how far the values are from those of whole rows on one process.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from memory import peak
from side_by_side import report, table
from torch import Tensor

from klmetric import kl_divergence

ROWS, CLASSES, ROUNDS = 1024, 32_000, 15
PROCESSES = (1, 2, 3, 4)


def rows(count: int) -> list[Tensor]:
    """Logits of two models, near to each other in the first half of the rows."""
    generator = torch.Generator().manual_seed(0)
    p, noise = (torch.randn(count, CLASSES, generator=generator) for _ in range(2))
    noise[: count // 2] *= 1e-4
    return [p, p + noise]


def shares(count: int, rank: int, size: int) -> list[Tensor]:
    """The classes of this process."""
    return [x.tensor_split(size, -1)[rank].contiguous() for x in rows(count)]


def together(p: Tensor, q: Tensor) -> Tensor:
    """Measured where they are."""
    return kl_divergence(p, q, input_format="logits", reduction="none", class_group=dist.group.WORLD)


def gathered(p: Tensor, q: Tensor) -> Tensor:
    """Brought together first, padded, as `all_gather` takes equal shapes."""
    whole = []
    for x in (p, q):
        widest = -(-CLASSES // dist.get_world_size())
        parts = [x.new_empty(len(x), widest) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, torch.nn.functional.pad(x, (0, widest - x.shape[-1]), value=-torch.inf))
        whole.append(torch.cat(parts, -1))
    return kl_divergence(*whole, input_format="logits", reduction="none")


def seconds(call: Callable[[Tensor, Tensor], Tensor], sides: list[Tensor]) -> float:
    """Of one call, from when all begin."""
    dist.barrier()
    start = time.perf_counter()
    call(*sides)
    return time.perf_counter() - start


def run(rank: int, size: int, count: int, rounds: int, folder: str) -> None:
    """One process: save what it found."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store{size}", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(minutes=10))
    sides = shares(count, rank, size)
    values, found = together(*sides), {}
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak()
    together(*sides)
    found["mib"] = (peak() - before) / 1024
    gathered(*sides)
    times = [[seconds(call, sides) for call in (together, gathered)] for _ in range(rounds)]
    if rank == 0:
        torch.save({**found, "values": values, "times": times}, f"{folder}/{size}")
    dist.destroy_process_group()


def main() -> None:
    """Print a line for each number of processes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a quarter of the rows, and fewer turns")
    is_quick = parser.parse_args().quick
    count, rounds = (ROWS // 4, ROUNDS // 3) if is_quick else (ROWS, ROUNDS)
    expected = kl_divergence(*rows(count), input_format="logits", reduction="none").double()
    lines, data = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for size in PROCESSES:
            mp.spawn(run, (size, count, rounds, folder), size)
            found: dict[str, Any] = torch.load(f"{folder}/{size}")
            ours, theirs = (1e3 * statistics.median(x) for x in zip(*found["times"], strict=True))
            ratio = statistics.median(b / a for a, b in found["times"])
            off = ((found["values"].double() - expected) / expected).abs().max().item()
            values = [f"{size}", f"{ours:.1f}", f"{theirs:.1f}", f"{ratio:.1f}", f"{found['mib']:.1f}", f"{off:.1e}"]
            lines.append(values)
            data[size] = {"times": found["times"], "mib": found["mib"], "off": off}
    head = ["processes", "ms", "ms, gathering first", "times faster", "MiB beyond the input", "largest difference"]
    about = f"{count:,} rows of {CLASSES:,} classes in float32, one thread a process, on 2 cores."
    report("Classes on several processes", f"{about}\n\n{table(head, lines)}", data)


if __name__ == "__main__":
    main()
