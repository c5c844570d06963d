"""How much memory does a call take beside its inputs?"""

import ctypes
import subprocess
import sys
from pathlib import Path

import contenders
from side_by_side import report, table

CASES = (
    ("float32", (2048, 32_000)),
    ("float32", (65_536, 1000)),
    ("float32", (2_000_000, 10)),
    ("bfloat16", (2048, 32_000)),
)
# Too large for what copies them; the first one is a batch of a language model, 16 texts of 2,048 tokens.
LARGE = (("bfloat16", (16 * 2048, 32_000)), ("float32", (4, 2_000_000)))
NAMES = [name for name in contenders.EVERYONE if "compiled" not in name and name != "read only"]


def extra(name: str, shape: contenders.Shape, dtype: str) -> float:
    """MiB of resident memory at the peak of a call, beyond what was resident before; the least of three."""
    call = contenders.EVERYONE[name](shape, dtype, "near")
    contenders.EVERYONE[name]((64, shape[1]), dtype, "near")()  # libraries loaded, threads started
    return min(_once(call) for _ in range(3))


def _once(call: contenders.Call) -> float:
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak()
    call()
    return (peak() - before) / 1024


def peak() -> int:
    """KiB of resident memory of this process, at most since that was last asked to start anew."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Measure each contender in a process of its own."""
    figures, lines = [], []
    for dtype, shape in (*CASES, *LARGE):
        one = shape[0] * shape[1] * (4 if dtype == "float32" else 2) / 2**20
        found = {}
        names = NAMES if (dtype, shape) in CASES else contenders.OURS
        for name in names:
            command = [sys.executable, __file__, name, str(shape[0]), str(shape[1]), dtype]
            found[name] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        figures.append({"shape": shape, "dtype": dtype, "input_mib": one, "extra_mib": found})
        lines.append(
            [
                f"{shape[0]:,} x {shape[1]:,} {dtype}",
                f"{one:.0f}",
                *(f"{found[name]:.0f}" if name in found else "" for name in NAMES),
            ]
        )
    text = "MiB at the peak of a call, beyond the inputs.\n\n" + table(["input", "one input", *NAMES], lines)
    report("Memory", text, figures)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(extra(sys.argv[1], (int(sys.argv[2]), int(sys.argv[3])), sys.argv[4]))
    else:
        main()
