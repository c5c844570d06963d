"""Tables of predictions: which rows and columns are the classes, in text, parquet, Arrow and datasets."""

import csv
import gzip
import io
import json
import re
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from klmetric.command.cli import app
from klmetric.saved.names import suffix_of
from klmetric.saved.open import TABLES
from klmetric.saved.tables import columns, reading

ROWS, CLASSES = 40, 11
RNG = np.random.default_rng(0)
P = RNG.normal(size=(ROWS, CLASSES))
Q = P + 0.3 * RNG.normal(size=(ROWS, CLASSES))
NAMES = [f"p_{k}" for k in range(CLASSES)]


def mean_kl(p, q, weight=None):
    """In float64, by the definition."""
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    return np.average(kl, weights=weight)


def probs(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def run(*arguments, code=0, formats="logits"):
    done = CliRunner().invoke(app, ["compare", *map(str, arguments), "--input-format", formats])
    assert done.exit_code == code, done.output
    return done


def model_of(*arguments, **options):
    (model,) = json.loads(run(*arguments, "--json", "-", **options).stdout)["models"]
    return model


def measures(value, *arguments, rel=1e-9, **options):
    assert model_of(*arguments, **options)["mean"] == pytest.approx(value, rel=rel, abs=0)


def raises(message, *arguments, **options):
    done = run(*arguments, code=2, **options)
    assert message in done.stderr.replace("\n", " "), done.stderr


def text(path: Path, x, names=None, delimiter=",", decimal=".", number=repr, more=()):
    """A table as text; `more` are columns before the others, of a name and values."""
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    if names is not None:
        writer.writerow([*(name for name, _ in more), *names])
    for i, row in enumerate(x):
        cells = [number(float(value)).replace(".", decimal) for value in row]
        writer.writerow([*(values[i] for _, values in more), *cells])
    content = out.getvalue().encode()
    path.write_bytes(gzip.compress(content) if path.name.lower().endswith(".gz") else content)
    return path


def arrow(path: Path, table, as_stream=False):
    """A file of Arrow, of batches of 7 rows."""
    new = pa.ipc.new_stream if as_stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return path


def lists(x, kind=None):
    """A column of lists, of any depth."""
    return pa.array(x.tolist(), kind or pa.list_(pa.float64()))


@pytest.fixture
def npy(tmp_path):
    for name, x in (("p", P), ("q", Q)):
        np.save(tmp_path / f"{name}.npy", x)
    return tmp_path / "p.npy", tmp_path / "q.npy"


class TestHeader:
    """A first row of numbers was taken for names: a row was lost, and classes were matched by its values."""

    def test_a_first_row_of_numbers_is_data(self, tmp_path):
        p, q = text(tmp_path / "p.csv", P), text(tmp_path / "q.csv", Q)
        measures(mean_kl(P, Q), p, q)
        assert model_of(p, q)["count"] == ROWS

    def test_the_same_numbers_in_another_order(self, tmp_path):
        """The classes were permuted so that the first rows agreed."""
        other = Q.copy()
        other[0] = P[0, ::-1]
        measures(mean_kl(P, other), text(tmp_path / "p.csv", P), text(tmp_path / "q.csv", other))

    @pytest.mark.parametrize(
        "change",
        [
            lambda x: np.round(x * 8),
            lambda x: np.where(np.arange(CLASSES) == 3, -np.inf, x),
            lambda x: x * 1e-9,
            lambda x: np.where(np.arange(CLASSES) < 2, 0.0, x),
        ],
        ids=["whole numbers", "infinities", "exponents", "twice the same"],
    )
    def test_numbers_of_every_kind(self, tmp_path, npy, change):
        p = text(tmp_path / "p.csv", change(P))
        assert model_of(p, p, "--columns", "*")["count"] == ROWS
        p_array = tmp_path / "array.npy"
        np.save(p_array, change(P))
        assert model_of(p, p_array, "--columns", "*")["mean"] == 0

    def test_what_numpy_writes(self, tmp_path):
        for options in ({}, {"delimiter": ","}, {"delimiter": ", "}, {"delimiter": ";", "fmt": "%.17g"}):
            for name, x in (("p", P), ("q", Q)):
                np.savetxt(tmp_path / f"{name}.csv", x, **options)
            measures(mean_kl(P, Q), tmp_path / "p.csv", tmp_path / "q.csv")

    @pytest.mark.slow
    def test_a_long_line(self, tmp_path):
        """Longer than Python's csv allows a cell to be."""
        x = RNG.normal(size=(3, 10_000))
        path = text(tmp_path / "p.csv", x, number="{:.17e}".format)
        y = text(tmp_path / "q.csv", x + 0.1 * (x > 0), number="{:.17e}".format)
        measures(mean_kl(x, x + 0.1 * (x > 0)), path, y)

    @pytest.mark.parametrize("first", [0, 1])
    def test_a_first_row_that_counts_is_a_header(self, tmp_path, npy, first):
        names = range(first, first + CLASSES)
        p, q = text(tmp_path / "p.csv", P, names), text(tmp_path / "q.csv", Q, names)
        measures(mean_kl(P, Q), p, q)
        indexed = text(tmp_path / "indexed.csv", P, names, more=[("", range(ROWS))])
        raises("It must be clear which columns are classes", indexed, q)
        measures(mean_kl(P, Q), indexed, npy[1], "--columns", "?,??")

    def test_with_and_without(self, tmp_path):
        """A header in one of two files."""
        headed, bare = text(tmp_path / "p.csv", P, NAMES), text(tmp_path / "q.csv", Q)
        measures(mean_kl(P, Q), headed, bare)
        measures(mean_kl(Q, P), bare, headed)

    @pytest.mark.parametrize(
        "first",
        [("0", "1"), ("1", "2"), ("2019", "2020"), ("3", "5"), ("0.0", "1.0"), ("id", "0.5"), ("", "7")],
        ids=str,
    )
    def test_what_is_doubtful_is_asked(self, tmp_path, first):
        x = np.column_stack([P[:, 0], P[:, 1]])
        path = tmp_path / "p.csv"
        text(path, x, first)
        raises("It must be clear whether the first row of a table names its columns. Got", path, path)
        raises("Say --header if it names them, --no-header if it is data.", path, path)

    def test_what_is_doubtful_is_decided(self, tmp_path):
        x, y = P[:, :2], Q[:, :2]
        p, q = text(tmp_path / "p.csv", x, ["0", "1"]), text(tmp_path / "q.csv", y, ["0", "1"])
        measures(mean_kl(x, y), p, q, "--header")
        x, y = (np.concatenate([[[0.0, 1.0]], some]) for some in (x, y))
        measures(mean_kl(x, y), p, q, "--no-header")
        assert model_of(p, q, "--no-header")["columns"] == "0, 1 (no header)"

    def test_years_and_words_as_data(self, tmp_path):
        years = [str(2000 + k) for k in range(CLASSES)]
        p, q = text(tmp_path / "p.csv", P, years), text(tmp_path / "q.csv", Q, years)
        raises("It must be clear whether the first row", p, q)
        measures(mean_kl(P, Q), p, q, "--header")
        words = text(tmp_path / "words.csv", P, NAMES)
        raises("It must be clear which columns are classes. Got", words, words, "--no-header")

    def test_an_id_without_a_header(self, tmp_path):
        ids = [f"row {k}" for k in range(ROWS)]
        p = text(tmp_path / "p.csv", P, more=[("", ids)])
        order = RNG.permutation(ROWS)
        q = text(tmp_path / "q.csv", Q[order], more=[("", [ids[k] for k in order])])
        raises("It must be clear whether the first row", p, q)
        measures(mean_kl(P, Q), p, q, "--no-header", "--id", "0")

    def test_shards_without_a_header(self, tmp_path, npy):
        folder = tmp_path / "shards"
        folder.mkdir()
        for k, part in enumerate(np.split(P, 4)):
            text(folder / f"{k}.csv", part)
        measures(mean_kl(P, Q), folder, npy[1])


class TestHeaderBeside:
    """Masks, weights and groups: the number of samples says whether a doubtful first row counts."""

    MASK = np.arange(ROWS) % 3 == 0
    WEIGHT = np.arange(ROWS) % 5

    @pytest.mark.parametrize("first", [0, 1], ids=["begins with 0", "begins with 1"])
    @pytest.mark.parametrize("header", [None, "0", "1", "mask"])
    @pytest.mark.parametrize("flag", [[], ["--no-header"], ["--header"]], ids=str)
    def test_masks(self, tmp_path, npy, first, header, flag):
        mask = self.MASK if first else ~self.MASK
        path = text(tmp_path / "mask.csv", mask[:, None], header and [header], number=lambda x: str(int(x)))
        measures(mean_kl(P[mask], Q[mask]), *npy, "--mask", path, *flag)

    @pytest.mark.parametrize("header", [None, "3", "weight"])
    def test_weights(self, tmp_path, npy, header):
        weight = self.WEIGHT[:, None] + 0.5
        path = text(tmp_path / "weight.tsv", weight, header and [header])
        measures(mean_kl(P, Q, weight[:, 0]), *npy, "--weight", path)

    @pytest.mark.parametrize("header", [None, "0", "group"])
    @pytest.mark.parametrize("labels", [[10, 9], ["a", "b"]], ids=str)
    def test_groups(self, tmp_path, npy, header, labels):
        path = tmp_path / "groups.csv"
        lines = [str(labels[k % 2]) for k in range(ROWS)]
        path.write_text("\n".join([header, *lines] if header else lines) + "\n")
        groups = model_of(*npy, "--groups", path)["groups"]
        assert {name: group["count"] for name, group in groups.items()} == {str(label): 20 for label in labels}
        assert groups[str(labels[0])]["mean"] == pytest.approx(mean_kl(P[::2], Q[::2]), rel=1e-9)

    @pytest.mark.parametrize("suffix", [".csv.gz", ".tsv", ".parquet", ".arrow"])
    def test_damaged_groups(self, tmp_path, npy, suffix):
        path = tmp_path / f"groups{suffix}"
        path.write_bytes(b"\x1f\x8b\x00\x01 no such file " * 20)
        raises(f"{path} cannot be read as {suffix}", *npy, "--groups", path)

    @pytest.mark.parametrize("header", [[], ["kind"]], ids=["no header", "header"])
    @pytest.mark.parametrize("numbers", [False, True], ids=["words", "numbers"])
    @pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
    def test_an_empty_label(self, tmp_path, npy, header, numbers, end):
        """An empty line is a label too, or all that follow would be those of other rows."""
        labels = [("12" if numbers else "ab")[k % 2] for k in range(ROWS)]
        labels[4] = labels[7] = ""
        path = tmp_path / "groups.csv"
        path.write_bytes(end.join([*header, *labels, ""]).encode())
        groups = model_of(*npy, "--groups", path)["groups"]
        assert {name: group["count"] for name, group in groups.items()} == {
            name or "(none)": labels.count(name) for name in sorted(set(labels))
        }
        rest = [k for k in range(ROWS) if labels[k] == labels[0]]
        assert groups[labels[0]]["mean"] == pytest.approx(mean_kl(P[rest], Q[rest]), rel=1e-9)

    def test_an_empty_label_at_the_end(self, tmp_path, npy):
        path = tmp_path / "groups.csv"
        labels = ["a", "b"] * (ROWS // 2 - 1)
        path.write_text("\n".join(["kind", *labels, "a", "", ""]))
        raises("whose first line may be a header, and whose last is empty", *npy, "--groups", path)
        path.write_text("\n".join(["kind", *labels, "a", "b", "", ""]))
        raises("(40,). Got shape (41,)", *npy, "--groups", path)

    def test_a_missing_label_and_one_called_none(self, tmp_path, npy):
        table = pa.table({"kind": [None, "None", "a", "a"] * (ROWS // 4), "year": [None, 2, 3, 3] * (ROWS // 4)})
        for name, counts in (("kind", {"(none)": 10, "None": 10, "a": 20}), ("year", {"(none)": 10, "2": 10, "3": 20})):
            path = arrow(tmp_path / "groups.arrow", table.select([name]))
            groups = model_of(*npy, "--groups", path)["groups"]
            if name == "year":  # whole numbers beside nulls may be read as floats
                groups = {key.removesuffix(".0"): group for key, group in groups.items()}
            assert {key: group["count"] for key, group in groups.items()} == counts

    @pytest.mark.parametrize("first", ["3", "0.5", "weight"])
    def test_an_empty_weight(self, tmp_path, npy, first):
        path = tmp_path / "weight.csv"
        path.write_text("\n".join([first, "0.5", "", *["0.5"] * (ROWS - 2)]) + "\n")
        raises("--weight", *npy, "--weight", path)
        path.write_text("\n".join(["mask", "1", "", *["1"] * (ROWS - 2)]) + "\n")
        raises("--mask must be 0 or 1. Got nan", *npy, "--mask", path)

    @pytest.mark.parametrize("suffix", [".csv", ".parquet"])
    def test_weights_beside_ids(self, tmp_path, suffix):
        """Ids are none of the weights of two positions, and say whose weight it is."""
        x = RNG.normal(size=(6, 2, 5))
        y = x + RNG.normal(size=x.shape)
        kind = pa.list_(pa.list_(pa.float64()))
        pair = []
        for name, some in (("p", x), ("q", y)):
            table = pa.table({"id": range(6), "logits": pa.array(some.tolist(), kind)})
            pair.append(arrow(tmp_path / f"{name}.arrow", table))
        weight, order = RNG.random(6), RNG.permutation(6)
        for ids in (order, [f"{k}" for k in order]):
            path = tmp_path / f"weight{suffix}"
            table = pa.table({"id": pa.array(ids), "w": weight[order]})
            (pq.write_table if suffix == ".parquet" else pa.csv.write_csv)(table, path)
            value = mean_kl(x.reshape(12, 5), y.reshape(12, 5), weight.repeat(2))
            measures(value, *pair, "--id", "id", "--weight", path)
            with_words = "--weight: Columns of a table must be numbered"
            if ids is order:
                raises(with_words, *pair, "--weight", path, "--columns", "logits")
        for names in (["w_1", "w_3"], ["", "w"], ["w", "v"], ["mask", "index"]):
            path = text(tmp_path / "mask.csv", np.ones((6, 2)), names)
            raises("--mask: Columns of a table must be numbered", *pair, "--mask", path)
        path = text(tmp_path / "weight.csv", np.stack([weight, 2 * weight], -1), ["w_0", "w_1"])
        value = mean_kl(x.reshape(12, 5), y.reshape(12, 5), np.stack([weight, 2 * weight], -1).reshape(-1))
        measures(value, *pair, "--weight", path)
        pq.write_table(pa.table({"w": weight}), tmp_path / "one.parquet")
        value = mean_kl(x.reshape(12, 5), y.reshape(12, 5), weight.repeat(2))
        measures(value, *pair, "--id", "id", "--weight", tmp_path / "one.parquet")

    def test_a_mask_of_another_length(self, tmp_path, npy):
        path = text(tmp_path / "mask.csv", np.ones((ROWS + 2, 1)), number=lambda x: str(int(x)))
        raises("--mask must have one entry for each sample, (40,). Got shape (42, 1)", *npy, "--mask", path)

    def test_masks_of_positions(self, tmp_path):
        x = RNG.normal(size=(6, 2, 5))
        y = x + RNG.normal(size=x.shape)
        np.save(tmp_path / "p.npy", x)
        np.save(tmp_path / "q.npy", y)
        mask = np.array([[0, 1], [1, 1], [1, 0], [1, 1], [1, 1], [0, 1]])
        value = mean_kl(x[mask > 0], y[mask > 0])
        pair = tmp_path / "p.npy", tmp_path / "q.npy"
        for header in (None, ["0", "1"]):
            path = text(tmp_path / "mask.csv", mask, header, number=lambda x: str(int(x)))
            measures(value, *pair, "--mask", path)
        for kind in (pa.bool_(), pa.int64()):
            column = pa.array((mask > 0).tolist() if kind == pa.bool_() else mask.tolist(), pa.list_(kind))
            pq.write_table(pa.table({"attention_mask": column}), tmp_path / "mask.parquet")
            measures(value, *pair, "--mask", tmp_path / "mask.parquet")

    def test_a_mask_of_booleans(self, tmp_path, npy):
        table = pa.table({"mask": self.MASK})
        pq.write_table(table, tmp_path / "mask.parquet")
        (tmp_path / "mask.csv").write_text("mask\n" + "\n".join(map(str, self.MASK)))
        for path in (tmp_path / "mask.parquet", tmp_path / "mask.csv", arrow(tmp_path / "mask.arrow", table)):
            measures(mean_kl(P[self.MASK], Q[self.MASK]), *npy, "--mask", path)


class TestIds:
    """Ids are kept as they are written, and said in the report."""

    @pytest.mark.parametrize("written", ["{:02}", "{}.50", "{}e1", "1234567890123456789012345678{:02}"])
    def test_as_text(self, tmp_path, written):
        ids = [written.format(k) for k in range(ROWS)]
        assert self.worst_id(tmp_path, ids, ".csv") in ids

    def test_numbers(self, tmp_path):
        assert isinstance(self.worst_id(tmp_path, range(ROWS), ".csv"), int)
        assert isinstance(self.worst_id(tmp_path, [k / 4 + 1 / 8 for k in range(ROWS)], ".csv"), float)

    def test_two_that_are_one_number(self, tmp_path, npy):
        path = tmp_path / "groups.csv"
        path.write_text("\n".join(["kind", *["01", "1"] * (ROWS // 2)]))
        assert set(model_of(*npy, "--groups", path)["groups"]) == {"01", "1"}

    @pytest.mark.parametrize(
        ("kind", "pattern"),
        [
            (pa.date32(), r"1970-0[12]-\d\d"),
            (pa.timestamp("s"), r"1970-01-01T00:00:\d\d"),
            (pa.timestamp("ns"), r"1970-01-01T00:00:00.0000000\d\d"),
            (pa.duration("s"), r"\d+ seconds"),
            (pa.decimal128(7, 2), r"\d+\.\d\d"),
        ],
        ids=str,
    )
    def test_other_kinds(self, tmp_path, kind, pattern):
        numbers = pa.array(range(ROWS), pa.int32() if kind == pa.date32() else pa.int64())
        ids = pa.array(map(Decimal, range(ROWS)), kind) if pa.types.is_decimal(kind) else numbers.cast(kind)
        assert re.fullmatch(pattern, self.worst_id(tmp_path, ids, ".arrow"))

    def worst_id(self, folder, ids, suffix):
        paths = []
        for name, x in (("p", P), ("q", Q)):
            if suffix == ".csv":
                path = text(folder / f"{name}.csv", x, NAMES, more=[("id", ids)])
            else:
                path = arrow(folder / f"{name}.arrow", table_of(x, id=ids))
            paths.append(path)
        return model_of(*paths, "--id", "id", "--worst", 1)["worst"][0]["id"]


def table_of(x, names=NAMES, **more):
    return pa.table({**more, **dict(zip(names, x.T, strict=True))})


class TestColumns:
    """Every column of floats was a class."""

    @pytest.mark.parametrize("name", ["label", "score", "loss", "", "Unnamed: 0", "__index_level_0__", "q_1", "other"])
    @pytest.mark.parametrize("kind", [float, int])
    def test_a_column_beside_a_stem(self, tmp_path, npy, name, kind):
        for x, path in ((P, tmp_path / "p.parquet"), (Q, tmp_path / "q.parquet")):
            pq.write_table(table_of(x, **{name: np.arange(ROWS).astype(kind)}), path)
        pair = tmp_path / "p.parquet", tmp_path / "q.parquet"
        raises(f"with p_0 to p_10, and {name} besides. Name the classes with --columns", *pair)
        measures(mean_kl(P, Q), *pair, "--columns", "p_*")

    @pytest.mark.parametrize("name", ["label", "loss", "Score", "", "Unnamed: 0"])
    @pytest.mark.parametrize("words", [True, False])
    def test_a_column_beside_words_or_numbers(self, tmp_path, name, words):
        names = [*"abcdefghijk"] if words else [str(k) for k in range(CLASSES)]
        path = tmp_path / "p.parquet"
        pq.write_table(table_of(P, names, **{name: RNG.random(ROWS)}), path)
        raises(f"{name} besides", path, path)

    @pytest.mark.parametrize("last", [np.arange(ROWS), np.arange(ROWS) % 2], ids=["an index", "a label of two"])
    @pytest.mark.parametrize("header", [None, "words", "numbers"])
    def test_a_column_that_only_its_values_tell(self, tmp_path, last, header):
        names = {None: None, "words": [*"abcdefghijkl"], "numbers": range(CLASSES + 1)}[header]
        x = np.column_stack([P, last])
        column = "l" if header == "words" else "11"
        path = text(tmp_path / "p.csv", x, names)
        raises(f"; not like the others in their values: {column}", path, path)
        measures(0, path, path, "--columns", "*")

    @pytest.mark.parametrize("formats", ["probs", "log_probs"])
    def test_a_loss_beside_distributions(self, tmp_path, formats):
        x = np.column_stack([probs(P), np.full(ROWS, 0.3)])
        path = text(tmp_path / "p.csv", x if formats == "probs" else np.log(x))
        raises("; not like the others in their values: 11", path, path, formats=formats)

    def test_classes_that_are_whole(self, tmp_path):
        """A class that is 0 or 1 in every row: it belongs to the others, with which it adds up to 1."""
        x = np.array([[0.0, 0.25, 0.75], [1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
        y = np.array([[0.1, 0.25, 0.65], [0.8, 0.1, 0.1], [0.2, 0.3, 0.5]])
        p, q = text(tmp_path / "p.csv", x, ["a", "b", "c"]), text(tmp_path / "q.csv", y, ["a", "b", "c"])
        with np.errstate(all="ignore"):
            terms = np.where(x > 0, x * np.log(x / y), 0).sum(-1)
        measures(terms.mean(), p, q, formats="probs")

    def test_numbers_out_of_order(self, tmp_path, npy):
        """Against an array, columns count by their numbers, not by where they stand."""
        order = RNG.permutation(CLASSES)
        for name in ("p_{}", "{}", "p[{}]", "{}_prob", "p_{:02}"):
            names = [name.format(k) for k in range(CLASSES)]
            pq.write_table(table_of(P[:, order], [names[k] for k in order]), tmp_path / "p.parquet")
            measures(mean_kl(P, Q), tmp_path / "p.parquet", npy[1])
            columns = [] if name == "{}" else ["--columns", name.partition("{")[0] + "*"]
            measures(mean_kl(P, Q), tmp_path / "p.parquet", npy[1], *columns)

    def test_other_stems_in_each_table(self, tmp_path):
        order = RNG.permutation(CLASSES)
        pq.write_table(table_of(P), tmp_path / "p.parquet")
        pq.write_table(table_of(Q[:, order], [f"student/{k}" for k in order]), tmp_path / "q.parquet")
        model = model_of(tmp_path / "p.parquet", tmp_path / "q.parquet")
        assert model["mean"] == pytest.approx(mean_kl(P, Q), rel=1e-9)
        pq.write_table(table_of(Q, [f"q_{k + 1}" for k in range(CLASSES)]), tmp_path / "q.parquet")
        raises("Every table must have the same classes. Got no column 'p_0'", *tmp_path.glob("?.parquet"))

    def test_both_in_one_table(self, tmp_path):
        """The model's table has the reference's columns as well: their divergence from themselves is 0."""
        both, one = tmp_path / "both.parquet", tmp_path / "one.parquet"
        pq.write_table(pa.table({**_columns(P, "p_{}"), **_columns(Q, "q_{}")}), both)
        pq.write_table(table_of(P), one)
        raises("with p_0 to p_10, and q_0 to q_10: numbers after 2 stems", both, both)
        raises("numbers after 2 stems", one, both)
        measures(mean_kl(P, Q), both, both, "--columns", "p_*", "--columns", "q_*")
        raises("--columns must be given once, or twice", both, both, *["--columns", "p_*"] * 3)

    def test_words_of_each_in_one_table(self, tmp_path):
        """What the star stands for is the class."""
        names, order = [*"abcdefghijk"], RNG.permutation(CLASSES)
        columns = {f"{names[k]} (p)": P[:, k] for k in range(CLASSES)}
        columns |= {f"{names[k]} (q)": Q[:, k] for k in order}
        pq.write_table(pa.table(columns), tmp_path / "both.parquet")
        both = tmp_path / "both.parquet"
        measures(mean_kl(P, Q), both, both, "--columns", "* (p)", "--columns", "* (q)")

    def test_more_columns_in_the_model(self, tmp_path):
        """They were dropped without a word."""
        pq.write_table(table_of(P[:, :8], NAMES[:8]), tmp_path / "p.parquet")
        pq.write_table(table_of(Q), tmp_path / "q.parquet")
        pair = tmp_path / "p.parquet", tmp_path / "q.parquet"
        raises("If the last 3 are padding, say --classes 8.", *pair)
        measures(mean_kl(P[:, :8], Q[:, :8]), *pair, "--classes", 8)

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            ([*NAMES[:4], *NAMES[5:]], "p_0, p_1, p_2, p_3, p_5, p_6, p_7, p_8 and 2 more, and none with the number 4"),
            ([f"p_{k}" for k in range(3, 13)], "and none with the number 1"),
            (["p_1", "p_01", *NAMES[2:]], "p_1 to p_10, and p_01 besides"),
            (["1", "01", *map(str, range(2, 11))], "of which some have the same number"),
        ],
        ids=["a gap", "no beginning", "the same number", "the same number alone"],
    )
    def test_numbers_that_do_not_run(self, tmp_path, names, message):
        pq.write_table(table_of(P[:, : len(names)], names), tmp_path / "p.parquet")
        raises(message, tmp_path / "p.parquet", tmp_path / "p.parquet")

    def test_a_class_of_whole_numbers(self, tmp_path, npy):
        """A class that is 0 throughout is written as a whole number."""
        x = P.copy()
        x[:, 3] = 0
        path = text(tmp_path / "p.csv", x, NAMES, number=lambda value: f"{value:.17g}")
        measures(mean_kl(x, Q), path, npy[1])
        bare = text(tmp_path / "bare.csv", x, number=lambda value: f"{value:.17g}")
        measures(mean_kl(x, Q), bare, npy[1])

    def test_booleans_where_they_are_named(self, tmp_path):
        """Labels as pandas' get_dummies makes them."""
        labels = np.arange(ROWS) % CLASSES
        pq.write_table(pa.table(_columns(labels[:, None] == np.arange(CLASSES), "p_{}")), tmp_path / "p.parquet")
        pq.write_table(table_of(probs(Q)), tmp_path / "q.parquet")
        value = -np.log(probs(Q)[np.arange(ROWS), labels]).mean()
        pair = tmp_path / "p.parquet", tmp_path / "q.parquet"
        measures(value, *pair, "--columns", "p_*", formats="probs")
        raises("Got " + str(pair[0]) + " with p_0 of bool", *pair, formats="probs")

    def test_the_report_says_which(self, tmp_path, npy):
        pq.write_table(table_of(P), tmp_path / "p.parquet")
        pq.write_table(table_of(Q, [*"abcdefghijk"]), tmp_path / "q.parquet")
        pair = tmp_path / "p.parquet", npy[1]
        run(*pair, "--json", tmp_path / "o.json", "--csv", tmp_path / "o.csv")
        report = json.loads((tmp_path / "o.json").read_text())
        assert report["classes"] == CLASSES
        assert report["columns"] == "p_0 to p_10"
        assert "columns" not in report["models"][0]
        with (tmp_path / "o.csv").open(newline="") as file:
            assert next(csv.DictReader(file))["classes"] == "11"
        for printed in (run(*pair).stdout, run(*pair, "--markdown").stdout):
            assert f"11 classes: p_0 to p_10 of {pair[0]}." in re.sub(r"\s*\n", " ", printed)
        assert "11 classes." in run(*npy).stdout
        assert "8 classes." in run(*npy, "--classes", 8).stdout
        words = run(npy[0], tmp_path / "q.parquet").stdout
        assert "11 classes: a, b, c, d, e, f, g, h and 3 more of" in words


def _columns(x, name):
    return {name.format(k): x[:, k] for k in range(x.shape[1])}


class TestText:
    """Separators, decimals, compression and endings."""

    @pytest.mark.parametrize("ending", [".csv", ".CSV", ".tsv", ".TSV", ".csv.gz", ".CSV.GZ", ".tsv.gz", ".Tsv.gz"])
    @pytest.mark.parametrize("names", [NAMES, None], ids=["header", "no header"])
    def test_endings(self, tmp_path, ending, names):
        delimiter = "\t" if "tsv" in ending.lower() else ","
        p, q = (text(tmp_path / f"{n}{ending}", x, names, delimiter) for n, x in (("p", P), ("q", Q)))
        measures(mean_kl(P, Q), p, q)
        measures(mean_kl(P, Q), p, q, "--batch-rows", 3)

    @pytest.mark.parametrize("delimiter", [";", "\t", ","])
    @pytest.mark.parametrize("decimal", [".", ","])
    @pytest.mark.parametrize("names", [NAMES, None], ids=["header", "no header"])
    def test_separators_and_decimals(self, tmp_path, delimiter, decimal, names):
        """With commas between the cells, those in them are quoted."""
        p, q = (text(tmp_path / f"{n}.csv", x, names, delimiter, decimal) for n, x in (("p", P), ("q", Q)))
        measures(mean_kl(P, Q), p, q)

    def test_two_classes_with_commas(self, tmp_path):
        """Four numbers to a line, or two."""
        p, q = (text(tmp_path / f"{n}.csv", probs(x[:, :2]), None, ";", ",") for n, x in (("p", P), ("q", Q)))
        measures(mean_kl(P[:, :2], Q[:, :2]), p, q, formats="probs")

    def test_exponents_and_a_mark_at_the_beginning(self, tmp_path, npy):
        path = text(tmp_path / "p.csv", P, NAMES, ";", ",", number="{:.17e}".format)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        measures(mean_kl(P, Q), path, npy[1])

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("p_0;p_1\n0,5;0.25\n0,5;0.25\n", "It must be clear what stands before the decimals. Got 0,5 and 0.25"),
            ("p_0;p_1\n1,500;2,500\n", "Got 1,500, which may be thousands"),
            ("p_0,p_1;p_2\n1,2;3\n", "It must be clear what parts the cells of a table. Got ',' and ';'"),
            ('p_0,p_1\n"1,234.5",2\n', "with p_0 of string"),
            ("p_0;p_1\n1;2\n" + "3;4\n" * 60 + "0,5;1\n", "with p_0 of string"),
            ("p_0;p_1\n1;2\n" + "3;4\n" * 2**19 + "0,5;1\n", "invalid value '0,5'. Is it whole"),
        ],
        ids=["both", "thousands", "separators", "thousands and decimals", "a comma below", "a comma far below"],
    )
    def test_what_is_not_clear(self, tmp_path, content, message):
        path = tmp_path / "p.csv"
        path.write_text(content)
        raises(message, path, path)

    def test_a_table_of_several_members(self, tmp_path, npy):
        """As `cat a.gz b.gz` makes them."""
        path = text(tmp_path / "p.csv.gz", P[:20], NAMES)
        path.write_bytes(path.read_bytes() + text(tmp_path / "rest.csv.gz", P[20:]).read_bytes())
        measures(mean_kl(P, Q), path, npy[1])

    @pytest.mark.parametrize("cut", [40, 1000])
    def test_damage(self, tmp_path, npy, cut):
        path = text(tmp_path / "p.csv.gz", P, NAMES)
        path.write_bytes(path.read_bytes()[:cut])
        raises("p.csv.gz cannot be read as .csv.gz", path, npy[1])

    def test_shards(self, tmp_path, npy):
        for k, part in enumerate(np.split(P, 4)):
            (tmp_path / "p").mkdir(exist_ok=True)
            text(tmp_path / "p" / f"part-{k}-of-4.CSV.gz", part, NAMES)
        measures(mean_kl(P, Q), tmp_path / "p", npy[1])
        (tmp_path / "p" / "part-2-of-4.CSV.gz").unlink()
        raises("has 3 of 4. Missing is number 2", tmp_path / "p", npy[1])


TOKENS = RNG.normal(size=(10, 4, CLASSES))


class TestLists:
    KINDS = {  # noqa: RUF012
        "list": pa.list_(pa.float64()),
        "large list": pa.large_list(pa.float64()),
        "fixed list": pa.list_(pa.float64(), CLASSES),
        "float32": pa.list_(pa.float32()),
        "float16": pa.list_(pa.float16()),
    }

    @pytest.mark.parametrize("suffix", [".parquet", ".PARQUET", ".arrow", ".feather", "stream"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_lists_of_classes(self, tmp_path, suffix, kind):
        numpy_kind = {"float32": np.float32, "float16": np.float16}.get(kind, np.float64)
        pair = []
        for name, x in (("p", P.astype(numpy_kind)), ("q", Q.astype(numpy_kind))):
            column = (
                pa.FixedSizeListArray.from_arrays(x.ravel(), CLASSES)
                if kind == "fixed list"
                else (pa.array(list(x), self.KINDS[kind]))
            )
            table = pa.table({"text": ["hello"] * ROWS, "label": np.arange(ROWS), "logits": column})
            path = tmp_path / f"{name}{'.arrow' if suffix == 'stream' else suffix}"
            if suffix.lower() == ".parquet":
                pq.write_table(table, path, row_group_size=7)
            elif suffix == ".feather":
                pyarrow.feather.write_feather(table, path)
            else:
                arrow(path, table, suffix == "stream")
            pair.append(path)
        value = mean_kl(*(x.astype(numpy_kind).astype(float) for x in (P, Q)))
        rel = 1e-9 if numpy_kind == np.float64 else 1e-5
        for more in ([], ["--batch-rows", 3], ["--columns", "logits"]):
            model = model_of(*pair, *more)
            assert model["mean"] == pytest.approx(value, rel=rel)
            assert model["count"] == ROWS
            assert model["columns"] == "the lists in logits"

    @pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
    def test_lists_of_positions(self, tmp_path, suffix):
        y = TOKENS + RNG.normal(size=TOKENS.shape)
        kind = pa.list_(pa.list_(pa.float64()))
        order = RNG.permutation(10)
        for name, x, ids in (("p", TOKENS, range(10)), ("q", y[order], order), ("r", y, range(10))):
            table = pa.table({"id": list(ids), "logits": lists(x, kind)})
            path = tmp_path / f"{name}{suffix}"
            pq.write_table(table, path) if suffix == ".parquet" else arrow(path, table)
        p, q, r = (tmp_path / f"{name}{suffix}" for name in "pqr")
        for size in (1, 3, 100):
            report = model_of(p, r, "--worst", 1, "--batch-rows", size)
            assert report["mean"] == pytest.approx(mean_kl(TOKENS, y), rel=1e-9)
            assert report["count"] == 40
        aligned = model_of(p, q, "--id", "id", "--worst", 1)
        assert aligned["mean"] == pytest.approx(mean_kl(TOKENS, y), rel=1e-9)
        assert aligned["worst"][0]["position"] == report["worst"][0]["position"]
        assert aligned["stderr"] == pytest.approx(report["stderr"])
        raises("Rows must be in the same order", p, q)

    @pytest.mark.parametrize("suffix", [".parquet", ".arrow", "dataset"])
    @pytest.mark.parametrize("numbers", [reading.NUMBERS, 50])
    def test_documents_of_different_lengths(self, tmp_path, suffix, numbers, monkeypatch):
        monkeypatch.setattr(reading, "NUMBERS", numbers)
        lengths = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
        x = [RNG.normal(size=(length, CLASSES)) for length in lengths]
        y = [some + RNG.normal(size=some.shape) for some in x]
        order = RNG.permutation(len(x))
        tables_of = {"p": (x, range(len(x))), "q": (y, range(len(x))), "r": ([y[k] for k in order], order)}
        kind = pa.list_(pa.list_(pa.float64()))
        paths = {}
        for name, (some, ids) in tables_of.items():
            table = pa.table({"id": list(ids), "logits": pa.array([one.tolist() for one in some], kind)})
            paths[name] = tmp_path / f"{name}{suffix}"
            if suffix == ".parquet":
                pq.write_table(table, paths[name], row_group_size=4)
            else:
                (save_to_disk if suffix == "dataset" else arrow)(paths[name], table)
        np.savez(tmp_path / "q.npz", **{f"{k:02}": one for k, one in enumerate(y)})
        p, q, r = paths.values()
        kl = [mean_kl(one, other) * len(one) for one, other in zip(x, y, strict=True)]
        total = sum(lengths)
        error = np.sqrt(11 / 10 * sum((s - sum(kl) / total * n) ** 2 for s, n in zip(kl, lengths, strict=True))) / total
        documents = ["--documents", "--key", "*"]
        for arguments in ([p, q], [p, q, "--batch-rows", 3], [p, r, "--id", "id"], [p, tmp_path / "q.npz", *documents]):
            model = model_of(*arguments, "--worst", 1)
            assert model["mean"] == pytest.approx(sum(kl) / total, rel=1e-9), arguments
            assert model["stderr"] == pytest.approx(error, rel=1e-9)
            assert model["count"] == total
        weight = RNG.random(len(x))
        np.save(tmp_path / "weight.npy", weight)
        value = np.dot(weight, kl) / np.dot(weight, lengths)
        measures(value, p, r, "--id", "id", "--weight", tmp_path / "weight.npy")
        raises("Rows must be in the same order", p, r)
        raises("Both must have samples of the same lengths", p, r, "--no-check")

    def test_documents_of_other_lengths(self, tmp_path):
        """All in one are as long as the longest in the other; and what is aligned by ids has no shape to check."""
        x = pa.array([[[1.0, 2.0]] * 2, [[1.0, 2.0]]])
        y = pa.array([[[1.0, 2.0]] * 2, [[1.0, 2.0]] * 2])
        p, q = (arrow(tmp_path / f"{name}.arrow", pa.table({"l": some})) for name, some in (("p", x), ("q", y)))
        for pair in ((p, q), (q, p)):
            raises("Both must have samples of the same lengths", *pair)
        for name, length in (("p", 2), ("q", 3)):
            pq.write_table(pa.table({"id": [0, 1], "l": [[[1.0, 2.0]] * length] * 2}), tmp_path / f"{name}.parquet")
        pair = tmp_path / "p.parquet", tmp_path / "q.parquet"
        raises("Both must have samples of the same lengths. Got 2 and 3 rows in sample 0", *pair, "--id", "id")

    def test_tensors_of_a_fixed_shape(self, tmp_path):
        y = TOKENS + 1.0 * RNG.normal(size=TOKENS.shape)
        for name, x in (("p", TOKENS), ("q", y)):
            column = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(x))
            pq.write_table(pa.table({"logits": column}), tmp_path / f"{name}.parquet")
            arrow(tmp_path / f"{name}.arrow", pa.table({"logits": column}))
        for suffix in ("parquet", "arrow"):
            measures(mean_kl(TOKENS, y), tmp_path / f"p.{suffix}", tmp_path / f"q.{suffix}")

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            (
                {"l": [[1.0, 2.0], [1.0]]},
                "Every row must have the same classes. Got lists of 1 and 2 numbers in column 'l'",
            ),
            ({"l": [[1.0, 2.0], None]}, "Every row must have a list of classes. Got one without in column 'l'"),
            ({"l": [[[1.0, 2.0]], [[1.0, 2.0], [3.0]]]}, "Every row must have the same classes. Got lists of 1 and 2"),
            ({"l": [[[1.0, 2.0]], [[1.0, 2.0], None]]}, "Every row must have a list of classes. Got one without"),
            ({"l": [[[1.0, 2.0]], None]}, "Every row must have a list of classes. Got one without"),
            ({"l": [[[1.0, 2.0]], []]}, "Every document must have rows. Got none in row 1 of"),
            (
                {"l": [[[[1.0, 2.0]]], [[[1.0, 2.0]], [[2.0, 1.0]]]]},
                "Every row must have the same classes. Got lists of shape (1, 1, 2)",
            ),
            ({"l": [[1.0]], "m": [[2.0]]}, "2 columns of lists, l, m"),
            ({"l": [[1.0]], "p_0": [1.0], "p_1": [2.0]}, "lists in l, and p_0, p_1 besides"),
            ({"l": [[1, 2]]}, "0 columns of floats, and l besides"),
            ({"l": [[1.0, None]]}, "which has NaN at class 1"),
            ({"l": pa.array([[]], pa.list_(pa.float64()))}, "Predictions must have rows and classes"),
            ({"l": pa.array([], pa.list_(pa.float64()))}, "Predictions must have rows and classes"),
        ],
        ids=range(13),
    )
    def test_bad_lists(self, tmp_path, table, message):
        path = tmp_path / "p.parquet"
        pq.write_table(pa.table(table), path)
        raises(message, path, path)
        raises(message, arrow(tmp_path / "p.arrow", pa.table(table)), path)

    def test_lengths_that_change_late(self, tmp_path, monkeypatch):
        """In a batch of their own."""
        monkeypatch.setattr(reading, "NUMBERS", 8)
        path = tmp_path / "p.arrow"
        arrow(path, pa.table({"l": [[1.0, 2.0]] * 51 + [[1.0, 2.0, 3.0]] * 5}))
        raises("Every row must have the same classes. Got lists of 2 and 3 numbers in column 'l'", path, path)
        arrow(path, pa.table({"l": [[1.0, 2.0]] * 49 + [[1.0, 2.0, 3.0]] * 7}))
        raises("Every row must have the same classes. Got lists of shape (2,) and (3,) in column 'l'", path, path)

    def test_columns_of_arrow(self, tmp_path):
        measures(
            mean_kl(P, Q), arrow(tmp_path / "p.arrow", table_of(P)), arrow(tmp_path / "q.feather", table_of(Q), True)
        )

    def test_little_is_held_at_once(self, tmp_path, monkeypatch):
        """Whatever the batches of the file are."""
        monkeypatch.setattr(reading, "NUMBERS", 4 * CLASSES)
        seen = []
        arrays = reading.arrays
        monkeypatch.setattr(reading, "arrays", lambda *a: (seen.append(x.size) or x for x in arrays(*a)))
        for name, x in (("p", P), ("q", Q)):
            pq.write_table(pa.table({"l": lists(x)}), tmp_path / f"{name}.parquet")
            with pa.OSFile(str(tmp_path / f"{name}.arrow"), "wb") as sink:
                table = pa.table({"l": lists(x)})
                with pa.ipc.new_stream(sink, table.schema) as writer:
                    writer.write_table(table)
        for suffix in ("parquet", "arrow"):
            measures(mean_kl(P, Q), tmp_path / f"p.{suffix}", tmp_path / f"q.{suffix}")
        assert len(seen) > 30
        assert max(seen) <= 4 * CLASSES

    @pytest.mark.parametrize("rows", [20, 400], ids=["many row groups", "one row group"])
    def test_a_parquet_file_is_not_held(self, tmp_path, monkeypatch, rows):
        x = RNG.normal(size=(400, 10_000))
        column = pa.FixedSizeListArray.from_arrays(x.ravel(), x.shape[1])
        path = tmp_path / "p.parquet"
        pq.write_table(pa.table({"l": column}), path, row_group_size=rows, use_dictionary=False)
        del column
        monkeypatch.setattr(reading, "NUMBERS", 2**17)
        before, held = pa.total_allocated_bytes(), []
        arrays = reading.arrays
        monkeypatch.setattr(
            reading, "arrays", lambda *a: (held.append(pa.total_allocated_bytes() - before) or y for y in arrays(*a))
        )
        measures(0, path, path, "--batch-rows", 5)
        assert len(held) > 30
        assert max(held) < path.stat().st_size / 3


def save_to_disk(folder: Path, table, shards=3):
    """The layout of `datasets.Dataset.save_to_disk`."""
    folder.mkdir()
    names = [f"data-{k:05}-of-{shards:05}.arrow" for k in range(shards)]
    ends = np.linspace(0, len(table), shards + 1).astype(int)
    for name, start, stop in zip(names, ends, ends[1:], strict=False):
        arrow(folder / name, table.slice(start, stop - start), as_stream=True)
    (folder / "dataset_info.json").write_text(json.dumps({"citation": "", "features": {}}))
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "1", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


class TestDatasets:
    def test_a_dataset(self, tmp_path):
        p, q = (save_to_disk(tmp_path / name, pa.table({"logits": lists(x)})) for name, x in (("p", P), ("q", Q)))
        measures(mean_kl(P, Q), p, q)
        measures(mean_kl(P, Q), save_to_disk(tmp_path / "of_columns", table_of(P)), q)

    def test_the_order_is_that_of_the_state(self, tmp_path):
        p, q = (save_to_disk(tmp_path / name, pa.table({"logits": lists(x)})) for name, x in (("p", P), ("q", Q)))
        for folder in (p, q):
            state = json.loads((folder / "state.json").read_text())
            state["_data_files"].reverse()
            (folder / "state.json").write_text(json.dumps(state))
        first = np.concatenate([P[26:], P[13:26], P[:13]])
        np.save(tmp_path / "p.npy", first)
        assert model_of(p, tmp_path / "p.npy")["mean"] == 0

    def test_array_2d(self, tmp_path):
        """An extension type that is known only where `datasets` is imported, as in files of it."""
        y = TOKENS + RNG.normal(size=TOKENS.shape)
        kind = pa.list_(pa.list_(pa.float64()))
        metadata = {
            b"ARROW:extension:name": b"datasets.features.features.Array2DExtensionType",
            b"ARROW:extension:metadata": b'[[4, 11], "float64"]',
        }
        schema = pa.schema([pa.field("logits", kind, metadata=metadata)])
        p, q = (
            save_to_disk(tmp_path / name, pa.table([lists(x, kind)], schema)) for name, x in (("p", TOKENS), ("q", y))
        )
        measures(mean_kl(TOKENS, y), p, q)

    def test_what_is_no_dataset(self, tmp_path, npy):
        folder = save_to_disk(tmp_path / "p", pa.table({"logits": lists(P)}))
        state = json.loads((folder / "state.json").read_text())
        for change, message in (
            ({"_indices_data_files": [{"filename": "i.arrow"}]}, "A dataset must hold its rows in their order"),
            ({"_data_files": []}, "An index must name files"),
            ({"_data_files": [{"filename": "none.arrow"}]}, "Every shard must be there"),
            ({"_data_files": 3}, "An index must have _data_files, a list of files"),
        ):
            (folder / "state.json").write_text(json.dumps({**state, **change}))
            raises(message, folder, npy[1])
        both = tmp_path / "splits"
        both.mkdir()
        save_to_disk(both / "test", pa.table({"logits": lists(P)}))
        save_to_disk(both / "train", pa.table({"logits": lists(P)}))
        (both / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
        raises("with the splits test, train. Name the folder of one.", both, npy[1])
        measures(mean_kl(P, Q), both / "test", npy[1])

    def test_a_mask_and_labels(self, tmp_path, npy):
        mask = np.arange(ROWS) % 3 > 0
        folder = save_to_disk(tmp_path / "mask", pa.table({"mask": mask}))
        measures(mean_kl(P[mask], Q[mask]), *npy, "--mask", folder)
        labels = arrow(tmp_path / "labels.arrow", pa.table({"group": ["a", "b"] * 20}), as_stream=True)
        assert model_of(*npy, "--groups", labels)["groups"]["a"]["mean"] == pytest.approx(mean_kl(P[::2], Q[::2]))


def test_the_names_of_a_class():
    path = Path("p.csv")
    names = {"x1": True, "x0": True}
    assert columns.recognised(names, path) == {"0": "x0", "1": "x1"}
    assert columns.named("x?", ["x1", "x0"], path) == {"0": "x0", "1": "x1"}
    assert columns.named("x1, x0", ["x0", "x1"], path) == {"1": "x1", "0": "x0"}
    assert columns.named("a *", ["a b", "a c"], path) == {"b": "a b", "c": "a c"}
    assert columns.named("p[b],a", ["a", "p[b]"], path) == {"p[b]": "p[b]", "a": "a"}


@pytest.mark.parametrize(
    ("name", "ending"),
    [("a.csv", ".csv"), ("A.CSV.Gz", ".csv.gz"), ("a.b.npy", ".npy"), ("a", ""), ("a.gz", ".gz"), (".csv", "")],
)
def test_endings(name, ending):
    assert suffix_of(Path(name)) == ending
    assert TABLES == (".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".arrow", ".feather")
