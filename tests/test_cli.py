"""The command, by running it."""

import csv
import re
import subprocess
import sys

import pytest

from klmetric import __version__
from klmetric.__main__ import main


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

    return run


def test_version(tmp_path):
    assert klmetric("--version", cwd=tmp_path).stdout == f"klmetric {__version__}\n"


def test_help(here):
    assert "demo" in here("--help")[1]
    status, shown, _ = here("demo", "--help")
    assert status == 0
    assert all(option in shown for option in ("--devices", "--epochs", "--seed", "--out"))


def test_demo(tmp_path):
    done = klmetric("demo", "--devices", 2, "--epochs", 2, "--seed", 3, "--out", "there", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    one, two = (re.search(rf"with {n} process(?:es)? +val_kl = (\S+)", done.stdout)[1] for n in (1, 2))
    assert float(one) == pytest.approx(float(two), rel=1e-6)
    assert "The same number" in done.stdout
    with (tmp_path / "there" / "metrics.csv").open() as file:
        values = [float(row["val_kl"]) for row in csv.DictReader(file)]
    assert len(values) == 2
    assert values[1] < values[0]
    assert min(values) == pytest.approx(float(one), rel=1e-6)
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


@pytest.mark.parametrize(
    ("missing", "arguments", "text"),
    [
        ("typer", [], "The command klmetric needs typer and rich: pip install 'klmetric[cli]'"),
        ("sklearn", ["demo"], "The demo needs sklearn.datasets: pip install 'klmetric[demo]'"),
    ],
)
def test_what_to_install(tmp_path, missing, arguments, text):
    code = (
        f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['klmetric', *{arguments!r}]\n"
        "from klmetric.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert text in done.stderr
