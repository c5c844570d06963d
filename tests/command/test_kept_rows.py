"""`klmetric compare --rows`: the values of each row, against plain float64 numpy."""

import json
import os
import shutil
import signal
import sys
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from command import report_of, run
from kld import write_kld
from language import normalised
from processes import forked
from trained import text

from klmetric.command import compare, kept_rows, measure, row_files
from klmetric.saved.formats.llama import MAGIC

SAMPLES, POSITIONS = 60, 24
FIELDS = ["kl", "agreement", "log_p", "log_q", "delta_p"]
MORE = ["reverse", "jensen_shannon", "total_variation", "agreement_5", "agreement_10"]


@pytest.fixture(scope="module")
def logits():
    data = {name: x.numpy() for name, x in text().items()}
    noise = torch.randn(text()["full"].shape, generator=torch.Generator().manual_seed(0)).numpy()
    return {**data, "noisy": data["full"] + np.float32(0.3) * noise}


@pytest.fixture(scope="module")
def folder(logits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for name, x in logits.items():
        np.save(folder / f"{name}.npy", x)
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 100, (SAMPLES, POSITIONS))
    np.save(folder / "targets.npy", np.where(rng.random(targets.shape) < 0.2, -100, targets))
    np.save(folder / "mask.npy", rng.random(targets.shape) < 0.8)
    np.save(folder / "weight.npy", rng.random(SAMPLES))
    (folder / "labels.txt").write_text("\n".join("abc"[k % 3] for k in range(SAMPLES)))
    return folder


def of_rows(p, q, targets=None):
    """What there is to be known of each row, from logits in float64; shape (...)."""
    p, q = (normalised(x.astype(np.float64)) for x in (p, q))
    middle = np.log((np.exp(p) + np.exp(q)) / 2)
    order_p, order_q = (np.argsort(-x, -1, kind="stable") for x in (p, q))
    values = {
        "kl": (np.exp(p) * (p - q)).sum(-1),
        "agreement": p.argmax(-1) == q.argmax(-1),
        "reverse": (np.exp(q) * (q - p)).sum(-1),
        "jensen_shannon": ((np.exp(p) * (p - middle)).sum(-1) + (np.exp(q) * (q - middle)).sum(-1)) / 2,
        "total_variation": np.abs(np.exp(p) - np.exp(q)).sum(-1) / 2,
        **{f"agreement_{k}": (order_p[..., :k] == order_q[..., :k]).all(-1) for k in (5, 10)},
    }
    if targets is not None:
        at = np.where(targets == -100, 0, targets)[..., None]
        log_p, log_q = (np.take_along_axis(x, at, -1)[..., 0] for x in (p, q))
        values |= {"log_p": log_p, "log_q": log_q, "delta_p": np.exp(log_q) - np.exp(log_p)}
    return values


def columns_of(path, model):
    """The columns of one model as numpy has them, what is missing as NaN."""
    table = pq.read_table(path)
    table = table.filter(pa.compute.equal(table["model"], model))
    return {name: table[name].to_numpy() for name in table.column_names}


def agree(found, expected, counts):
    for name, values in expected.items():
        values = np.where(counts, values, np.nan).ravel()
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], values, rtol=2e-6, atol=1e-9, err_msg=name)


