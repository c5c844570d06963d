"""What `klmetric compare --worst` says of the worst rows, against plain float64 numpy."""

import csv
import io
import json
import re
import signal
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import torch
from command import record, report_of, run
from kld import write_kld
from language import normalised
from processes import forked
from trained import text

from klmetric.command import compare, worst

SAMPLES, POSITIONS, CLASSES = 60, 24, 100
# As a vocabulary has them, and as they are read.
PIECES = ["Ġ", *(f"Ġw{k}" for k in range(1, CLASSES - 3)), "|`<b>*_", "Ċ", "ÃŁ"]
TEXTS = [" ", *(f" w{k}" for k in range(1, CLASSES - 3)), "|`<b>*_", "\n", "ß"]


@pytest.fixture(scope="module")
def logits():
    data = {name: x.numpy() for name, x in text().items()}
    noise = torch.randn(text()["full"].shape, generator=torch.Generator().manual_seed(0)).numpy()
    return {**data, "noisy": data["full"] + np.float32(0.5) * noise}


@pytest.fixture(scope="module")
def targets():
    return np.random.default_rng(0).integers(0, CLASSES, (SAMPLES, POSITIONS))


@pytest.fixture(scope="module")
def folder(logits, targets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("worst")
    for name, x in logits.items():
        np.save(folder / f"{name}.npy", x)
    np.save(folder / "targets.npy", targets)
    (folder / "vocab.json").write_text(json.dumps({piece: k for k, piece in enumerate(PIECES)}))
    return folder


def agree(row, p, q, target=None, rel=1e-5):
    """What is said of a row, from the log-probabilities of both, shape (classes,)."""
    assert row["kl"] == pytest.approx((np.exp(p) * (p - q)).sum(), rel=1e-5)
    for name, x in (("reference", p), ("model", q)):
        order = np.argsort(-x, kind="stable")[:5]
        assert [one["class"] for one in row[name]] == order.tolist()
        assert [one["probability"] for one in row[name]] == pytest.approx(np.exp(x[order]), rel=rel)
    assert ("target" in row) == (target is not None)
    if target is not None:
        assert row["target"]["class"] == target
        found = [row["target"][name] for name in ("reference", "model")]
        assert found == pytest.approx([np.exp(p[target]), np.exp(q[target])], rel=rel)


def check(model, p, q, targets=None):
    """All worst rows of a model, from logits of (samples, positions, classes)."""
    p, q = (normalised(x.astype(np.float64)) for x in (p, q))
    order = np.argsort(-(np.exp(p) * (p - q)).sum(-1).ravel(), kind="stable")
    places = [divmod(int(row), p.shape[1]) for row in order[: len(model["worst"])]]
    assert [(row["sample"], row.get("position", 0)) for row in model["worst"]] == places
    for row, place in zip(model["worst"], places, strict=True):
        agree(row, p[place], q[place], None if targets is None else targets[place])


class TestRows:
    def test_of_several_models(self, folder, logits, targets):
        arguments = [folder / f"{name}.npy" for name in ("full", "noisy", "int8")]
        report = report_of(*arguments, "--targets", folder / "targets.npy", "--worst", 4)
        for model in report["models"]:
            assert len(model["worst"]) == 4
            check(model, logits["full"], logits[model["name"]], targets)
            assert "before" not in model["worst"][0]
            assert "text" not in model["worst"][0]["target"]

    def test_without_targets(self, folder, logits):
        report = report_of(folder / "full.npy", folder / "noisy.npy", "--worst", 3)
        check(report["models"][0], logits["full"], logits["noisy"])

    def test_the_floor(self, folder, logits):
        arguments = (folder / "full.npy", folder / "noisy.npy", "--floor", folder / "int8.npy")
        check(report_of(*arguments, "--worst", 2)["floor"], logits["full"], logits["int8"])

    def test_formats_and_temperature(self, folder, logits, targets, tmp_path):
        p, q = (normalised(logits[name].astype(np.float64)) for name in ("full", "noisy"))
        np.save(tmp_path / "p.npy", np.exp(p))
        np.save(tmp_path / "q.npy", q)
        arguments = (tmp_path / "p.npy", tmp_path / "q.npy", "--temperature", 2, "--worst", 3)
        report = report_of(*arguments, "--targets", folder / "targets.npy", formats="probs,log_probs")
        check(report["models"][0], logits["full"] / 2, logits["noisy"] / 2, targets)

    def test_fewer_classes(self, folder, logits):
        report = report_of(folder / "full.npy", folder / "noisy.npy", "--classes", 3, "--worst", 2)
        check_some = {name: x[..., :3] for name, x in logits.items()}
        p, q = (normalised(check_some[name].astype(np.float64)) for name in ("full", "noisy"))
        row = report["models"][0]["worst"][0]
        place = row["sample"], row["position"]
        for name, x in (("reference", p[place]), ("model", q[place])):
            assert [one["class"] for one in row[name]] == np.argsort(-x).tolist()
            assert [one["probability"] for one in row[name]] == pytest.approx(np.sort(np.exp(x))[::-1], rel=1e-5)

    def test_classes_without_a_chance_are_not_likely(self, tmp_path):
        np.save(tmp_path / "p.npy", np.array([[0.5, 0.5, 0.0], [0.25, 0.75, 0.0]]))
        np.save(tmp_path / "q.npy", np.array([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]]))
        done = report_of(tmp_path / "p.npy", tmp_path / "q.npy", "--worst", 2, formats="probs")
        first, second = done["models"][0]["worst"]
        assert first["kl"] == "Infinity"
        assert [one["class"] for one in first["reference"]] == [0, 1], "of equal ones the first comes first"
        assert first["model"] == [{"class": 1, "probability": 1.0}]
        assert [one["class"] for one in second["reference"]] == [1, 0]

    def test_documents_of_different_lengths(self, logits, targets, tmp_path):
        lengths = np.random.default_rng(0).integers(1, POSITIONS, SAMPLES)
        for name in ("full", "noisy"):
            np.savez(tmp_path / f"{name}.npz", **{f"doc{k}": logits[name][k, :n] for k, n in enumerate(lengths)})
        np.save(tmp_path / "t.npy", np.concatenate([targets[k, :n] for k, n in enumerate(lengths)]))
        arguments = (tmp_path / "full.npz", tmp_path / "noisy.npz", "--key", "doc*", "--documents", "--worst", 5)
        rows = report_of(*arguments, "--targets", tmp_path / "t.npy")["models"][0]["worst"]
        p, q = (normalised(logits[name].astype(np.float64)) for name in ("full", "noisy"))
        kl = np.where(np.arange(POSITIONS) < lengths[:, None], (np.exp(p) * (p - q)).sum(-1), 0)
        for row, number in zip(rows, np.argsort(-kl.ravel())[:5], strict=True):
            place = divmod(int(number), POSITIONS)
            assert (row["sample"], row["position"]) == place
            agree(row, p[place], q[place], targets[place])

    @pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet", ".npz"])
    def test_files_that_are_read_in_order(self, logits, targets, tmp_path, suffix):
        names = [f"p_{k}" for k in range(CLASSES)]
        for name in ("full", "noisy", "int8"):
            x, path = logits[name][:, 0].astype(np.float64), tmp_path / f"{name}{suffix}"
            table = pa.table({"row": np.arange(SAMPLES), **dict(zip(names, x.T, strict=True))})
            if suffix == ".npz":
                np.savez_compressed(path, x)
            elif suffix == ".parquet":
                pq.write_table(table, path, row_group_size=7)
            else:
                with pa.output_stream(path, compression="gzip" if suffix == ".csv.gz" else None) as stream:
                    pa_csv.write_csv(table, stream)
        paths = [tmp_path / f"{name}{suffix}" for name in ("full", "noisy", "int8")]
        aligned = [[]] if suffix == ".npz" else [["--columns", "p_*"], ["--columns", "p_*", "--id", "row"]]
        for options in aligned:
            for model in report_of(*paths, *options, "--worst", 6)["models"]:
                check(model, logits["full"][:, :1], logits[model["name"].partition(".")[0]][:, :1])

    def test_files_of_llama_cpp(self, logits, tmp_path):
        """A target that was clipped counts with the largest probability that it can have."""
        context = 2 * POSITIONS + 2
        tokens = np.random.default_rng(1).integers(0, CLASSES, (SAMPLES, context))
        held = {}
        for name in ("full", "noisy"):
            x = torch.from_numpy(3 * logits[name])  # so sure that much is clipped
            held[name] = write_kld(tmp_path / f"{name}.kld", x, tokens, context).double().numpy()
        arguments = (tmp_path / "full.kld", tmp_path / "noisy.kld", "--worst", 20)
        rows = report_of(*arguments, formats=None)["models"][0]["worst"]
        clipped = 0
        for row in rows:
            place = row["sample"], row["position"]
            target = tokens[row["sample"], context - POSITIONS + row["position"]]
            assert row["target"]["class"] == target
            for name, x in (("reference", held["full"][place]), ("model", held["noisy"][place])):
                assert row["target"][name] == pytest.approx(np.exp(x[target]), rel=1e-5)
                clipped += x[target] == x.min()
                order = [one["class"] for one in row[name]]
                assert order == np.argsort(-x, kind="stable")[: len(order)].tolist()
                assert [one["probability"] for one in row[name]] == pytest.approx(np.exp(x[order]), rel=1e-5)
                assert len(order) == min(5, (x > x.min()).sum())
        assert clipped > 2

    def test_infinite_and_invalid_rows(self, folder, logits, tmp_path):
        q = logits["int8"].copy()
        q[3, 4, 5], q[6, 7, 8] = -np.inf, np.nan
        np.save(tmp_path / "q.npy", q)
        arguments = (folder / "full.npy", tmp_path / "q.npy", "--nan-strategy", "ignore", "--worst", 2)
        first, second = report_of(*arguments)["models"][0]["worst"]
        assert (first["kl"], first["sample"], first["position"]) == ("Infinity", 3, 4)
        assert (second["sample"], second["position"]) != (6, 7)

    def test_more_than_there_are(self, tmp_path):
        x = np.random.default_rng(0).normal(size=(3, 4))
        np.save(tmp_path / "p.npy", x)
        np.save(tmp_path / "q.npy", x[::-1])
        np.save(tmp_path / "mask.npy", np.array([1, 0, 1]))
        arguments = (tmp_path / "p.npy", tmp_path / "q.npy", "--mask", tmp_path / "mask.npy")
        rows = report_of(*arguments, "--worst", 9)["models"][0]["worst"]
        assert sorted(row["sample"] for row in rows) == [0, 2]
        assert all(len(row["model"]) == 4 for row in rows)


