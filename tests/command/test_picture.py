"""The pictures of `klmetric compare`: what they show is what the report says, and can be read."""

import csv
import io
import itertools
import json
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from command import report_of, run

from klmetric.command.against_size import draw_against_size, unbeaten
from klmetric.command.names_in_picture import LINE, without_common
from klmetric.command.picture import SIZE, SIZE_OF_PART, as_file, as_part, lines_of, printable, ticks


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model in fewer and fewer bits, and runs of it that are odd in other ways."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 8, 30))
    several = {f"Q{bits}": x + 2.0**-bits * rng.normal(size=x.shape) for bits in range(1, 9)}
    infinite, none = x.copy(), np.full_like(x, np.nan)
    infinite[0, 0, 0] = -np.inf
    for name, data in {"p": x, **several, "again": x + 1e-4, "infinite": infinite, "none": none}.items():
        np.save(folder / f"{name}.npy", data)
    np.save(folder / "same.npy", x)
    return folder


class TestSizes:
    def sized(self, files, *sizes, code=0, models=("Q4", "Q8")):
        options = [option for size in sizes for option in ("--size", size)]
        return run(files / "p.npy", *(files / f"{name}.npy" for name in models), *options, "--json", "-", code=code)

    def test_they_stand_in_the_report(self, files, tmp_path):
        report = json.loads(self.sized(files, "Q4=4.5GiB", "Q8=8.25").stdout)
        assert report["size_unit"] == "GiB"
        assert {model["name"]: model["size"] for model in report["models"]} == {"Q4": 4.5, "Q8": 8.25}
        assert all("p10" in model for model in report["models"]), "where the band begins"
        pair = files / "p.npy", files / "Q4.npy"
        arguments = (*pair, "--size", "Q4=4.5 BPW", "--floor", files / "again.npy")
        assert report_of(*arguments)["size_unit"] == "bpw"
        assert re.search(r"size \(bpw\) +│ +4.5 │ +│", run(*arguments, "--csv", tmp_path / "o.csv").stdout)
        lines = list(csv.DictReader(io.StringIO((tmp_path / "o.csv").read_text())))
        assert [line["size"] for line in lines] == ["4.5", ""]
        without = report_of(*pair)
        assert "size_unit" not in without
        assert not {"size", "p10"} & without["models"][0].keys()

    @pytest.mark.parametrize(
        ("sizes", "told"),
        [
            (["Q4"], "--size must be a name and a number above 0, in GiB or bpw (bits a weight), as int8=7.6GiB or"),
            (["Q4=-1"], "Got 'Q4=-1'."),
            (["Q4=0"], "Got 'Q4=0'."),
            (["Q4=nan"], "Got 'Q4=nan'."),
            (["Q4=" + "9" * 400], "as int8=7.6GiB or int8=4.5bpw. Got 'Q4=999"),
            (["Q4=4GB"], "Got 'Q4=4GB'."),
            (["=4"], "Got '=4'."),
            (["Q5=4", "Q8=8"], "--size must name a model as the report does: Q4, Q8. Got 'Q5'."),
            (["Q4=4", "Q4=5"], "--size must be given once for each model. Got two for Q4. Leave one out."),
            (["Q4=4"], "--size must be given for every model, or for none. Got none for Q8. Add --size Q8=..."),
            (["Q4=4", "Q8=8bpw"], "--size must have one unit for all models. Got Q4=4 and Q8=8bpw."),
        ],
    )
    def test_what_is_none(self, files, sizes, told):
        assert told in self.sized(files, *sizes, code=2).stderr

    def test_the_floor_has_none(self, files):
        arguments = (files / "p.npy", files / "Q4.npy", "--floor", files / "again.npy", "--size", "Q4=1")
        told = run(*arguments, "--size", "again=1", code=2).stderr
        assert "--size must name a model as the report does: Q4. Got 'again'." in told

    def test_a_name_with_an_equals_sign(self, files, tmp_path):
        np.save(tmp_path / "a=1.npy", np.load(files / "p.npy"))
        report = report_of(files / "p.npy", tmp_path / "a=1.npy", "--size", "a=1=2bpw")
        assert report["models"][0]["size"] == 2


