"""What do rows cost that are made of hidden states and a head, beside the two products of matrices alone?

By `klmetric compare`, from recordings; and by the metric, given a `Head`.
"""

import argparse
import ctypes
import inspect
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from memory import peak
from safetensors.torch import load_file, save_file
from side_by_side import report, table
from torch import Tensor
from torch.nn.functional import linear

from klmetric import Head, KLDivergence
from klmetric.command.arguments import Arguments
from klmetric.command.cli import compare_command
from klmetric.command.comparison import Task
from klmetric.command.measure import empty, measure_share
from klmetric.command.opening import open_task
from klmetric.saved.formats.recording import HEAD, SCHEMA, TOKENS
from klmetric.saved.names import RECORDING

POSITIONS, CLASSES, WIDTH = 4096, 128_256, 2048
WINDOW = 129
# Windows in a turn, of each of the two, and turns.
TURN, ROUNDS = 2, 15


def write(folder: Path, windows: int) -> None:
    """Two recordings, as of a model and of one that is near to it."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(windows, WINDOW - 1, WIDTH, generator=generator)
    head = torch.randn(CLASSES, WIDTH, generator=generator).mul_(2 * WIDTH**-0.5)
    about = {"schema": SCHEMA, "rows": "hidden", "windows": windows, "windows_in_a_shard": 8}
    for name, noise in (("p", 0.0), ("q", 0.02)):
        place = folder / name
        place.mkdir()
        (place / RECORDING).write_text(json.dumps({**about, "scale": 1.0, "softcap": None}))
        save_file({"tokens": torch.zeros(windows, WINDOW, dtype=torch.int32)}, place / TOKENS)
        save_file({"weight": head}, place / HEAD)
        noisy = hidden + noise * torch.randn(hidden.shape, generator=generator)
        shards = noisy.split(8)
        for k, x in enumerate(shards, 1):
            save_file({"hidden": x.contiguous()}, place / f"hidden-{k:05}-of-{len(shards):05}.safetensors")


def in_memory(folder: Path) -> tuple[list[Tensor], list[Tensor]]:
    """The hidden states of all windows, and the heads."""
    heads = [load_file(folder / name / HEAD)["weight"] for name in "pq"]
    shards = [[load_file(file)["hidden"] for file in sorted((folder / name).glob("hidden-*"))] for name in "pq"]
    return [torch.cat(each) for each in shards], heads


def products(hidden: list[Tensor], heads: list[Tensor]) -> Callable[[], object]:
    """The products of a turn alone: of hidden states and heads that are in memory, a window at a time."""

    def call() -> None:
        # In one product of all windows, more time goes to memory that is new to the process.
        for k in range(TURN):
            for x, head in zip(hidden, heads, strict=True):
                linear(x[k], head)

    return call


def task_of(*paths: Path) -> Task:
    """What the command does with these and no option."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(compare_command).parameters.items()}
    given = {**defaults, "paths": [*paths]}
    return open_task(Arguments(**{name: given[name] for name in Arguments.__annotations__}), {})


def whole(task: Task) -> Callable[[], object]:
    """What `klmetric compare` does between opening and reporting."""
    return lambda: measure_share(empty(task), 0, 1, lambda rows: None, lambda: False)


def update(hidden: list[Tensor], heads: list[Tensor]) -> Callable[[], object]:
    """One update of the metric."""
    return lambda: KLDivergence().update(*(Head(x, head) for x, head in zip(hidden, heads, strict=True)))


def most_memory(call: Callable[[], object]) -> float:
    """MiB at the peak of a call, beyond what was there before."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak()
    call()
    return (peak() - before) / 1024


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Print both, in turns, and the memory."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a quarter of the positions, and half of the turns")
    is_quick = parser.parse_args().quick
    windows = POSITIONS // (WINDOW - 1) // (4 if is_quick else 1)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), windows)
        task = task_of(Path(folder) / "p", Path(folder) / "q")
        for saved in (task.reference, *task.models):
            saved.read(0, 1)  # the heads are mapped, and their pages counted
        hidden, heads = in_memory(Path(folder))
        for head in heads:
            head.sum()
        memory = [most_memory(call) for call in (whole(task), update(hidden, heads))]
        few = [x[:TURN] for x in hidden]
        all_three = products(few, heads), whole(replace(task, samples=TURN)), update(few, heads)
        times = [[*map(seconds, all_three)] for _ in range(ROUNDS // (2 if is_quick else 1))]
    theirs, *ours = (statistics.median(values) for values in zip(*times, strict=True))
    ratios = [statistics.median(each[k] / each[0] for each in times) for k in (1, 2)]
    rows = TURN * (WINDOW - 1)
    what = f"{windows * (WINDOW - 1):,} positions x {CLASSES:,} classes, width {WIDTH:,}"
    lines = [
        ["the two products alone", f"{1e3 * theirs / rows:.2f}", "1.00", ""],
        *(
            [name, f"{1e3 * x / rows:.2f}", f"{ratio:.2f}", f"{mib:.0f}"]
            for name, x, ratio, mib in zip(("klmetric compare", "an update"), ours, ratios, memory, strict=True)
        ),
    ]
    text = table([what, "ms a position", "of the products", "MiB beyond the heads"], lines)
    report("Hidden states and a head", text, {"seconds": times, "ratios": ratios, "peak_mib": memory})


if __name__ == "__main__":
    main()