class TestText:
    def arguments(self, folder, *options):
        files = (folder / "full.npy", folder / "noisy.npy", "--targets", folder / "targets.npy")
        return *files, "--worst", 3, "--vocab", folder / "vocab.json", *options

    def test_of_classes(self, folder, targets):
        rows = report_of(*self.arguments(folder, "--worst", 40))["models"][0]["worst"]
        assert {0 < row["position"] < 8 for row in rows} == {True, False}
        for row in rows:
            for one in (row["target"], *row["reference"], *row["model"]):
                assert one["text"] == TEXTS[one["class"]]
            before = targets[row["sample"], max(0, row["position"] - 8) : row["position"]]
            assert row.get("before", "") == "".join(TEXTS[k] for k in before)

    def test_of_none_that_is_not_known(self, folder, tmp_path):
        (tmp_path / "vocab.txt").write_text("\n".join(TEXTS[:3]))
        arguments = (folder / "full.npy", folder / "noisy.npy", "--worst", 1, "--vocab", tmp_path / "vocab.txt")
        row = report_of(*arguments, "--targets", folder / "targets.npy")["models"][0]["worst"][0]
        assert all(("text" in one) == (one["class"] < 3) for one in (row["target"], *row["model"]))
        assert "before" not in row

    def test_the_table(self, folder, monkeypatch):
        monkeypatch.setenv("COLUMNS", "160")
        report = report_of(*self.arguments(folder))
        shown = run(*self.arguments(folder)).stdout
        table = shown.partition("Worst rows of noisy")[2]
        cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if line[:1] == "│"]
        assert len(cells) == 3 * 5
        for k, row in enumerate(report["models"][0]["worst"]):
            lines = cells[5 * k : 5 * k + 5]
            assert lines[0][:3] == [str(row["sample"]), str(row["position"]), f"{row['kl']:.4g}"]
            target = row["target"]
            assert [line[4] for line in lines[:3]] == [
                repr(target["text"]),
                *(f"{letter} {share(target[name])}" for letter, name in zip("pq", ("reference", "model"), strict=True)),
            ]
            for column, name in ((5, "reference"), (6, "model")):
                likely = [f"{one['text']!r}  {share(one['probability'])}" for one in row[name]]
                assert [line[column] for line in lines] == likely

    @pytest.mark.parametrize("width", [60, 80, 100])
    def test_in_a_narrow_terminal(self, folder, monkeypatch, width):
        monkeypatch.setenv("COLUMNS", str(width))
        report = report_of(*self.arguments(folder))
        shown = run(*self.arguments(folder)).stdout
        assert max(map(len, shown.splitlines())) <= width
        for row in report["models"][0]["worst"]:
            for one in (*row["reference"], *row["model"]):
                assert f"{one['text']!r}  {share(one['probability'])}" in shown
        assert "┃ sample " in shown.partition("Worst rows")[2]

    def test_in_markdown(self, folder, tmp_path):
        x = np.zeros((2, CLASSES))
        x[0, 97], x[1, 98] = 9, 3
        np.save(tmp_path / "p.npy", x)
        np.save(tmp_path / "q.npy", -x)
        arguments = (tmp_path / "p.npy", tmp_path / "q.npy", "--worst", 1, "--vocab", folder / "vocab.json")
        shown = run(*arguments, "--markdown").stdout
        table = shown.partition("**Worst rows of q**")[2]
        assert r"| 0 | " in table
        assert r"'\|\`\<b>\*\_'  0.9879<br>' '" in table
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines() if line[:1] == "|"}) == 1

    def test_csv_has_no_rows(self, folder):
        lines = list(csv.DictReader(io.StringIO(run(*self.arguments(folder, "--csv", "-")).stdout)))
        assert len(lines) == 1
        assert "worst" not in lines[0]

    def test_errors(self, folder, tmp_path):
        pair = (folder / "full.npy", folder / "noisy.npy")
        done = run(*pair, "--vocab", folder / "vocab.json", code=2)
        assert "--vocab is the text of the classes of the worst rows. Got it without --worst." in done.stderr
        done = run(*pair, "--worst", 1, "--vocab", tmp_path / "no.json", code=2)
        assert f"--vocab: {tmp_path}/no.json does not exist." in done.stderr.replace("\n", "")
        done = run(*pair, "--worst", 1, "--vocab", tmp_path, code=2)
        assert "--vocab must name a file, or a folder with tokenizer.json" in done.stderr.replace("\n", " ")


