"""The command, by running it."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
from processes import forked

from klmetric import __version__
from klmetric.__main__ import main
from klmetric.arithmetic.level import level, on_accelerators
from klmetric.command import compare, output


def klmetric(*arguments, cwd):
    command = [sys.executable, "-m", "klmetric", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


@pytest.fixture
def here(monkeypatch, tmp_path, capsys):
    """The command in this process: its status, and what it says."""

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["klmetric", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    before = signal.getsignal(signal.SIGINT)
    yield run
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_version(tmp_path):
    kernels = f"kernel: {level() or 'plain'}, on accelerators: {on_accelerators() or 'plain'}"
    assert klmetric("--version", cwd=tmp_path).stdout == f"klmetric {__version__} ({kernels})\n"


@pytest.mark.slow
def test_version_says_which_kernel_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("KLMETRIC_KERNEL", "plain")
    assert klmetric("--version", cwd=tmp_path).stdout == (
        f"klmetric {__version__} (kernel: plain, on accelerators: plain)\n"
    )
    if level() not in (None, "neon"):
        monkeypatch.setenv("KLMETRIC_KERNEL", "fast")
        done = klmetric("--version", cwd=tmp_path)
        assert done.returncode == 2
        assert "KLMETRIC_KERNEL must be a level that this processor can run: plain, baseline" in done.stderr


def test_help(here):
    assert "demo" in here("--help")[1]
    status, shown, _ = here("demo", "--help")
    assert status == 0
    assert all(option in shown for option in ("--devices", "--epochs", "--seed", "--out"))


@pytest.mark.slow
def test_demo(tmp_path):
    done = klmetric("demo", "--devices", 2, "--epochs", 2, "--seed", 3, "--out", "there", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    cells = {row[0]: [float(cell) for cell in row[1:] if "%" not in cell] for row in rows[2:]}
    (one, their_one), (two, their_two) = cells["with 1 process"], cells["with 2 processes"]
    assert one == pytest.approx(two, rel=1e-6)
    assert one == pytest.approx(their_one, rel=1e-5)
    assert their_two < 0.6 * their_one
    assert "klmetric: the same number" in done.stdout
    for dtype, theirs_are_off in (("bfloat16", 1e-4), ("float16", 1e-2)):
        exact, ours, theirs = cells[dtype]
        assert ours == pytest.approx(exact, rel=3e-6)
        assert theirs != pytest.approx(exact, rel=theirs_are_off)
    with (tmp_path / "there" / "metrics.csv").open() as file:
        values = [float(row["val_kl"]) for row in csv.DictReader(file)]
    assert len(values) == 2
    assert values[1] < values[0]
    assert min(values) == pytest.approx(one, rel=1e-6)
    assert (tmp_path / "there" / "val_kl.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "there" / "best.ckpt").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("demo", "--epochs", "0"), "Invalid value for '--epochs'"),
        (("demo", "--devices", "two"), "Invalid value for '--devices'"),
        (("demo", "--out", "file"), "Invalid value for '--out'"),
        (("dmeo",), "No such command 'dmeo'"),
    ],
)
def test_bad_input_is_status_2(here, tmp_path, arguments, text):
    (tmp_path / "file").touch()
    status, _, said = here(*arguments)
    assert status == 2
    assert text in said
    assert "Traceback" not in said


def forget(monkeypatch, *names):
    """Have these, and what is in them, imported anew."""
    for name in list(sys.modules):
        if name in names or name.startswith(tuple(f"{name}." for name in names)):
            monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    ("missing", "needing", "arguments", "text"),
    [
        (
            "typer",
            ["klmetric.command.cli"],
            [],
            "The command klmetric needs typer and rich: pip install 'klmetric[cli]'",
        ),
        (
            "sklearn",
            ["klmetric.command.demo", "klmetric.command.distil"],
            ["demo"],
            "The demo needs sklearn.datasets: pip install 'klmetric[demo]'",
        ),
        (
            "transformers",
            ["klmetric.command.record", "klmetric.command.language_model"],
            ["record", "model", "--text", __file__, "--out", "folder"],
            "Error: record needs transformers: pip install 'klmetric[record]'.\n",
        ),
    ],
)
def test_what_to_install(here, monkeypatch, missing, needing, arguments, text):
    forget(monkeypatch, missing, *needing)
    monkeypatch.setitem(sys.modules, missing, None)
    status, _, said = here(*arguments)
    assert status == 2
    assert text in said


# --- What needs no torch is answered without it

# Runs the command, and at the end names those that it has imported, each of which takes long.
WITHOUT = """
import atexit, runpy, sys
heavy = {"torch", "numpy", "torchmetrics"}
atexit.register(lambda: print("imported:", sorted(heavy & set(sys.modules)), file=sys.stderr))
sys.argv[0] = "klmetric"
runpy.run_module("klmetric", run_name="__main__", alter_sys=True)
"""

# Runs the command for each line that it reads. None of them imports what takes long, so that one process does for all.
EACH = """
import contextlib, io, json, os, runpy, sys
answers = []
for arguments in map(str.split, sys.stdin):
    sys.argv = ["klmetric", *arguments]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            runpy.run_module("klmetric", run_name="__main__", alter_sys=True)
            status = None
        except SystemExit as ended:
            status = ended.code
    heavy = sorted({"torch", "numpy", "torchmetrics"} & set(sys.modules))
    answers.append((status, out.getvalue(), heavy, sorted(os.listdir())))
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_files")
    for name in "pq":
        (folder / f"{name}.npy").touch()
    lines = [arguments for arguments, _, _ in WITHOUT_TORCH]
    environment = os.environ | {"COLUMNS": "120"}
    command = [sys.executable, "-c", EACH]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return dict(zip(lines, json.loads(done.stdout), strict=True))


