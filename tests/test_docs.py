"""What stands in the README and in the documentation runs, prints what stands below it, and leads somewhere."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# The digits of torchmetrics on near-equal rows are rounding errors: other ones on every processor.
NOISE = re.compile(r"(?<=^torchmetrics tensor\().*(?=\)$)", re.MULTILINE)


def names(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=names)
def test_code_prints_what_it_says(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    variables: dict[str, object] = {"__name__": "__main__"}
    printed = ""
    for language, text in BLOCK.findall(page.read_text()):
        if language == "python":
            assert not printed, "what is printed stands below"
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(text, page.name, "exec"), variables)
            printed = out.getvalue()
        elif language in ("text", "console") and printed:
            assert NOISE.sub("", printed) == NOISE.sub("", text)
            printed = ""
    assert not printed


def test_noise_alone_is_not_compared():
    assert (
        NOISE.sub("", "klmetric tensor(5.0)\ntorchmetrics tensor(-1.1e-07)\n")
        == "klmetric tensor(5.0)\ntorchmetrics tensor()\n"
    )


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith(("http", "#")):
            assert (page.parent / link.partition("#")[0]).exists(), link


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 900


def test_the_two_commands_exist():
    commands = re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert commands == ["demo", "test"]
    assert all(re.search(rf"^{command}:", makefile, re.MULTILINE) for command in commands)


def test_the_picture_is_of_the_notebook():
    import base64

    import nbformat

    notebook = nbformat.read(ROOT / "notebooks" / "4_the_tail_of_a_quantised_model.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert [base64.b64decode(picture) for picture in pictures] == [(ROOT / "docs" / "images" / "tail.png").read_bytes()]