class TestTable:
    @pytest.mark.parametrize("size", [1, 50, 2**17])
    def test_all_that_is_known(self, folder, logits, tmp_path, monkeypatch, size):
        """Rows of weight 0 or of no target have no values; the size is that of the stretches that are written."""
        monkeypatch.setattr(row_files, "ROWS", size)
        beside = {name: np.load(folder / f"{name}.npy") for name in ("targets", "mask", "weight")}
        arguments = [folder / f"{name}.npy" for name in ("full", "noisy", "int8")]
        for name in beside:
            arguments += [f"--{name}", folder / f"{name}.npy"]
        arguments += ["--groups", folder / "labels.txt", "--more", "--batch-rows", 31]
        report = report_of(*arguments, "--rows", tmp_path / "rows.parquet")
        assert pq.read_schema(tmp_path / "rows.parquet").names == [
            *("model", "sample", "position", "group", "target", "weight"),
            *FIELDS,
            *MORE,
        ]
        weight = beside["weight"][:, None] * beside["mask"] * (beside["targets"] != -100)
        sample, position = np.indices(weight.shape)
        for model in report["models"]:
            rows = columns_of(tmp_path / "rows.parquet", model["name"])
            assert (rows["sample"] == sample.ravel()).all(), "in the order of the files"
            assert (rows["position"] == position.ravel()).all()
            assert (rows["group"] == np.array(list("abc"))[sample.ravel() % 3]).all()
            assert (rows["target"] == beside["targets"].ravel()).all()
            assert rows["weight"] == pytest.approx(weight.ravel(), rel=1e-6)
            agree(rows, of_rows(logits["full"], logits[model["name"]], beside["targets"]), weight > 0)
            assert np.nansum(rows["kl"] * rows["weight"]) / weight.sum() == pytest.approx(model["mean"], rel=1e-5)
        groups = pq.ParquetFile(tmp_path / "rows.parquet").metadata.num_row_groups
        assert (groups == 1) == (size > 2 * SAMPLES * POSITIONS), "they are written as they come"

    def test_without_anything_else(self, folder, logits, tmp_path):
        run(folder / "full.npy", folder / "int8.npy", "--rows", tmp_path / "rows.parquet")
        rows = columns_of(tmp_path / "rows.parquet", "int8")
        assert list(rows) == ["model", "sample", "position", "weight", "kl", "agreement"]
        assert (rows["weight"] == 1).all()

    def test_single_rows_have_no_positions(self, folder, logits, tmp_path):
        for name in ("full", "int8"):
            np.save(tmp_path / f"{name}.npy", logits[name][:, 0])
        run(tmp_path / "full.npy", tmp_path / "int8.npy", "--rows", tmp_path / "rows.parquet")
        rows = columns_of(tmp_path / "rows.parquet", "int8")
        assert "position" not in rows
        agree(rows, {"kl": of_rows(logits["full"][:, 0], logits["int8"][:, 0])["kl"]}, True)

    def test_the_unit_and_what_was_asked(self, folder, logits, tmp_path):
        arguments = (folder / "full.npy", folder / "int8.npy", "--base", 2, "--temperature", 2, "--more")
        run(*arguments, "--targets", folder / "targets.npy", "--rows", tmp_path / "rows.parquet")
        about = json.loads(pq.read_schema(tmp_path / "rows.parquet").metadata[b"klmetric"])
        assert about == {
            "reference": str(folder / "full.npy"),
            "unit": "bits",
            "direction": "forward",
            "temperature": 2.0,
        }
        targets = np.load(folder / "targets.npy")
        expected = of_rows(logits["full"] / 2, logits["int8"] / 2, targets)
        expected |= {name: expected[name] / np.log(2) for name in ("kl", "reverse", "jensen_shannon")}
        agree(columns_of(tmp_path / "rows.parquet", "int8"), expected, targets != -100)

    @pytest.mark.slow
    @pytest.mark.skipif(sys.platform != "linux", reason="names that are no text")
    @pytest.mark.parametrize("name", [b"\xff", "ü\n\x1b".encode()])
    def test_a_name_that_is_no_text(self, folder, tmp_path, name):
        """It reads as in the other reports."""
        path = tmp_path / os.fsdecode(name + b".npy")
        shutil.copy(folder / "int8.npy", path)
        arguments = ["compare", path, path, folder / "int8.npy", "--input-format", "logits"]
        done = forked(*arguments, "--rows", "rows.parquet", "--csv", "o.csv", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        expected = os.fsdecode(name).encode("utf-8", "backslashreplace").decode()
        table = pq.read_table(tmp_path / "rows.parquet")
        assert table["model"].unique().to_pylist() == [expected, "int8"]
        assert expected in (tmp_path / "o.csv").read_text(encoding="utf-8")
        assert json.loads(table.schema.metadata[b"klmetric"])["reference"] == str(path)

    def test_the_floor_is_a_model(self, folder, tmp_path):
        run(folder / "full.npy", folder / "int8.npy", "--floor", folder / "bf16.npy", "--rows", tmp_path / "r.parquet")
        assert pq.read_table(tmp_path / "r.parquet")["model"].unique().to_pylist() == ["int8", "bf16"]

    def test_targets_without_a_chance(self, tmp_path):
        p = [[0.5, 0.5, 0.0], [0.5, 0.0, 0.5], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]]
        q = [[0.5, 0.5, 0.0], [0.25, 0.75, 0.0], [0.5, 0.0, 0.5], [0.25, 0.0, 0.75]]
        for name, x in (("p", p), ("q", q)):
            np.save(tmp_path / f"{name}.npy", np.array(x))
        np.save(tmp_path / "t.npy", np.array([1, 1, 1, 1]))
        arguments = (tmp_path / "p.npy", tmp_path / "q.npy", "--targets", tmp_path / "t.npy")
        run(*arguments, "--rows", tmp_path / "rows.parquet", formats="probs")
        rows = columns_of(tmp_path / "rows.parquet", "q")
        assert np.exp(rows["log_p"]) == pytest.approx([0.5, 0, 0, 0.5], rel=1e-6)
        assert np.exp(rows["log_q"]) == pytest.approx([0.5, 0.75, 0, 0], rel=1e-6)
        assert rows["delta_p"] == pytest.approx([0, 0.75, 0, -0.5], rel=1e-6, abs=1e-7)
        assert list(np.isinf(rows["kl"])) == [False, True, False, True]

    def test_rows_that_are_no_distributions(self, folder, logits, tmp_path):
        x = logits["int8"].copy()
        x[3, 4, 5] = np.nan
        np.save(tmp_path / "q.npy", x)
        arguments = (folder / "full.npy", tmp_path / "q.npy", "--nan-strategy", "ignore")
        run(*arguments, "--rows", tmp_path / "rows.parquet")
        rows = columns_of(tmp_path / "rows.parquet", "q")
        assert np.isnan(rows["kl"]).nonzero()[0].tolist() == [3 * POSITIONS + 4]
        assert rows["weight"][3 * POSITIONS + 4] == 1
        assert np.isnan(rows["agreement"]).sum() == 1

    @pytest.mark.parametrize("batch", [1, 7, 1000])
    def test_documents_of_different_lengths(self, logits, tmp_path, batch):
        lengths = np.random.default_rng(0).integers(1, POSITIONS, SAMPLES)
        for name in ("full", "int8"):
            np.savez(tmp_path / f"{name}.npz", **{f"doc{k}": logits[name][k, :n] for k, n in enumerate(lengths)})
        arguments = (tmp_path / "full.npz", tmp_path / "int8.npz", "--key", "doc*", "--documents")
        run(*arguments, "--batch-rows", batch, "--rows", tmp_path / "rows.parquet")
        rows = columns_of(tmp_path / "rows.parquet", "int8")
        assert (rows["sample"] == np.repeat(np.arange(SAMPLES), lengths)).all()
        assert (rows["position"] == np.concatenate([np.arange(n) for n in lengths])).all()
        there = np.arange(POSITIONS) < lengths[:, None]
        agree(rows, {"kl": of_rows(logits["full"], logits["int8"])["kl"][there]}, True)

    @pytest.mark.parametrize("kind", ["words", "numbers", "dates"])
    def test_ids(self, logits, tmp_path, kind):
        ids = {
            "words": np.array([f"row {k}" for k in range(SAMPLES)]),
            "numbers": np.arange(100, 100 + SAMPLES),
            "dates": np.datetime64("2024-01-01") + np.arange(SAMPLES),
        }[kind]
        order = np.random.default_rng(0).permutation(SAMPLES)
        for name, rows in (("full", np.arange(SAMPLES)), ("int8", order)):
            columns = {f"p_{k}": logits[name][rows, 0, k] for k in range(100)}
            pq.write_table(pa.table({"id": ids[rows], **columns}), tmp_path / f"{name}.parquet")
        arguments = (tmp_path / "full.parquet", tmp_path / "int8.parquet", "--id", "id")
        run(*arguments, "--rows", tmp_path / "rows.parquet")
        table = pq.read_table(tmp_path / "rows.parquet")
        assert table["id"].to_pylist() == pa.array(ids).to_pylist()
        agree({"kl": table["kl"].to_numpy()}, {"kl": of_rows(logits["full"], logits["int8"])["kl"][:, 0]}, True)

    def test_a_file_of_llama_cpp(self, logits, tmp_path):
        context = 2 * POSITIONS + 2
        tokens = np.random.default_rng(0).integers(0, 100, (SAMPLES, context))
        held = [
            write_kld(tmp_path / f"{name}.kld", torch.from_numpy(logits[name]), tokens, context).double().numpy()
            for name in ("full", "int8")
        ]
        assert (tmp_path / "full.kld").read_bytes().startswith(MAGIC)
        run(tmp_path / "full.kld", tmp_path / "int8.kld", "--rows", tmp_path / "rows.parquet", formats=None)
        rows = columns_of(tmp_path / "rows.parquet", "int8")
        targets = tokens[:, context - POSITIONS :]
        assert (rows["target"] == targets.ravel()).all()
        p, q = held
        log_p, log_q = (np.take_along_axis(x, targets[..., None], -1)[..., 0].ravel() for x in held)
        assert rows["log_p"] == pytest.approx(log_p, rel=1e-6)
        assert rows["log_q"] == pytest.approx(log_q, rel=1e-6)
        q = normalised(q)
        theirs = np.where(p > -16, np.exp(p) * (p - q), 0).sum(-1).ravel()
        np.testing.assert_allclose(rows["llama_cpp"], theirs, atol=5e-6)


