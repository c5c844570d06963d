"""The command, by running it."""

import csv
import re
import subprocess
import sys

import pytest

from klmetric import __version__


def klmetric(*arguments, cwd):
    command = [sys.executable, "-m", "klmetric", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


def test_version_and_help(tmp_path):
    assert klmetric("--version", cwd=tmp_path).stdout == f"klmetric {__version__}\n"
    assert "demo" in klmetric("--help", cwd=tmp_path).stdout
    shown = klmetric("demo", "--help", cwd=tmp_path).stdout
    assert all(option in shown for option in ("--devices", "--epochs", "--seed", "--out"))


@pytest.mark.parametrize("devices", [1, 2])
def test_demo(tmp_path, devices):
    done = klmetric("demo", "--devices", devices, "--epochs", 2, "--seed", 3, "--out", "there", cwd=tmp_path)
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
def test_bad_input_is_status_2(tmp_path, arguments, text):
    (tmp_path / "file").touch()
    done = klmetric(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert text in done.stderr
    assert "Traceback" not in done.stderr


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
