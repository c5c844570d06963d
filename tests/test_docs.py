"""What stands in the README and in the documentation runs, prints what stands below it, and leads somewhere."""

import contextlib
import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import trained

from klmetric.__main__ import main

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


TABLES = [
    pytest.param(commands, printed, id=names(page))
    for page in PAGES
    for commands, printed in re.findall(
        r"```sh\n((?:klmetric (?:record|compare) [^\n]+\n)+)```\n\n```console\n(.*?)```", page.read_text(), re.DOTALL
    )
]


@pytest.mark.parametrize(("commands", "printed"), TABLES)
def test_commands_print_what_stands_below(commands, printed, tmp_path, monkeypatch, capsys):
    """But for the digits, which are those of a training."""
    if "klmetric record" in commands:
        pytest.importorskip("transformers", reason="klmetric record needs transformers")
        import language_models

        language_models.save(tmp_path / "model", language_models.trained())
        (tmp_path / "text.txt").write_text(language_models.text(), encoding="utf-8")
    else:
        save_predictions(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    for command in commands.splitlines():
        monkeypatch.setattr(sys, "argv", command.replace("'", "").split())
        with pytest.raises(SystemExit, match="0"):
            main()
    assert shape_of(capsys.readouterr().out) == shape_of(printed)


def save_predictions(folder):
    for name, x in {"float32": "full", "int8": "int8", "bf16": "bf16"}.items():
        np.save(folder / f"{name}.npy", trained.text()[x].numpy())
    values, ids = trained.text()["full"].log_softmax(-1).topk(20)
    np.savez(folder / "teacher.npz", log_probs=values.numpy(), ids=ids.numpy())


def test_rows_are_read_as_the_guide_has_it(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "guides" / "compare.md").read_text()
    [(command, code)] = re.findall(
        r"```sh\n(klmetric compare [^\n]+--rows[^\n]+)\n```\n\n```py\n(.*?)```", page, re.DOTALL
    )
    save_predictions(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit, match="0"):
        main()
    found: dict[str, object] = {}
    exec(compile(code, "compare.md", "exec"), found)
    means = dict(zip(found["by_model"]["model"].to_pylist(), found["by_model"]["kl_mean"].to_pylist(), strict=True))
    assert means == {"int8": pytest.approx(4.0e-4, rel=0.5), "bf16": pytest.approx(2.5e-5, rel=0.5)}
    assert found["worst"]["kl"][0].as_py() == found["rows"]["kl"].to_numpy().max()
    assert found["worst"].num_rows == 100


def test_the_pages_with_commands():
    guides = [f"docs/guides/{name}.md" for name in ("compare", "compare", "language-models", "partial")]
    assert [table.id for table in TABLES] == ["README.md", *guides]


def shape_of(table: str) -> list[str]:
    return [re.sub(r"-?\d[\d.,e-]*", "#", " ".join(line.split())) for line in table.splitlines()]


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
