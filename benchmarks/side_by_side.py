"""Timing in one run: every contender in a process of its own, one call at a time, in turns.

A process of its own gives each the default allocator as its own calls leave it. Turns spread what else the machine does
over all of them, so their ratios hold where their times do not.
"""

import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

# Makes the inputs in the process of the contender and returns what is to be timed.
Setup = Callable[..., Callable[[], object]]
PACKAGES = ("klmetric", "torch", "torchmetrics", "pytorch-ignite", "keras", "scipy", "numpy")
# Seconds after which the threads of the contender before have stopped waiting for more work on the cores.
QUIET = 0.25
MODULES = {"pytorch-ignite": "ignite"}
RESULTS = Path(__file__).parent / "results"


class Contenders:
    """Processes that wait for their turn. Close them, or use them in a `with`."""

    def __init__(self, names: Iterable[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.workers: dict[str, tuple[Connection, Any]] = {}
        for name in names:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.workers[name] = ours, process

    def __enter__(self) -> "Contenders":
        return self

    def __exit__(self, *_: object) -> None:
        for pipe, process in self.workers.values():
            pipe.close()
            process.join(10)

    def medians(
        self, setups: Mapping[str, tuple[Setup, tuple[Any, ...]]], rounds: int = 9, calls: int = 1
    ) -> dict[str, float]:
        """Seconds of one call of each contender: the median over rounds.

        Args:
            setups: by name, a function of a module, and its arguments.
            rounds: how often each has its turn.
            calls: how many calls make a turn, of which the mean counts; for what takes microseconds.
        """
        for name, (setup, arguments) in setups.items():
            pipe, _ = self.workers[name]
            pipe.send((setup, arguments, calls))
            pipe.recv()  # inputs made, two turns done
        times: dict[str, list[float]] = {name: [] for name in setups}
        for _ in range(rounds):
            for name in setups:
                time.sleep(QUIET)
                pipe, _ = self.workers[name]
                pipe.send(None)
                times[name].append(pipe.recv())
        return {name: statistics.median(seconds) for name, seconds in times.items()}


def _work(pipe: Connection) -> None:
    try:
        while True:
            order = pipe.recv()
            if order is not None:
                setup, arguments, calls = order
                call = None  # frees the inputs of the case before
                call = setup(*arguments)
                for _ in range(2 * calls):
                    call()
                pipe.send("ready")
                continue
            call()  # wakes the threads
            start = time.perf_counter()
            for _ in range(calls):
                call()
            pipe.send((time.perf_counter() - start) / calls)
    except EOFError:
        return


def machine() -> dict[str, Any]:
    """Where and with what the figures were made."""
    versions = {package: version(package) for package in PACKAGES if find_spec(MODULES.get(package, package))}
    return {
        "date": date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def report(question: str, text: str, figures: Any) -> None:
    """Print the table and write the figures as JSON, with the machine they were made on."""
    here = machine()
    print(f"## {question}\n\n{text}")
    RESULTS.mkdir(exist_ok=True)
    name = Path(__import__("__main__").__file__).stem
    (RESULTS / f"{name}.json").write_text(
        json.dumps({"question": question, "machine": here, "figures": figures}, indent=1)
    )