@pytest.mark.slow
def test_what_shows_a_report_takes_plain_data():
    modules = ["tables", "fitting", "terminal", "markdown", "formats", "limits", "output"]
    code = "import sys\n"
    for module in modules:
        code += f"import klmetric.command.{module}\nassert not {{'torch', 'numpy'}} & set(sys.modules), {module!r}\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


WITHOUT_TORCH = [
    ("--version", 0, "klmetric "),
    ("--help", 0, "compare"),
    ("demo --help", 0, "--devices"),
    ("compare --help", 0, "REFERENCE"),
    ("compare", 2, "Missing argument 'REFERENCE'"),
    ("compare p.npy", 2, "Missing argument 'MODEL...'"),
    ("compare p.npy q.npy --no-such", 2, "No such option: --no-such"),
    ("compare p.npy q.npy --worst -1", 2, "Invalid value for '--worst'"),
    ("compare p.npy q.npy --temperature warm", 2, "Invalid value for '--temperature'"),
    ("compare p.npy nothing.npy", 2, "Error: nothing.npy does not exist."),
    ("compare p.npy q.mpy", 2, "Error: q.mpy does not exist. Did you mean q.npy?"),
    ("compare p.npy no/q.npy", 2, "Error: no/q.npy does not exist. Nor is there a folder no."),
    ("compare p.npy p.npy/q.npy", 2, "p.npy/q.npy does not exist."),
    ("compare p.npy q.npy --mask no.npy", 2, "Error: --mask: no.npy does not exist."),
    ("compare p.npy q.npy --weight no.npy", 2, "Error: --weight: no.npy does not exist."),
    ("compare p.npy q.npy --groups no.txt", 2, "Error: --groups: no.txt does not exist."),
    ("compare p.npy q.npy --fail-above mean", 2, "A limit must be a value and a number, as mean=0.01. Got 'mean'"),
    ("compare p.npy q.npy --fail-below median=1", 2, "Got 'median'. Did you mean 'p50'?"),
    ("compare p.npy q.npy --direction back", 2, "`direction` must be one of 'forward', 'reverse', 'jeffreys', 'jensen"),
    ("compare p.npy q.npy --input-format logit", 2, "`--input-format` must be one of"),
    ("compare p.npy q.npy --input-format logits,,probs,logits", 2, "must be one format, or a pair"),
    ("compare p.npy q.npy --temperature 0", 2, "`temperature` must be a finite number above 0. Got 0"),
    ("compare p.npy q.npy --temperature nan", 2, "`temperature` must be a finite number above 0. Got nan"),
    ("compare p.npy q.npy --base 1", 2, "`base` must be a finite number above 1. Got 1"),
    ("compare p.npy q.npy --eps 1", 2, "`eps` must be a probability"),
    ("compare p.npy q.npy --nan-strategy propagate", 2, "`--nan-strategy` must be one of 'error', 'ignore'."),
    ("compare p.npy q.npy --columns a --columns b --columns c", 2, "--columns must be given once, or twice"),
    ("compare p.npy q.npy --plot kl.xyz", 2, "--plot must name a picture, .png, .svg, .pdf. Got kl.xyz."),
    ("compare p.npy q.npy --rows rows.csv", 2, "--rows must name a file, .npy or .parquet. Got rows.csv."),
    ("compare p.npy q.npy --vocab p.npy", 2, "--vocab is the text of the classes of the worst rows."),
    ("compare p.npy q.npy --worst 1 --vocab no.json", 2, "--vocab: no.json does not exist."),
    ("compare p.npy q.npy --html kl.xyz", 2, "--html must name a page, .html, .htm. Got kl.xyz."),
    ("compare p.npy q.npy --size r=4", 2, "--size must name a model as the report does: q. Got 'r'."),
    ("compare p.npy q.npy --json no/o.json", 2, "The folder of a file to write must be there. Got no/o.json."),
    ("compare p.npy q.npy --csv .", 2, "A report must go into a file. Got ., which is a folder."),
    ("compare p.npy q.npy --csv q.npy", 2, "A report must not take the place of what it is about. Got q.npy"),
    ("compare p.npy q.npy --csv o --json ./o", 2, "Each report must go into a file of its own. Got o for two."),
    ("record --help", 0, "MODEL"),
    ("record model --out o", 2, "Missing option '--text'"),
    ("record model --text p.npy", 2, "Missing option '--out'"),
    ("record model --text no.txt --out o", 2, "Error: --text: no.txt does not exist."),
    ("record model --text p.npy --out o --dtype int8", 2, "`--dtype` must be one of 'float32', 'bfloat16', 'float16'."),
    ("record model --text p.npy --out o --quantize int4", 2, "`--quantize` must be one of 'int8'. Got 'int4'."),
    ("record model --text p.npy --out o --window 1", 2, "Invalid value for '--window'"),
    ("record model --text p.npy --out o --batch 0", 2, "Invalid value for '--batch'"),
    ("demo --epochs 0", 2, "Invalid value for '--epochs'"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "status", "text"), WITHOUT_TORCH)
