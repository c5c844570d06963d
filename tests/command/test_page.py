"""`klmetric compare --html`: the page says what the report says, needs nothing else, and can be read in a browser."""

import functools
import html
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from command import run
from kld import write_kld
from matplotlib import image

from klmetric import __version__
from klmetric.__main__ import main
from klmetric.command import compare
from klmetric.command import page as page_module
from klmetric.command.method import method_of
from klmetric.command.page import _without_folders
from klmetric.command.picture import printable
from klmetric.command.tables import notes_of, sections_of

EMPTY = {"meta", "br"}


class Page(HTMLParser):
    """A page, read strictly.

    Attributes:
        tables: their captions, and their cells, line by line.
        faults: what is not as it should be.
    """

    def __init__(self, text):
        super().__init__()
        self.open, self.faults, self.tables, self.texts = [], [], [], []
        self.tags, self.ids, self.named = Counter(), Counter(), []
        self.feed(text)
        self.close()
        self.faults += [f"{tag} is not closed" for tag in self.open]
        self.faults += [f"{name} is there {n} times" for name, n in self.ids.items() if n > 1]
        self.faults += [f"{name} is not there" for name in self.named if name not in self.ids]

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in EMPTY:
            self.open.append(tag)
        if tag == "table":
            self.tables.append(("", []))
        elif tag == "tr":
            self.tables[-1][1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1
        values = dict(attrs)
        if len(values) < len(attrs):
            self.faults.append(f"{tag} has an attribute twice")
        if "id" in values:
            self.ids[values["id"]] += 1
        self.named += values.get("aria-labelledby", "").split()
        for key, value in attrs:
            urls = re.findall(r"url\(([^)]*)\)", value or "") + (
                [value] if key in ("href", "src", "xlink:href") else []
            )
            self.named += [url[1:] for url in urls if url.startswith("#")]
            self.faults += [f"{tag} needs {url}" for url in urls if not url.startswith("#")]
            if key.startswith("on"):
                self.faults.append(f"{tag} has {key}")
        if tag == "th" and values.get("scope") not in ("row", "col"):
            self.faults.append("th has no scope")
        if tag == "svg" and not (values.get("role") == "img" and values.get("aria-labelledby")):
            self.faults.append("a picture has no name")
        if tag in ("script", "link", "img", "iframe", "object", "base", "form"):
            self.faults.append(f"{tag} is there")

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"{tag} ends where it is not the last")

    def handle_data(self, data):
        if "style" in self.open and re.search(r"url\(|@import|https?:", data):
            self.faults.append("the style needs something else")
        if "style" not in self.open:
            self.texts.append(data)
        if self.open[-1:] in (["td"], ["th"]) or ("td" in self.open and self.open[-1] == "span"):
            self.tables[-1][1][-1][-1] += data
        elif "caption" in self.open:
            self.tables[-1] = (self.tables[-1][0] + data, self.tables[-1][1])

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("<p><b>a</p>", "p ends where it is not the last"),
        ("<p>", "p is not closed"),
        ("<p id=a></p><p id=a></p>", "a is there 2 times"),
        ("<script>1</script>", "script is there"),
        ("<p onclick=x></p>", "p has onclick"),
        ("<a href='https://a.b'></a>", "a needs https://a.b"),
        ("<p style='background: url(a.png)'></p>", "p needs a.png"),
        ("<style>@import 'a';</style>", "the style needs something else"),
        ("<table><tr><th></th></tr></table>", "th has no scope"),
        ("<svg></svg>", "a picture has no name"),
        ("<p aria-labelledby=b></p>", "b is not there"),
    ],
)
def test_the_reader_finds(text, fault):
    assert fault in Page(text).faults


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 8, 20))
    infinite = x.copy()
    infinite[0, 0, 0] = -np.inf
    noise = rng.normal(size=x.shape)
    for name, data in {"p": x, "a": x + 0.1 * noise, "b": x + 0.3 * noise, "again": x + 1e-3 * noise}.items():
        np.save(folder / f"{name}.npy", data)
    np.save(folder / "infinite.npy", infinite)
    np.save(folder / "targets.npy", rng.integers(0, 20, (12, 8)))
    (folder / "groups.txt").write_text("".join(f"{'<b>' if k % 2 else 'c & d'}\n" for k in range(12)))
    return folder


@pytest.fixture
def page_of(files, tmp_path, monkeypatch, capsys):
    """The page of a command that is run in the folder of the files, and its report."""
    reports = []

    def to_page(report, *pictures):
        reports.append(report)
        return page_module.to_page(report, *pictures)

    monkeypatch.setattr(compare, "to_page", to_page)

    def page(*arguments, code=0):
        monkeypatch.chdir(files)
        given = ["compare", *arguments, "--input-format", "logits", "--html", str(tmp_path / "o.html")]
        monkeypatch.setattr(sys, "argv", ["klmetric", *given])
        with pytest.raises(SystemExit, match=str(code)):
            main()
        capsys.readouterr()
        return (tmp_path / "o.html").read_text(encoding="utf-8"), reports[-1]

    return page