def test_unbeaten():
    """Held against its definition, on small numbers, so that many are equal."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        models = [{"size": float(a), "mean": float(b)} for a, b in rng.integers(0, 4, (6, 2))]
        models.append({"size": 0.5, "mean": math.inf})
        expected = [
            m
            for m in models
            if m["mean"] < math.inf
            and not any(
                (o["size"] < m["size"] and o["mean"] <= m["mean"]) or (o["size"] <= m["size"] and o["mean"] < m["mean"])
                for o in models
            )
        ]
        found = unbeaten(models)
        assert sorted(map(id, found)) == sorted(map(id, expected))
        assert [m["size"] for m in found] == sorted(m["size"] for m in found)


def model_of(name, size, mean, **values):
    spread = {"p10": mean / 10, "p50": mean / 2, "p90": mean * 2, "p99_9": mean * 20}
    return {"name": name, "size": size, "mean": mean, "stderr": mean / 50, "low": mean * 0.96, "high": mean * 1.04} | (
        spread | values
    )


def report_with(*models, **more):
    return {
        "reference": "/somewhere/full.npy",
        "options": {"direction": "forward"},
        "unit": "nats",
        "size_unit": "GiB",
        "models": list(models),
        **more,
    }


@pytest.fixture
def drawn():
    """Draws, and gives the axis."""
    from matplotlib import pyplot

    figures = []

    def draw(report, size=SIZE):
        figure, axis = pyplot.subplots(figsize=size, layout="constrained")
        figures.append(figure)
        draw_against_size(axis, report)
        return axis

    yield draw
    for figure in figures:
        pyplot.close(figure)


LONG = "Meta-Llama-3.1-8B-Instruct-abliterated-{}-imatrix"
CROWDS = {
    "short": [f"Q{k}_K" for k in range(9)],
    "long": [LONG.format(f"Q{k}_K_M") for k in range(9)],
    "long and unlike": [f"{k}{'-with-words' * 3}" for k in range(5)],
    "one": ["int8"],
}


class TestAgainstSize:
    @pytest.mark.parametrize("size", [SIZE, SIZE_OF_PART], ids=["file", "page"])
    @pytest.mark.parametrize("names", CROWDS.values(), ids=CROWDS)
    def test_names_lie_over_nothing(self, drawn, names, size):
        models = [model_of(name, 2 + k**1.3 / 2, 0.3 / 3**k) for k, name in enumerate(names)]
        ax = drawn(report_with(*models), size)
        boxes = [text.get_window_extent() for text in ax.texts]
        assert len(boxes) == len(names)
        for a, b in itertools.combinations(boxes, 2):
            assert not a.overlaps(b)
        frame = ax.get_window_extent()
        for box in boxes:
            assert frame.x0 <= box.x0 < box.x1 <= frame.x1
            assert frame.y0 <= box.y0 < box.y1 <= frame.y1
            for model in models:
                x, low = ax.transData.transform((model["size"], model["p10"]))
                _, high = ax.transData.transform((model["size"], model["p99_9"]))
                assert not (box.x0 < x < box.x1 and box.y0 < high and low < box.y1), "a bar"

    def test_names_of_models_that_are_nearly_the_same(self, drawn):
        ax = drawn(report_with(*(model_of(f"model {k}", 4 + k / 100, 0.1 + k / 1000) for k in range(6))), SIZE_OF_PART)
        for a, b in itertools.combinations([text.get_window_extent() for text in ax.texts], 2):
            assert not a.overlaps(b)
        ax = drawn(report_with(*(model_of(f"model {k}", 4, 0.1) for k in range(6))), SIZE_OF_PART)
        for a, b in itertools.combinations([text.get_window_extent() for text in ax.texts], 2):
            assert not a.overlaps(b)

    def test_it_shows_what_the_report_says(self, drawn):
        models = [model_of("a", 2.0, 0.3), model_of("b", 3.0, 0.4), model_of("c", 4.0, 0.1)]
        floor = model_of("again", None, 1e-3)
        ax = drawn(report_with(*models, floor=floor))
        assert ax.get_title() == "KL divergence from full.npy"
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("size (GiB)", "divergence of a row (nats)")
        points = {(line.get_marker(), *xy) for line in ax.lines for xy in line.get_xydata().tolist() if len(xy) == 2}
        for model in models:
            for marker, key in (("o", "mean"), ("_", "p50"), ("v", "p99_9")):
                assert (marker, model["size"], model[key]) in points
        line = next(line for line in ax.lines if line.get_linestyle() == "-" and len(line.get_xdata()) > 1)
        assert line.get_xydata().tolist() == [[2.0, 0.3], [4.0, 0.1]], "b is beaten by a"
        faces = {
            line.get_ydata()[0]: line.get_markerfacecolor()
            for line in ax.lines
            if line.get_marker() == "o" and len(line.get_ydata())
        }
        assert [faces[mean] == "none" for mean in (0.3, 0.4, 0.1)] == [False, True, False]
        dashed = [line for line in ax.lines if line.get_linestyle() == "--"]
        assert [list(line.get_ydata()) for line in dashed] == [[1e-3, 1e-3]]
        (band,) = ax.patches
        assert sorted({round(y, 12) for _, y in band.get_corners()}) == [floor["p10"], floor["p90"]]

    def test_zero_infinity_and_what_is_not_known(self, drawn):
        zero = model_of("same", 8.0, 0.0)
        infinite = model_of("infinite", 5.0, math.inf, p10=0.0, p50=1e-3, p90=1e-2, stderr=math.nan, low=math.nan,
                            high=math.nan)  # fmt: skip
        ax = drawn(report_with(model_of("int8", 4.0, 1e-3), zero, infinite, model_of("none", 6.0, math.nan)))
        labels = {text.get_text(): y for text, y in zip(ax.get_yticklabels(), ax.get_yticks(), strict=True)}
        means = {
            line.get_xdata()[0]: line.get_ydata()[0]
            for line in ax.lines
            if line.get_marker() == "o" and len(line.get_xdata())
        }
        assert means == {4.0: 1e-3, 8.0: labels["0"], 5.0: labels["∞"]}
        others = [y for label, y in labels.items() if label not in "0∞"]
        assert labels["0"] < min(others) <= max(others) < labels["∞"]
        assert ax.get_xlabel() == "size (GiB)\nnot known, and not drawn: none"
        assert {text.get_text() for text in ax.texts} == {"int8", "same", "infinite"}

    def test_nothing_but_zeros(self, drawn):
        ax = drawn(report_with(model_of("same", 8.0, 0.0)))
        assert [text.get_text() for text in ax.get_yticklabels()] == ["0"]

    @pytest.mark.parametrize("scale", [1e-320, 1e-300, 1e300, 1e307])
    def test_numbers_at_the_end_of_what_there_is(self, drawn, scale):
        ax = drawn(report_with(model_of("a", 1.0, scale), model_of("b", 2.0, 2 * scale)))
        assert all(map(math.isfinite, ax.get_ylim()))


def test_the_command_draws_all(files, tmp_path):
    """Models, the floor, and whatever a divergence may be; both pictures, of every kind."""
    models = ["Q4", "same", "infinite", "none"]
    paths = [files / f"{name}.npy" for name in ("p", *models)]
    arguments = [*paths, "--floor", files / "again.npy", "--nan-strategy", "ignore"]
    sizes = [x for k, name in enumerate(models) for x in ("--size", f"{name}={k + 1}")]
    begins = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
    for kind, begin in begins.items():
        for options in ([], sizes):
            run(*arguments, *options, "--plot", tmp_path / f"o.{kind}")
            assert (tmp_path / f"o.{kind}").read_bytes().startswith(begin)
    page = tmp_path / "o.html"
    run(*arguments, *sizes, "--html", page)
    pictures = [" ".join(re.sub("<[^>]+>", " ", part).split()) for part in page.read_text().split("<svg")[1:]]
    against_size, distributions = (part.partition("<figcaption>")[0] for part in pictures)
    for picture in (against_size, distributions):
        assert "KL divergence from p.npy" in picture
    assert "floor: again" in against_size
    assert "floor (again): mean = " in distributions
    assert "same: mean = 0; 100 % are 0" in distributions
    assert "infinite: mean = inf; 99.4 % are 0; 0.625 % are infinite" in distributions


class TestNames:
    def test_what_all_have_in_common(self):
        assert without_common([LONG.format("Q4_0"), LONG.format("Q4_K")]) == ["…Q4_0…", "…Q4_K…"]
        assert without_common([LONG.format("Q4_0"), LONG.format("Q8_0")]) == ["…Q4_0…", "…Q8_0…"]
        assert without_common(["a-Q4", "a-Q8"]) == ["a-Q4", "a-Q8"], "short"
        assert without_common([LONG] * 2) == [LONG] * 2
        long = "a" * LINE
        assert without_common([f"{long}-", f"{long}-b"]) == [f"{long}-", f"{long}-b"], "nothing would be left"
        assert without_common([long, f"{long}-b"]) == [long, f"{long}-b"], "no whole word"

    @pytest.mark.parametrize(
        "text", ["short", "some-words-that_are.many", "a" * 50, "a" * 500, "", "- - -", "é–—ü" * 9]
    )
    def test_lines(self, text):
        lines = lines_of(text, 20).split("\n")
        assert all(len(line) <= 20 for line in lines)
        if len(text) <= 80:
            assert "".join(lines) == text
        else:
            assert "".join(lines) == f"{text[:39]}…{text[-40:]}"

    def test_ticks(self):
        assert ticks(5e-8, 20) == ([1e-7, 1e-5, 1e-3, 1e-1, 10], ["10⁻⁷", "10⁻⁵", "10⁻³", "0.1", "10"])
        assert ticks(0.03, 0.3) == ([0.05, 0.1, 0.2], ["0.05", "0.1", "0.2"])
        assert ticks(2.1, 4.9)[1] == ["2.286", "3.208", "4.502"]

    @pytest.mark.parametrize("name", ["$x^{$", "_u", "a\nb", "\udcff", "\x01", "<b>&amp;", "模型", "\u202eabc", "🙂"])
    def test_any_name_of_a_file_can_be_drawn(self, name):
        name = printable(name)
        report = report_with(model_of(name, 1.0, 0.1), model_of("b", 2.0, 0.2))
        assert as_file(lambda ax: draw_against_size(ax, report), ".png").startswith(b"\x89PNG")
        part = as_part(lambda ax: draw_against_size(ax, report), "one", "A title", name)
        texts = [element.text for element in ElementTree.fromstring(part).iter("text")]
        assert name.strip() in [text.strip() for text in texts if text]
