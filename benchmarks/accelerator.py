"""How far is the divergence of logits on an accelerator from reading both inputs once, and how far is everybody else?

`accelerator.py` takes the accelerator of this machine, and says so where there is none. `accelerator.py --interpreter`
shows that it runs: tiny inputs on the CPU, the kernel by Triton's interpreter, whose times mean nothing.
"""

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from side_by_side import report, table
from torch import Tensor
from torch.nn import functional as F

from klmetric.arithmetic import accelerator, plain
from klmetric.options import Options

INTERPRETER = "--interpreter" in sys.argv
SHAPES = (
    ((512, 32_000), "float32"),
    ((512, 32_000), "bfloat16"),
    ((8, 2_048, 128_256), "bfloat16"),
    ((8_192, 1_000), "float32"),
    ((100_000, 10), "float32"),
)
KINDS = ("near", "offset", "masked", "far")
LOGITS = Options(input_format=("logits", "logits"))
ROUNDS = 3 if INTERPRETER else 20
Call = Callable[[Tensor, Tensor], object]


def logits(shape: tuple[int, ...], dtype: str, kind: str, device: str) -> tuple[Tensor, Tensor]:
    """Two tensors of logits: q is p with noise, that and a constant, that and a mask in both, or unrelated."""
    generator = torch.Generator(device).manual_seed(0)
    p, q = (torch.randn(shape, generator=generator, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    if kind != "far":
        q.mul_(0.02).add_(p)
    if kind == "offset":
        q.add_(20)
    if kind == "masked":
        mask = torch.rand(shape[-1], generator=generator, device=device) < 0.3
        p.masked_fill_(mask, -math.inf), q.masked_fill_(mask, -math.inf)
    return p, q


def contenders() -> dict[str, Call]:
    """Those that are to be had here."""

    def torchmetrics(p: Tensor, q: Tensor) -> Tensor:
        metric = KLDivergence(log_prob=True).to(p.device)
        metric.update(p.flatten(0, -2).log_softmax(-1), q.flatten(0, -2).log_softmax(-1))
        return metric.compute()

    def kl_div(p: Tensor, q: Tensor) -> Tensor:
        return F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")

    found: dict[str, Call] = {
        "klmetric": lambda p, q: accelerator.measure(p, q, LOGITS.input_format, agrees=True),
        "F.kl_div": kl_div,
    }
    try:
        from torchmetrics.regression import KLDivergence

        found["torchmetrics"] = torchmetrics
    except ImportError:
        pass
    if not INTERPRETER:
        compiled = torch.compile(plain.plain, dynamic=False)
        found["plain, compiled"] = lambda p, q: compiled(p, q, LOGITS)
    try:
        from liger_kernel.transformers.functional import liger_kl_div

        found["Liger"] = lambda p, q: liger_kl_div(
            q.flatten(0, -2).log_softmax(-1), p.flatten(0, -2).log_softmax(-1), "batchmean", True
        )
    except ImportError:
        pass
    return found


def measured(call: Call, p: Tensor, q: Tensor) -> tuple[float, float]:
    """Seconds of a call, the median, and MiB at its peak beside the inputs; not a number where there is no room."""
    device = getattr(torch, p.device.type)
    counts = hasattr(device, "max_memory_allocated") and p.device.type != "cpu"
    try:
        call(p, q)  # compiles
        device.synchronize()
        if counts:
            device.reset_peak_memory_stats()
            before = device.memory_allocated()
        times = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            call(p, q)
            device.synchronize()
            times.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        device.empty_cache()
        return math.nan, math.nan
    return statistics.median(times), (device.max_memory_allocated() - before) / 2**20 if counts else math.nan


def figures(device: str, shapes: tuple[tuple[tuple[int, ...], str], ...]) -> Iterator[dict[str, object]]:
    """Of each input, those of every contender."""
    calls = contenders()
    for shape, dtype in shapes:
        for kind in KINDS:
            p, q = logits(shape, dtype, kind, device)
            reading, _ = measured(lambda p, q: (p.amax(), q.amax()), p, q)
            found = {name: measured(call, p, q) for name, call in calls.items()}
            yield {"shape": shape, "dtype": dtype, "kind": kind, "reading": reading, "contenders": found}
            print(*shape, dtype, kind, file=sys.stderr)


def main() -> int:
    """Print the table and write the figures."""
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if there is None and not INTERPRETER:
        print("There is no accelerator here, and so nothing to measure. (--interpreter shows that it runs.)")
        return 2
    if INTERPRETER:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton asks when it is imported, which it is not yet
    device = "cpu" if INTERPRETER else there.type
    name = "Triton's interpreter" if INTERPRETER else getattr(torch, device).get_device_name()
    shapes = (((4, 100), "float32"), ((2, 2, 40), "bfloat16")) if INTERPRETER else SHAPES
    torch.set_grad_enabled(False)
    found = list(figures(device, shapes))
    names = list(found[0]["contenders"])
    lines = [
        [
            f"{' x '.join(f'{n:,}' for n in case['shape'])}, {case['dtype']}, {case['kind']}",
            f"{1e3 * case['reading']:.3f}",
            *(f"{100 * case['reading'] / s:.0f}% ({mib:.0f})" for s, mib in case["contenders"].values()),
        ]
        for case in found
    ]
    text = (
        f"On {name}: the time that reading both inputs once takes, as a share of the time that the divergence of"
        " logits takes (softmax or log-softmax included where a library needs it), and in brackets the MiB at the peak"
        " beside the inputs; nan where there is no room.\n\n" + table(["input", "reading (ms)", *names], lines)
    )
    if INTERPRETER:
        print(text)
    else:
        report("Accelerator", text, {"device": name, "cases": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