EVERYTHING = (
    *("p.npy", "b.npy", "a.npy", "--size", "a=8bpw", "--size", "b=4bpw", "--floor", "again.npy"),
    *("--targets", "targets.npy", "--more", "--worst", "2", "--groups", "groups.txt"),
)


def shown_as(text):
    return printable(text).strip()


def agree(text, report):
    """The page is sound, and has every table, cell by cell, and every note."""
    page = Page(text)
    assert page.faults == []
    tables = {caption: rows for caption, rows in page.tables if caption not in ("All limits hold.", NOT_ALL)}
    expected = {printable(title): [head, *lines] for title, head, lines in sections_of(report)}
    for title, rows in expected.items():
        assert tables[title] == [["\n".join(map(shown_as, cell.split("\n"))) for cell in row] for row in rows]
    assert tables.keys() == expected.keys()
    for sentence in (*notes_of(report), *method_of(report)):
        assert " ".join(printable(sentence).split()) in page.text
    return page


NOT_ALL = "Not all limits hold."


def test_it_says_what_the_report_says(page_of):
    text, report = page_of(*EVERYTHING)
    page = agree(text, report)
    assert len(page.tables) == 9, "six of all, and the worst of three"
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert page.tags["svg"] == page.tags["figcaption"] == 2
    assert page.tags["title"] == 3, "of the page, and of each picture"
    assert page.tags["h1"] == page.tags["main"] == 1
    assert "a is the nearest of 2: " in page.text
    assert "96 rows in 12 samples, 20 classes. Reference: p.npy." in page.text
    assert "Perplexity is" in page.text
    assert "The floor is the reference run a second time." in page.text


def test_what_made_it(page_of, tmp_path, files):
    text, _ = page_of(*EVERYTHING[:-2], "--groups", str(files / "groups.txt"))
    page = Page(text)
    assert f"klmetric compare {' '.join(EVERYTHING[:-2])} --groups groups.txt --input-format logits" in page.text
    assert "--html o.html Date 2" in page.text
    for words in (f"klmetric {__version__}, kernel: ", f"PyTorch {torch.__version__}", "Python 3."):
        assert words in page.text
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", page.text)
    for folder in (tmp_path, files):
        assert str(folder) not in text


@pytest.mark.parametrize(
    ("given", "shown"),
    [("/home/me/a.npy", "a.npy"), ("--html=/home/me/o.html", "--html=o.html"), ("b/c.npy", "b/c.npy"),
     ("--size", "--size"), ("mean=0.1", "mean=0.1"), ("--more", "--more")],
)  # fmt: skip
def test_folders_are_left_out(given, shown):
    assert _without_folders(given) == shown


def test_limits(page_of):
    pair = ("p.npy", "a.npy", "b.npy")
    text, report = page_of(*pair, "--fail-above", "mean=0.02", "p99=100", "difference.mean=9", code=1)
    page = Page(text)
    means = [f"{model['mean']:.4g}" for model in report["models"]]
    (rows,) = [rows for caption, rows in page.tables if caption == NOT_ALL]
    assert rows[0] == ["limit", "a", "b"]
    assert rows[1] == ["mean at most 0.02", f"{means[0]} passed", f"{means[1]} failed"]
    assert [[cell.split()[-1] for cell in row[1:]] for row in rows[2:]] == [["passed"] * 2] * 2
    text, _ = page_of(*pair, "--fail-below", "agreement=0.1")
    assert "All limits hold." in Page(text).text
    assert "agreement at least 0.1" in Page(text).text


def test_one_model_and_nothing_else(page_of):
    text, report = page_of("p.npy", "a.npy")
    page = agree(text, report)
    assert page.tags["svg"] == 1
    assert "nearest" not in page.text
    for words in ("Limits", "More of the same rows", "Perplexity", "floor", "clip"):
        assert words not in page.text


@pytest.mark.parametrize("direction", ["forward", "reverse", "jeffreys", "jensen_shannon"])
def test_the_method_is_of_this_report(page_of, direction):
    text, _ = page_of("p.npy", "a.npy", "--direction", direction, "--temperature", "2", "--base", "2")
    words = {
        "forward": ("KL divergence from", "of p · log(p / q), in bits"),
        "reverse": ("Reverse KL divergence from", "of q · log(q / p), in bits"),
        "jeffreys": ("Jeffreys divergence from", "KL(p‖q) + KL(q‖p)"),
        "jensen_shannon": ("Jensen-Shannon divergence from", "m = (p + q) / 2"),
    }[direction]
    for word in (*words, "a temperature of 2."):
        assert word in Page(text).text


def test_infinite_and_unknown(page_of):
    text, report = page_of("p.npy", "infinite.npy", "--limit", "1")
    page = agree(text, report)
    assert "infinite: inf nats in the mean." in page.text