def share(probability):
    return f"{probability:.4f}" if probability >= 1e-4 else f"{probability:.4g}"


def report_of_rank(rank, size, arguments, path):
    done = run(*arguments, "--json", path)
    return done.stdout


def test_the_same_from_several_processes(folder, tmp_path, two_processes):
    arguments = [*(folder / f"{name}.npy" for name in ("full", "noisy", "int8")), "--worst", 5]
    arguments += ["--targets", folder / "targets.npy", "--vocab", folder / "vocab.json"]
    report_of_rank(0, 1, arguments, tmp_path / "1.json")
    shown, nothing = two_processes(report_of_rank, arguments, tmp_path / "2.json")
    assert "Worst rows of noisy" in shown
    assert nothing == ""
    assert (tmp_path / "1.json").read_text() == (tmp_path / "2.json").read_text()


def test_a_recording(tmp_path):
    """Its logits are made as they are read; the folder of its model has the text of the tokens."""
    language_models = pytest.importorskip("language_models")
    (tmp_path / "text.txt").write_text(language_models.text()[:6_000], encoding="utf-8")
    language_models.save(tmp_path / "model", language_models.trained())
    for name, options in (("full", ()), ("int8", ("--quantize", "int8"))):
        record(tmp_path / "model", tmp_path / "text.txt", tmp_path / name, *options)
        record(tmp_path / "model", tmp_path / "text.txt", tmp_path / f"logits_{name}", "--logits", *options)
    options = ("--worst", 3, "--vocab", tmp_path / "model", "--rows", tmp_path / "rows.parquet")
    rows = report_of(tmp_path / "full", tmp_path / "int8", *options, formats=None)["models"][0]["worst"]
    theirs = report_of(tmp_path / "logits_full", tmp_path / "logits_int8", *options[:4], formats=None)
    kept = pq.read_table(tmp_path / "rows.parquet").sort_by([("kl", "descending")]).slice(0, 3).to_pylist()
    for row, expected, written in zip(rows, theirs["models"][0]["worst"], kept, strict=True):
        for key in ("sample", "position", "before"):
            assert row.get(key) == expected.get(key)
        for one, other in zip(row["model"], expected["model"], strict=True):
            assert one == {**other, "probability": pytest.approx(other["probability"], rel=1e-4)}
        assert [written[key] for key in ("sample", "position")] == [row["sample"], row["position"]]
        assert written["target"] == row["target"]["class"]
        assert np.exp(written["log_q"]) == pytest.approx(row["target"]["model"], rel=1e-5)
    assert any(row.get("before", "") + row["target"]["text"] in language_models.text() for row in rows)


