"""At what rate, and in what memory, does `klmetric compare` measure a pair of files that does not fit?"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from side_by_side import report, table

from klmetric.command.comparison import Task
from klmetric.command.measure import empty, measure_share
from klmetric.options import Options
from klmetric.rows.fields import OF_CLASSES
from klmetric.saved.array import Choice
from klmetric.saved.open import open_saved

CLASSES = 32_000
LAUNCH = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6)
"""


def write(folder: Path, rows: int) -> None:
    """Logits of two near-equal models, float32."""
    generator = torch.Generator().manual_seed(0)
    files = [np.lib.format.open_memmap(folder / name, "w+", np.float32, (rows, CLASSES)) for name in ("p.npy", "q.npy")]
    for start in range(0, rows, 512):
        p = torch.randn(min(512, rows - start), CLASSES, generator=generator)
        for file, x in zip(files, (p, p + 0.1 * torch.randn(p.shape, generator=generator)), strict=True):
            file[start : start + 512] = x.numpy()


def map_and_sum(folder: Path) -> None:
    """What a pass over both files takes at least, mapped into memory."""
    for name in ("p.npy", "q.npy"):
        rows = np.load(folder / name, mmap_mode="c")
        for start in range(0, len(rows), 64):
            torch.from_numpy(rows[start : start + 64]).sum()


def read_and_sum(folder: Path) -> None:
    """The same, read into one buffer."""
    buffer = torch.empty(64, CLASSES)
    for name in ("p.npy", "q.npy"):
        with (folder / name).open("rb", buffering=0) as file:
            file.seek(np.load(folder / name, mmap_mode="r").offset)
            while file.readinto(buffer.numpy()):
                buffer.sum()


def measure(folder: Path, more: bool = False) -> None:
    """What the command does between opening and reporting; `--more` of it too."""
    p, q = (open_saved(folder / name, Choice()) for name in ("p.npy", "q.npy"))
    options = Options(("logits", "logits"))
    of_more = {"fields": tuple(OF_CLASSES), "has_bands": True} if more else {}
    task = Task(p, [q], options, None, (0.5, 0.99), 0, None, None, [], None, p.shape[0], None, **of_more)
    measure_share(empty(task), 0, 1, lambda rows: None, lambda: False)


def seconds(function: Callable[[Path], None], folder: Path) -> float:
    """Of one call."""
    start = time.perf_counter()
    function(folder)
    return time.perf_counter() - start


def main() -> None:
    """Print the rate of both, and the peak of the command's memory."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="two fifths of the size")
    rows = 3_200 if parser.parse_args().quick else 8_000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, rows)
        gigabytes = 2 * rows * CLASSES * 4 / 1e9
        command = [sys.executable, "-m", "klmetric", "compare", "p.npy", "q.npy", "--input-format", "logits"]
        # From a process that is small: the peak of a child begins with what its parent holds.
        launch = [sys.executable, "-c", LAUNCH, *command]
        peak = float(subprocess.run(launch, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout)
        contenders = {"map and sum": map_and_sum, "read and sum": read_and_sum, "klmetric compare": measure}
        contenders["klmetric compare --more"] = partial(measure, more=True)
        times: dict[str, list[float]] = {what: [] for what in contenders}
        for _ in range(7):
            for what, function in contenders.items():
                time.sleep(0.5)
                times[what].append(seconds(function, folder))
    medians = {what: statistics.median(values) for what, values in times.items()}
    best = min(medians["map and sum"], medians["read and sum"])
    lines = [
        [what, f"{value:.2f}", f"{gigabytes / value:.2f}", f"{best / value:.0%}"] for what, value in medians.items()
    ]
    text = table([f"{gigabytes:.1f} GB in two files, float32, {CLASSES:,} classes", "s", "GB/s", "of reading"], lines)
    text += f"\n\nThe whole command held {peak:.0f} MB at most."
    report("Compare", text, {"gigabytes": gigabytes, "seconds": medians, "peak_megabytes": peak})


if __name__ == "__main__":
    main()