def test_without_torch(answers, arguments, status, text):
    ended, said, imported, files = answers[arguments]
    assert ended == status, said
    assert text in said
    assert imported == []
    assert files == ["p.npy", "q.npy"]


@pytest.mark.slow
def test_the_checker_of_imports_can_fail(predictions):
    command = [sys.executable, "-c", WITHOUT, "compare", "p.npy", "q.npy", "--input-format", "logits"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=predictions)
    assert done.stderr.splitlines()[-1] == "imported: ['numpy', 'torch', 'torchmetrics']"


# --- Ctrl-C, at a given point

# Sends SIGINT to itself at the n-th event (https://docs.python.org/3/library/audit_events.html) whose name and first
# argument end so: an import, a file that is opened, a file that is renamed.
INTERRUPTING = """
import os, runpy, signal, sys
event, end, count, *sys.argv[1:] = sys.argv[1:]
left = int(count)
def hook(name, args):
    global left
    if name == event and args and str(args[0]).endswith(end):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(hook)
sys.argv[0] = "klmetric"
runpy.run_module("klmetric", run_name="__main__", alter_sys=True)
"""


# What comes after the imports that take long, and need not be waited for.
LATE = ("p.npy", ".tmp")


def interrupt_at(event, end):
    """The same in a process that has imported the rest."""

    def hook(name, args):
        if name == event and args and str(args[0]).endswith(end):
            signal.raise_signal(signal.SIGINT)

    sys.addaudithook(hook)