class TestArray:
    def test_of_models_and_rows(self, folder, logits, tmp_path):
        arguments = [folder / f"{name}.npy" for name in ("full", "noisy", "int8")]
        run(*arguments, "--mask", folder / "mask.npy", "--batch-rows", 31, "--rows", tmp_path / "rows.npy")
        found = np.load(tmp_path / "rows.npy")
        assert (found.shape, found.dtype) == ((2, SAMPLES * POSITIONS), np.float32)
        counts = np.load(folder / "mask.npy")
        for name, kl in zip(("noisy", "int8"), found, strict=True):
            agree({"kl": kl}, {"kl": of_rows(logits["full"], logits[name])["kl"]}, counts)

    def test_of_one_model_and_some_samples(self, folder, logits, tmp_path):
        run(folder / "full.npy", folder / "int8.npy", "--limit", 7, "--rows", tmp_path / "rows.npy")
        found = np.load(tmp_path / "rows.npy")
        agree({"kl": found[0]}, {"kl": of_rows(logits["full"], logits["int8"])["kl"][:7]}, True)


def rows_of_rank(rank, size, arguments, path):
    run(*arguments, "--rows", path)
    return sorted(file.name for file in path.parent.iterdir())


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_the_same_rows_from_several_processes(folder, tmp_path, processes, suffix):
    arguments = [*(folder / f"{name}.npy" for name in ("full", "noisy", "int8")), "--targets", folder / "targets.npy"]
    paths = [tmp_path / str(size) / f"rows{suffix}" for size in (1, processes.size)]
    for path in paths:
        path.parent.mkdir()
    rows_of_rank(0, 1, arguments, paths[0])
    left = processes(rows_of_rank, arguments, paths[1])
    assert sorted(file.name for file in paths[1].parent.iterdir()) == [f"rows{suffix}"], left
    if suffix == ".npy":
        assert paths[0].read_bytes() == paths[1].read_bytes()
    else:
        tables = [pq.read_table(path).sort_by([("model", "ascending")]) for path in paths]
        assert tables[0].equals(tables[1])


