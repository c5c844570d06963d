"""Compile the kernel into one shared library: each level once, and what chooses between them.

`python build.py LIBRARY [TARGET]`, with clang from `ziglang`, which also compiles for other platforms, or with the
system's compiler (`CXX`, else `c++`).
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent
# The flags of each level, for the compiler of the system and for zig.
LEVELS = {
    "x86_64": {
        "baseline": ("-march=x86-64", "x86_64"),
        "avx2": ("-mavx2 -mfma", "x86_64+avx2+fma"),
        "avx512": (
            "-mavx2 -mfma -mavx512f -mavx512dq -mavx512bw -mavx512vl",
            "x86_64+avx2+fma+avx512f+avx512dq+avx512bw+avx512vl",
        ),
    },
    "aarch64": {"neon": ("", "generic")},
}
# Contraction would make other bits; exceptions and run-time types would need a library. Lanes whose result a select
# throws away may overflow.
FLAGS = "-O3 -std=c++17 -fwrapv -ffp-contract=off -fno-math-errno -fno-exceptions -fno-rtti -fvisibility=hidden"


def build(library: Path, target: str | None = None) -> None:
    """Compile for this machine, or for a target of zig, as "aarch64-linux-gnu.2.17"; raises CalledProcessError."""
    machine = target.split("-")[0] if target else os.uname().machine if hasattr(os, "uname") else "x86_64"
    machine = {"arm64": "aarch64", "AMD64": "x86_64"}.get(machine, machine)
    zig = "CXX" not in os.environ and importlib.util.find_spec("ziglang") is not None
    compiler = [sys.executable, "-m", "ziglang", "c++"] if zig else [os.environ.get("CXX", "c++")]
    flags = FLAGS.split() + (["-fno-sanitize=all"] if zig else [])
    if "windows" not in (target or sys.platform):
        flags.append("-fPIC")
    if zig and target:
        flags += ["-target", target]
    with tempfile.TemporaryDirectory() as folder:
        objects, running = [], []
        jobs = [("levels", [])]
        for level, (native, of_zig) in LEVELS[machine].items():
            jobs.append((level, [f"-DLEVEL={level}", *([f"-mcpu={of_zig}"] if zig else native.split())]))
        for name, extra in jobs:
            source = SOURCES / ("levels.cpp" if name == "levels" else "kernel.cpp")
            objects.append(f"{folder}/{name}.o")
            running.append(subprocess.Popen([*compiler, *flags, *extra, "-c", str(source), "-o", objects[-1]]))
        for process in running:
            if process.wait():
                raise subprocess.CalledProcessError(process.returncode, process.args)
        subprocess.run([*compiler, *flags, "-shared", "-s", "-o", str(library), *objects], check=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]), *sys.argv[2:])