def interrupted(event, end, count, *arguments, cwd, **options):
    command = [sys.executable, "-c", INTERRUPTING, event, end, str(count), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, **options)


@pytest.fixture
def predictions(tmp_path):
    x = np.random.default_rng(0).normal(size=(400, 50)).astype(np.float32)
    np.save(tmp_path / "p.npy", x)
    np.save(tmp_path / "q.npy", x + 0.1 * x[::-1])
    return tmp_path


REPORTS = ("--json", "o.json", "--csv", "o.csv", "--plot", "o.png", "--html", "o.html")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "end"),
    [
        ("import", "klmetric.command.ending"),
        ("import", "klmetric.command.cli"),
        ("import", "typer"),
        ("import", "rich"),
        ("open", ".tmp"),
        ("import", "torch"),
        ("import", "torch.nn"),
        ("import", "torchmetrics"),
        ("import", "klmetric.command.compare"),
        ("open", "p.npy"),
        ("import", "matplotlib"),
        ("import", "matplotlib.pyplot"),
        ("os.rename", ".tmp"),
    ],
)
def test_ctrl_c_in_every_phase(predictions, event, end):
    before = {"o.json": "a report", "o.csv": "another"}
    for name, text in before.items():
        (predictions / name).write_text(text)
    arguments = ["compare", "p.npy", "q.npy", "--input-format", "logits", *REPORTS]
    if end in LATE:
        done = forked(*arguments, cwd=predictions, first=partial(interrupt_at, event, end))
    else:
        done = interrupted(event, end, 1, *arguments, cwd=predictions)
    assert (done.returncode, done.stderr) == (130, "Interrupted.\n")
    assert (event == "os.rename") == ("p99.9" in done.stdout)
    assert {name: (predictions / name).read_text() for name in before} == before
    assert sorted(file.name for file in predictions.iterdir()) == ["o.csv", "o.json", "p.npy", "q.npy"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "end"), [("import", "torch"), ("import", "lightning"), ("import", "_posixsubprocess")]
)
def test_ctrl_c_in_the_demo(tmp_path, event, end):
    done = interrupted(event, end, 1, "demo", "--epochs", "1", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, "Interrupted.\n")


@pytest.mark.slow
def test_ctrl_c_while_the_demo_trains(tmp_path):
    """From a terminal: all processes of the group have it, and one of them answers."""
    command = [sys.executable, "-m", "klmetric", "demo", "--epochs", "1000", "--out", "there"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **pipes)
    try:
        while not (tmp_path / "there" / "last.ckpt").exists():  # which the first of them writes after an epoch
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate()  # once all that could write to it have ended
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, said) == (130, "Interrupted.\n")


@pytest.mark.slow
def test_in_the_background_it_is_not_interrupted(predictions):
    """As a shell starts what it does not wait for: with SIGINT ignored."""
    arguments = ["compare", "p.npy", "q.npy", "--input-format", "logits"]
    ignore = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    for event, end in (("import", "torch"), ("open", "q.npy")):
        done = interrupted(event, end, 2, *arguments, cwd=predictions, **ignore)
        assert (done.returncode, done.stderr) == (0, "")


# --- Where a report cannot be made


@pytest.mark.parametrize("broken", ["to_json", "to_csv", "to_markdown", "as_file", "to_page"])
def test_an_unexpected_error_loses_no_other_report(here, tmp_path, monkeypatch, broken):
    """What was measured is written wherever it can be, and then the fault is told; --debug shows where it is."""
    for name in "pq":
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).normal(size=(9, 3)))

    def fails(*_):
        raise TypeError("a fault in here")

    monkeypatch.setattr(output if hasattr(output, broken) else compare, broken, fails)
    arguments = ["compare", "p.npy", "q.npy", "--input-format", "logits", "--json", "o.json", "--csv", "o.csv"]
    arguments += ["--plot", "o.svg", "--html", "o.html"]
    status, said, fault = here(*arguments, "--markdown", "--debug")
    assert status == 2
    assert "Error: TypeError: a fault in here (Unexpected: --debug shows where.)\n" in fault
    assert "in fails\n" in fault
    written = {"to_json": "o.json", "to_csv": "o.csv", "as_file": "o.svg", "to_page": "o.html"}
    for maker, name in written.items():
        assert (tmp_path / name).exists() == (maker != broken), name
    assert ("p99.9" in said) == (broken != "to_markdown")


