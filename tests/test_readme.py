"""The README's code runs, top to bottom, and prints what stands below it."""

import contextlib
import io
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_code_prints_what_it_says():
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    names: dict[str, object] = {}
    printed = []
    for language, text in blocks:
        if language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(text, "README.md", "exec"), names)
            printed.append(out.getvalue())
        elif language == "text":
            assert printed[-1] == text
    assert len(printed) >= 3


def test_the_two_commands_exist():
    commands = re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert commands == ["demo", "test"]
    assert all(re.search(rf"^{command}:", makefile, re.MULTILINE) for command in commands)


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)h][^)]*)\)", (ROOT / "README.md").read_text())
    assert links
    assert all((ROOT / link).exists() for link in links)
