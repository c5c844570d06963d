"""Run the benchmarks and write what they print into README.md, beside the machine and the date.

`all.py` runs all of them; `all.py speed drift` only those, and leaves the figures of the others as they are.
"""

import subprocess
import sys
from pathlib import Path

from side_by_side import RESULTS, machine

HERE = Path(__file__).parent
SCRIPTS = (
    "speed",
    "memory",
    "accuracy",
    "overhead",
    "drift",
    "sync",
    "summary",
    "compare",
    "head",
    "shards",
    "zeros",
    "coverage",
    "estimate",
    "topk",
)
HEAD = """# Benchmarks

Written by `make bench`, from what the scripts of this folder print; the figures stand in `results/` as JSON as well.
Where a script times, each contender runs in a process of its own and they take turns, so that their ratios hold even
where the machine is shared and the times do not. Nothing was measured on an accelerator yet.
"""


def main() -> None:
    """Run what is named, or all; options such as `--quick` are passed on."""
    options = [word for word in sys.argv[1:] if word.startswith("--")]
    names = [word for word in sys.argv[1:] if word not in options] or SCRIPTS
    here = machine()
    versions = ", ".join(f"{name} {version}" for name, version in here.pop("versions").items())
    place = "{date}: {processor}, {cores} cores, {threads} threads, {vectors}, {system}, Python {python}".format(**here)
    RESULTS.mkdir(exist_ok=True)
    for name in names:
        print(f"{name} ...", file=sys.stderr)
        command = [sys.executable, str(HERE / f"{name}.py"), *options]
        printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        (RESULTS / f"{name}.md").write_text(f"{printed}\n({place}, {versions}.)\n")
    parts = [RESULTS / f"{name}.md" for name in SCRIPTS]
    (HERE / "README.md").write_text("\n".join([HEAD, *(part.read_text() for part in parts if part.exists())]))


if __name__ == "__main__":
    main()