def test_documents_in_several_processes(logits, tmp_path, two_processes):
    lengths = np.random.default_rng(0).integers(1, POSITIONS, SAMPLES)
    for name in ("full", "int8"):
        np.savez(tmp_path / f"{name}.npz", **{f"doc{k}": logits[name][k, :n] for k, n in enumerate(lengths)})
    arguments = (tmp_path / "full.npz", tmp_path / "int8.npz", "--key", "doc*", "--documents")
    two_processes(rows_of_rank, arguments, tmp_path / "rows.parquet")
    rows = columns_of(tmp_path / "rows.parquet", "int8")
    assert (rows["sample"] == np.repeat(np.arange(SAMPLES), lengths)).all()
    assert (rows["position"] == np.concatenate([np.arange(n) for n in lengths])).all()


def bad_rows_of_rank(rank, size, arguments, path):
    run(*arguments, "--rows", path, code=2)


def fault_of_rank(rank, size, arguments, path, faulty):
    """No room for the rows of one of the processes."""
    before = row_files.Array.add

    def add(*_):
        raise OSError(28, "No space left on device")

    row_files.Array.add = add if rank == faulty else before
    try:
        done = run(*arguments, "--rows", path, code=0 if rank else 2)
        return done.stdout, done.stderr
    finally:
        row_files.Array.add = before


