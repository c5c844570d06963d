"""Compile the kernel into one shared library: each level once, and what chooses between them.

`python build.py LIBRARY [TARGET]`: for a target of zig, as "aarch64-linux-gnu.2.17", with clang from `ziglang`; without
one for this machine with its own clang (`CXX`, or what is found; `CXXFLAGS` are added). Of vectors wider than a
register gcc makes slow code.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent
# The levels of a machine, each with its flags for the compiler of the system and for zig.
LEVELS = {
    "x86_64": {
        "baseline": ("-march=x86-64", "-mcpu=x86_64"),
        "avx2": ("-mavx2 -mfma", "-mcpu=x86_64+avx2+fma"),
        "avx512": (
            "-mavx2 -mfma -mavx512f -mavx512dq -mavx512bw -mavx512vl",
            "-mcpu=x86_64+avx2+fma+avx512f+avx512dq+avx512bw+avx512vl",
        ),
    },
    "aarch64": {"neon": ("", "-mcpu=generic")},
}
NAMES = {"arm64": "aarch64", "amd64": "x86_64"}
# Contraction would make other bits; exceptions and run-time types would need a library. Lanes whose result a select
# throws away may overflow.
FLAGS = "-O2 -g0 -std=c++17 -fwrapv -ffp-contract=off -fno-math-errno -fno-exceptions -fno-rtti -fvisibility=hidden"


def build(library: Path, target: str | None = None) -> None:
    """Compile for a target of zig, or for this machine; raises `OSError` or `CalledProcessError` where that fails."""
    machine = target.split("-")[0] if target else platform.machine().lower()
    levels = LEVELS.get(NAMES.get(machine, machine))
    if levels is None:
        raise OSError(f"it is not written for {machine}")
    if target:
        zig = [sys.executable, "-m", "ziglang"]
        # The system's library of C++ is not used, and linking as C leaves it out.
        compiler, linker = [*zig, "c++"], [*zig, "cc"]
        flags = [*FLAGS.split(), "-fno-sanitize=all", "-target", target]
    else:
        compiler = linker = [system_compiler()]
        flags = [*FLAGS.split(), *os.environ.get("CXXFLAGS", "").split()]
    if not ("windows" in target if target else sys.platform == "win32"):
        flags.append("-fPIC")
    with tempfile.TemporaryDirectory() as folder:
        # Neither a home that cannot be written to stops zig, nor is anything left there.
        env = {f"ZIG_{which}_CACHE_DIR": f"{folder}/cache" for which in ("GLOBAL", "LOCAL")} | os.environ
        jobs: list[tuple[str, str, list[str]]] = [("levels.cpp", "levels", [])]
        for name, of_level in levels.items():
            jobs.append(("kernel.cpp", name, [f"-DLEVEL={name}", *of_level[bool(target)].split()]))
        running = [
            subprocess.Popen([*compiler, *flags, *extra, "-c", SOURCES / source, "-o", f"{folder}/{name}.o"], env=env)
            for source, name, extra in jobs
        ]
        # All are waited for: the folder goes with the last of them.
        failed = [process for process in running if process.wait()]
        if failed:
            raise subprocess.CalledProcessError(failed[0].returncode, failed[0].args)
        objects = [f"{folder}/{name}.o" for _, name, _ in jobs]
        # What is loaded somewhere stays as it is: the new library is another file.
        made = Path(folder) / library.name
        subprocess.run([*linker, *flags, "-shared", "-s", "-o", made, *objects], env=env, check=True)
        library.unlink(missing_ok=True)
        shutil.copyfile(made, library)


def system_compiler() -> str:
    """The compiler of the system; raises `OSError` if there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["clang++", *["c++"] * (sys.platform == "darwin")]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise OSError(f"there is no compiler ({', '.join(names)}, or ziglang)")
    return found


if __name__ == "__main__":
    build(Path(sys.argv[1]), *sys.argv[2:])