class TestHowItEnds:
    def test_files_that_cannot_be_read_again(self, folder, monkeypatch):
        """What was measured is shown all the same."""

        def fails(*_):
            raise compare.InputError("full.npy cannot be read.")

        monkeypatch.setattr(worst, "side_of", fails)
        done = run(folder / "full.npy", folder / "noisy.npy", "--worst", 2, code=2)
        assert "p99.9" in done.stdout
        assert "Worst rows of noisy" in done.stdout
        assert "Error: full.npy cannot be read." in done.stderr

    @pytest.mark.slow
    def test_ctrl_c_while_they_are_read_again(self, folder, tmp_path):
        arguments = ["compare", folder / "full.npy", folder / "noisy.npy", "--worst", "3", "--input-format", "logits"]
        done = forked(*arguments, "--json", "o.json", cwd=tmp_path, first=partial(interrupt_row, 2))
        assert done.returncode == 0
        assert done.stderr == "Interrupted: not all of the worst rows have been read again.\n"
        rows = json.loads((tmp_path / "o.json").read_text())["models"][0]["worst"]
        assert sorted("reference" in row for row in rows) == [False, False, True]
        assert "Worst rows of noisy" in done.stdout


def interrupt_row(number):
    """Send SIGINT to this process as the row is read again that has this number among them."""
    left, said = number, worst._said_of

    def interrupted(*arguments):
        nonlocal left
        left -= 1
        if left == 0:
            signal.raise_signal(signal.SIGINT)
        return said(*arguments)

    worst._said_of = interrupted