@pytest.mark.parametrize("faulty", [0, 1])
def test_no_room_for_one_of_several_processes(folder, tmp_path, two_processes, faulty):
    (first, told), other = two_processes(
        fault_of_rank, [folder / "full.npy", folder / "int8.npy"], tmp_path / "rows.npy", faulty
    )
    assert "p99.9" in first
    assert told.count("rows.npy: No space left on device. It is as it was before.") == 1
    assert other == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_bad_rows_on_one_of_several_processes(folder, logits, tmp_path, two_processes):
    x = logits["int8"].copy()
    x[40, 0, 0] = np.nan
    np.save(tmp_path / "bad.npy", x)
    two_processes(bad_rows_of_rank, [folder / "full.npy", tmp_path / "bad.npy"], tmp_path / "rows.npy")
    assert [file.name for file in tmp_path.iterdir()] == ["bad.npy"]


class TestHowItEnds:
    @pytest.mark.parametrize("suffix", [".npy", ".parquet"])
    def test_an_error_leaves_what_was_there(self, folder, logits, tmp_path, suffix):
        x = logits["int8"].copy()
        x[59, 0, 0] = np.nan
        np.save(tmp_path / "q.npy", x)
        (tmp_path / f"rows{suffix}").write_text("rows")
        run(folder / "full.npy", tmp_path / "q.npy", "--rows", tmp_path / f"rows{suffix}", "--batch-rows", 9, code=2)
        assert (tmp_path / f"rows{suffix}").read_text() == "rows"
        assert len(list(tmp_path.iterdir())) == 2

    def test_it_takes_the_place_of_what_was_there(self, folder, tmp_path):
        (tmp_path / "real.npy").write_text("rows")
        (tmp_path / "real.npy").chmod(0o640)
        (tmp_path / "link.npy").symlink_to("real.npy")
        run(folder / "full.npy", folder / "int8.npy", "--rows", tmp_path / "link.npy")
        assert np.load(tmp_path / "real.npy").shape == (1, SAMPLES * POSITIONS)
        assert (tmp_path / "link.npy").is_symlink()
        assert (tmp_path / "real.npy").stat().st_mode & 0o777 == 0o640

    def test_a_limit_that_is_exceeded_keeps_the_rows(self, folder, tmp_path):
        arguments = (folder / "full.npy", folder / "int8.npy", "--fail-above", "mean=0")
        run(*arguments, "--rows", tmp_path / "rows.npy", code=1)
        assert np.load(tmp_path / "rows.npy").shape == (1, SAMPLES * POSITIONS)

    @pytest.mark.parametrize("suffix", [".npy", ".parquet"])
    @pytest.mark.slow
    def test_ctrl_c_keeps_what_was_measured(self, folder, logits, tmp_path, suffix):
        arguments = ["compare", folder / "full.npy", folder / "noisy.npy", "--input-format", "logits"]
        arguments += ["--batch-rows", 10, "--json", "o.json", "--rows", f"rows{suffix}"]
        done = forked(*arguments, cwd=tmp_path, first=partial(interrupt_after, 5))
        assert done.returncode == 130, done.stderr
        samples = json.loads((tmp_path / "o.json").read_text())["samples"]
        assert 5 <= samples < SAMPLES
        if suffix == ".npy":
            kl = np.load(tmp_path / "rows.npy")[0]
        else:
            kl = columns_of(tmp_path / "rows.parquet", "noisy")["kl"]
        agree({"kl": kl}, {"kl": of_rows(logits["full"], logits["noisy"])["kl"][:samples]}, True)

    @pytest.mark.slow
    @pytest.mark.parametrize("suffix", [".npy", ".parquet"])
    def test_a_second_ctrl_c_leaves_nothing(self, folder, tmp_path, suffix):
        arguments = ["compare", folder / "full.npy", folder / "noisy.npy", "--input-format", "logits"]
        arguments += ["--batch-rows", 10, "--rows", f"rows{suffix}"]
        done = forked(*arguments, cwd=tmp_path, first=partial(interrupt_after, 5, times=2))
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.slow
    @pytest.mark.parametrize("event", ["open", "os.rename"])
    def test_ctrl_c_as_it_begins_and_ends(self, folder, tmp_path, event):
        (tmp_path / "rows.npy").write_text("rows")
        arguments = ["compare", folder / "full.npy", folder / "noisy.npy", "--input-format", "logits"]
        done = forked(*arguments, "--rows", "rows.npy", cwd=tmp_path, first=partial(interrupt_at, event))
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")
        assert [file.name for file in tmp_path.iterdir()] == ["rows.npy"]
        assert (tmp_path / "rows.npy").read_text() == "rows"

    @pytest.mark.slow
    @pytest.mark.parametrize("suffix", [".npy", ".parquet"])
    def test_a_full_disk(self, folder, tmp_path, suffix):
        """The report is shown all the same, and what was there stays."""
        (tmp_path / f"rows{suffix}").write_text("rows")
        arguments = ["compare", folder / "full.npy", folder / "noisy.npy", "--input-format", "logits"]
        arguments += ["--batch-rows", 10, "--rows", f"rows{suffix}", "--json", "o.json"]
        done = forked(*arguments, cwd=tmp_path, first=leave_little_room)
        assert done.returncode == 2, done.stderr
        assert f"A report must go where it can be written. Got rows{suffix}: File too large. It is" in done.stderr
        assert "Traceback" not in done.stderr
        assert "Exception" not in done.stderr
        assert "p99.9" in done.stdout
        assert (tmp_path / f"rows{suffix}").read_text() == "rows"
        assert sorted(file.name for file in tmp_path.iterdir()) == ["o.json", f"rows{suffix}"]


