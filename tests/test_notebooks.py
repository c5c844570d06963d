"""The notebooks run, and their outputs are in place."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))

# jupyter's own advice on its sockets and event loops
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:.*event loop.*", "ignore::ResourceWarning"
)


# The digits of F.kl_div on near-equal rows are rounding errors: other ones on every processor.
REST = re.compile(r"(?<=^F\.kl_div) .*", re.MULTILINE)


def printed(notebook):
    return [
        REST.sub("", "".join(output.text for output in cell.outputs if output.output_type == "stream"))
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def kinds(notebook):
    return [
        {kind for output in cell.outputs for kind in output.get("data", {output.output_type: 0})}
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch):
    # What transformers, where torchmetrics finds it, has tqdm say of a missing widget.
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")
    stored = nbformat.read(path, as_version=4)
    nbformat.validate(stored)
    fresh = nbformat.read(path, as_version=4)
    NotebookClient(fresh, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    assert kinds(fresh) == kinds(stored), "an output is missing, or is not the one that the code gives"
    assert not any("stderr" in output.get("name", "") for cell in stored.cells for output in cell.get("outputs", []))
    if path.stem.startswith("1_"):  # no training in it: every digit is the same everywhere
        assert printed(fresh) == printed(stored)


def test_what_is_noise_is_not_compared():
    assert REST.sub("", "F.kl_div   -1.29e-07\nklmetric    4.86e-09\n") == "F.kl_div\nklmetric    4.86e-09\n"


def test_the_first_cell_installs():
    for path in NOTEBOOKS:
        first = next(cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
        assert "%pip install -q" in first.source


def test_the_script_in_the_notebook_is_the_example():
    root = Path(__file__).parent.parent
    script = "%%writefile evaluate_digits.py\n" + (root / "examples" / "evaluate_digits.py").read_text()
    notebook = nbformat.read(root / "notebooks" / "3_distributed_evaluation.ipynb", as_version=4)
    assert script in [cell.source for cell in notebook.cells]