def test_files_of_llama(tmp_path):
    x = 3 * torch.randn(3, 15, 40, generator=torch.Generator().manual_seed(0))
    x[..., 0] += 20
    tokens = np.random.default_rng(0).integers(0, 40, (3, 32))
    for name, noise in (("p", 0), ("q", 0.1)):
        write_kld(tmp_path / f"{name}.kld", x + noise * torch.randn(x.shape), tokens, 32)
    run(tmp_path / "p.kld", tmp_path / "q.kld", "--html", tmp_path / "o.html", formats=None)
    text = Page((tmp_path / "o.html").read_text()).text
    for words in ("The files store log-probabilities in steps", "The files clip all classes", "lower bound"):
        assert words in text


HOSTILE = [
    "<script>alert(1)",
    "<img src=x onerror=alert(1)>",
    '"onload="x',
    "a&lt;b",
    "$title",
    "a\nb",
    "#010203",
    "]]>",
]


@pytest.mark.skipif(os.name == "nt", reason="names that Windows does not have")
@pytest.mark.parametrize("name", HOSTILE)
def test_names_of_files_are_text(files, tmp_path, name):
    path = tmp_path / f"{name}.npy"
    shutil.copy(files / "a.npy", path)
    sized = ("--size", f"{name}=4", "--html", tmp_path / "o.html")
    run(path, path, *sized, "--groups", files / "groups.txt", "--worst", 1)
    text = (tmp_path / "o.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.faults == []
    assert [row for _, rows in page.tables for row in rows if row == ["", printable(name)]]
    assert f"from {printable(path.name)}" in "".join(page.texts)
    assert "<b>" not in text, "the name of a group"
    assert html.escape(printable(name)) in text


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="names that are no text")
def test_a_name_that_is_no_text(files, tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.npy")
    shutil.copy(files / "a.npy", path)
    command = [sys.executable, "-m", "klmetric", "compare", path, path, "--input-format", "logits", "--html", "o.html"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = Page((tmp_path / "o.html").read_text(encoding="utf-8"))
    assert page.faults == []
    assert r"KL divergence from \udcff.npy" in page.text


# --- In a browser


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Starts a browser with arguments, and gives what it prints."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("no browser")
    profile = tmp_path_factory.mktemp("browser")
    always = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]

    def start(*arguments):
        done = subprocess.run([program, *always, *map(str, arguments)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return start


@pytest.fixture
def shown(browser, tmp_path, page_of):
    """The picture of a page, so many pixels wide, in light or dark."""
    text, _ = page_of(*EVERYTHING, "--fail-above", "mean=9")

    @functools.cache
    def pixels(width, scheme, change=str):
        # In a frame, because windows have a least width.
        (tmp_path / "page.html").write_text(change(text), encoding="utf-8")
        frame = (
            f'<body style="margin:0"><iframe src="page.html" style="border:0;width:{width}px;height:2000px"></iframe>'
        )
        (tmp_path / "frame.html").write_text(frame)
        picture = tmp_path / "o.png"
        browser(f"--window-size={max(width, 600)},2000", f"--blink-settings=preferredColorScheme={scheme}",
                f"--screenshot={picture}", (tmp_path / "frame.html").as_uri())  # fmt: skip
        return image.imread(picture)[:, :width, :3]

    return pixels


LIGHT, DARK = 1, 0


@pytest.mark.slow
class TestBrowser:
    def test_it_reads_what_was_written(self, browser, page_of, tmp_path):
        text, report = page_of(*EVERYTHING)
        read = browser("--dump-dom", (tmp_path / "o.html").as_uri())
        assert read.count("<svg") == 2
        assert Page(read).tags == Page(text).tags, "nothing was mended, and nothing left out"
        assert Page(read).tables == Page(text).tables
        agree(read, report)

    @pytest.mark.parametrize("width", [320, 390, 1200])
    def test_it_is_no_wider_than_the_window(self, shown, width):
        pixels = shown(width, LIGHT)
        paper = pixels[0, 0]
        margin = pixels[:, -8:]
        assert (margin == paper).all()
        assert (pixels != paper).any(-1).mean() > 0.02, "something is there"
        wide = shown(width, LIGHT, lambda text: text.replace("overflow-x: auto", "").replace("anywhere", "normal"))
        if width < 600:
            assert not (wide[:, -8:] == paper).all(), "this can fail"

    def test_dark(self, shown):
        light, dark = (shown(1200, scheme) for scheme in (LIGHT, DARK))
        assert light[0, 0].tolist() == [1, 1, 1]
        assert dark[0, 0].mean() < 0.15
        for pixels, ink in ((light, 0.0), (dark, 1.0)):
            # Text, in pictures too, is of the other end.
            assert (abs(pixels.mean(-1) - ink) < 0.2).mean() > 0.002
        assert np.median(dark.mean(-1)) < 0.15