def interrupt_after(batches, times=1):
    """Send SIGINT to this process, that often, once as many batches have been added."""
    left, add, measure.ADDED = batches, measure._add, 1

    def added(result, *rows):
        nonlocal left
        add(result, *rows)
        left -= 1
        if left == 0:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    measure._add = added


def interrupt_at(event):
    """Send it once the file of the rows is opened, or put into place; not where its place is tried."""
    begin = kept_rows.KeptRows.begin

    def begun(*arguments):
        def hook(name, args):
            if name == event and str(args[0]).endswith(".tmp"):
                signal.raise_signal(signal.SIGINT)

        sys.addaudithook(hook)
        begin(*arguments)

    kept_rows.KeptRows.begin = begun


def leave_little_room():
    """While rows are kept; a report, which comes later, has room."""
    import resource

    begin, discard = kept_rows.KeptRows.begin, kept_rows.KeptRows.discard

    def begun(*arguments):
        begin(*arguments)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

    def discarded(*arguments):
        discard(*arguments)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    kept_rows.KeptRows.begin, kept_rows.KeptRows.discard = begun, discarded


class TestErrors:
    def test_another_kind_of_file(self, folder):
        done = run(folder / "full.npy", folder / "int8.npy", "--rows", "rows.csv", code=2)
        assert "--rows must name a file, .npy or .parquet. Got rows.csv." in done.stderr

    def test_it_must_not_take_the_place_of_what_is_read(self, folder):
        done = run(folder / "full.npy", folder / "int8.npy", "--rows", folder / "int8.npy", code=2)
        assert "A report must not take the place of what it is about." in done.stderr.replace("\n", " ")

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
    @pytest.mark.parametrize("suffix", [".npy", ".parquet"])
    @pytest.mark.parametrize("is_link", [False, True])
    def test_a_pipe_stays_one(self, folder, tmp_path, monkeypatch, suffix, is_link):
        """A device too: what is no file is not to be replaced by one."""
        monkeypatch.setattr(compare, "measure_share", None)  # nothing is measured
        pipe, path = tmp_path / f"pipe{suffix}", tmp_path / f"link{suffix}"
        os.mkfifo(pipe)
        path.symlink_to(pipe)
        path = path if is_link else pipe
        done = run(folder / "full.npy", folder / "int8.npy", "--rows", path, code=2)
        assert done.stderr == (
            f"Error: --rows must name a file, which is replaced, or a new one. Got {path}, which is a pipe or a device."
            " Name a file, and copy it there.\n"
        )
        assert pipe.is_fifo()
        assert sorted(tmp_path.iterdir()) == sorted([pipe, tmp_path / f"link{suffix}"])

    def test_without_pyarrow(self, folder, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        done = run(folder / "full.npy", folder / "int8.npy", "--rows", tmp_path / "rows.parquet", code=2)
        assert "--rows into .parquet needs pyarrow: pip install 'klmetric[compare]'." in done.stderr
        assert list(tmp_path.iterdir()) == []