# --- Where there is no room


def leave_little_room():
    """From the first place that is written to on, and not where the places are tried."""
    import resource

    write = output.write_whole

    def with_little_room(path, data):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        write(path, data)

    output.write_whole = with_little_room


@pytest.mark.slow
def test_a_full_disk(predictions):
    """Files may have no more than a few bytes. What was there stays, and everything else is written."""
    (predictions / "o.json").write_text("a report")
    arguments = ["compare", "p.npy", "q.npy", "--input-format", "logits", *REPORTS]
    done = forked(*arguments, cwd=predictions, first=leave_little_room)
    assert done.returncode == 2, done.stderr
    for name in ("o.json", "o.png", "o.html"):
        assert f"A report must go where it can be written. Got {name}: File too large." in done.stderr
    assert "Traceback" not in done.stderr
    assert "p99.9" in done.stdout
    assert (predictions / "o.json").read_text() == "a report"
    assert (predictions / "o.csv").read_text().startswith("name,group,")
    assert sorted(file.name for file in predictions.iterdir()) == ["o.csv", "o.json", "p.npy", "q.npy"]


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--json", "--csv", "--plot"])
def test_a_full_disk_is_seen_before_measuring(predictions, option):
    code = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + WITHOUT
    code = code.replace("sys.argv[0]", "resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9)); sys.argv[0]")
    (predictions / "o.png").write_text("a report")
    command = [sys.executable, "-B", "-c", code, "compare", "p.npy", "q.npy", "--input-format", "logits"]
    done = subprocess.run([*command, option, "o.png"], capture_output=True, text=True, cwd=predictions)
    assert done.returncode == 2
    assert "Got o.png: File too large. Name another file.\nimported: []" in done.stderr
    assert (predictions / "o.png").read_text() == "a report"
    assert len(list(predictions.iterdir())) == 3


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
@pytest.mark.parametrize(
    "arguments", ["--version", "--help", "compare --help", "compare p.npy q.npy", "compare p.npy q.npy --json -"]
)
def test_nowhere_to_print_to(predictions, arguments):
    arguments = arguments.split()
    if "p.npy" in arguments:
        arguments += ["--input-format", "logits", "--csv", "o.csv"]
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "klmetric", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=predictions)
    assert done.returncode == 2
    assert done.stderr == (
        "Error: What is printed must have a place. Got standard output, which cannot be written: No space left on"
        " device.\n"
    )
    assert (predictions / "o.csv").exists() == ("p.npy" in arguments), "what can be written is"


def test_how_a_report_takes_its_place(predictions, here):
    (predictions / "kept").mkdir()
    before = predictions / "kept" / "o.json"
    before.write_text("a report")
    before.chmod(0o604)
    link = predictions / "link.json"
    link.symlink_to(before)
    pipe = predictions / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    arguments = ["compare", "p.npy", "q.npy", "--input-format", "logits", "--json", "link.json", "--csv", "pipe"]
    with before.open() as held:
        status, _, said = here(*arguments)
        assert held.read() == "a report", "it is another file"
    assert status == 0, said
    assert link.is_symlink()
    assert before.read_text().startswith("{")
    assert before.stat().st_mode & 0o777 == 0o604
    assert os.read(reader, 2**16).startswith(b"name,group,")
    assert pipe.is_fifo()
    os.close(reader)
    assert here(*arguments[:5], "--json", "/dev/null")[0] == 0
    new = predictions / "new.json"
    assert here(*arguments[:5], "--json", "new.json")[0] == 0
    umask = os.umask(0)
    os.umask(umask)
    assert new.stat().st_mode & 0o777 == 0o666 & ~umask
