"""`klmetric compare` of files that have the likeliest classes only, against plain float64 numpy."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import torch
from command import report_of, run
from kld import write_kld
from language import clustered, normalised
from processes import free_port
from safetensors.torch import save_file

from klmetric.command import measure
from klmetric.saved import topk
from klmetric.saved.array import Choice
from klmetric.saved.open import open_saved
from klmetric.saved.tables import reading
from klmetric.saved.tables import topk as lists_topk

SAMPLES, POSITIONS, CLASSES, K = 20, 6, 50, 8
RNG = np.random.default_rng(0)
# In float32, as they are saved.
P = (3 * RNG.normal(size=(SAMPLES, POSITIONS, CLASSES))).astype(np.float32)
Q = P + 0.5 * RNG.normal(size=P.shape).astype(np.float32)
NEAR = P + 0.1 * RNG.normal(size=P.shape).astype(np.float32)
QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99_9": 0.999}
FORMATS = "log_probs,logits"


def top(logits, k=K, dtype=np.float32):
    """The log-probabilities of the likeliest classes, and which they are."""
    log_p = normalised(logits.astype(np.float64))
    ids = np.argsort(-log_p, -1, kind="stable")[..., :k]
    return np.take_along_axis(log_p, ids, -1).astype(dtype), ids.astype(np.int32)


def in_full(logits):
    return normalised(logits.astype(np.float64))


def kl_of(p, q):
    """Of probabilities, in which 0 log 0 is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * np.log(p / q), 0).sum(-1)


def coarse(p, q, known):
    """Both with one class for all that are not known, shape (..., classes + 1)."""
    return [np.concatenate([np.where(known, x, 0), np.where(known, 0, x).sum(-1, keepdims=True)], -1) for x in (p, q)]


def at_least(log_p, log_q, known, direction="forward"):
    p, q = coarse(np.exp(log_p), np.exp(log_q), known)
    if direction == "jensen_shannon":
        return (kl_of(p, (p + q) / 2) + kl_of(q, (p + q) / 2)) / 2
    values = {"forward": kl_of(p, q), "reverse": kl_of(q, p)}
    return values.get(direction, sum(values.values()))


def at_most(log_p, log_q, known, drawn=None):
    """Class by class: the mass that is left goes where q is smallest, none above the least that is known."""
    p, q = np.exp(log_p), np.exp(log_q)
    found = []
    for i in np.ndindex(p.shape[:-1]):
        likely = known[i].copy()
        if drawn is not None:
            likely[drawn[i]] = False
        cap, left, worst = p[i][likely].min(), p[i][~known[i]].sum(), np.where(known[i], p[i], 0)
        for c in sorted(np.flatnonzero(~known[i]), key=lambda c: q[i][c]):
            worst[c] = min(cap, left)
            left -= worst[c]
        found.append(kl_of(worst, q[i]))
    return np.array(found).reshape(p.shape[:-1])


def known_of(ids, classes=CLASSES):
    return (ids[..., None] == np.arange(classes)).any(-2)


def exact(logits, other=Q):
    return kl_of(np.exp(in_full(logits)), np.exp(in_full(other)))


ONES = np.ones((SAMPLES, POSITIONS))


def agree(model, rows, weight=ONES, most=None, mass=None):
    """The report against values of the rows, shape (samples, positions)."""
    for key, x in (("at_least", rows), ("at_most", most), ("tail_mass", mass)):
        if x is None:
            continue
        mean = np.average(x, weights=weight)
        assert model[key]["value"] == pytest.approx(mean, rel=2e-6), key
        assert model[key]["stderr"] == pytest.approx(clustered(x - mean, weight), rel=1e-5), key
        half = 1.96 * model[key]["stderr"]
        assert [model[key]["low"], model[key]["high"]] == pytest.approx([max(0, mean - half), mean + half], rel=1e-5)
    assert model["mean"] == model["at_least"]["value"]
    assert model["count"] == (weight > 0).sum()
    for where, x in ((model, rows), (model["tail_mass"], mass)):
        if x is not None:
            counted = x[weight > 0]
            assert [where[q] for q in QUANTILES] == pytest.approx(np.quantile(counted, [*QUANTILES.values()]), rel=0.01)
            assert where["max"] == pytest.approx(counted.max(), rel=1e-5)


LOG_P, LOG_Q = in_full(P), in_full(Q)
VALUES, IDS = top(P)
KNOWN = known_of(IDS)
LEAST, MOST = at_least(LOG_P, LOG_Q, KNOWN), at_most(LOG_P, LOG_Q, KNOWN)
MASS = np.where(KNOWN, 0, np.exp(LOG_P)).sum(-1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("top_k")
    np.savez(folder / "teacher.npz", log_probs=VALUES, ids=IDS)
    values, ids = top(Q, 5)
    np.savez_compressed(folder / "api.npz", log_probs=values, ids=ids)
    for name, x in (("full", P), ("student", Q), ("near", NEAR)):
        np.save(folder / f"{name}.npy", x)
    return folder


def lists(array):
    return pa.array(array.tolist(), pa.list_(pa.list_(pa.float32() if array.dtype.kind == "f" else pa.int32())))


def arrow(path, table):
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def dataset(folder, table):
    """As `datasets.Dataset.save_to_disk` has it."""
    folder.mkdir()
    for k in range(2):
        arrow(folder / f"data-{k:05}-of-00002.arrow", table.slice(k * SAMPLES // 2, SAMPLES // 2))
    (folder / "dataset_info.json").write_text("{}")
    files = [{"filename": f"data-{k:05}-of-00002.arrow"} for k in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": files}))


def save(folder, kind, values, ids):
    """The path, and the options that say what is in it."""
    path = folder / f"teacher{kind}"
    if kind == ".npy":
        np.save(path, values)
        np.save(folder / "ids.npy", ids)
        return path, ["--indices", folder / "ids.npy"]
    if kind == ".npz":
        np.savez_compressed(path, log_probs=values, ids=ids)
    elif kind == ".safetensors":
        save_file({"log_probs": torch.from_numpy(values), "ids": torch.from_numpy(ids)}, path)
    elif kind == ".pt":
        torch.save({"log_probs": torch.from_numpy(values), "ids": torch.from_numpy(ids).long()}, path)
    elif kind == "shards":
        path.mkdir()
        for k in range(3):
            part = slice(k * 7, (k + 1) * 7)
            np.savez(path / f"part-{k}.npz", log_probs=values[part], ids=ids[part], other=np.zeros(3))
        return path, ["--indices", "ids", "--key", "log_probs"]
    elif kind == "documents":
        arrays = {f"{k}.log_probs": x for k, x in enumerate(values)} | {f"{k}.ids": x for k, x in enumerate(ids)}
        np.savez(folder / "documents.npz", **arrays)
        # The names of the arrays of the students decide nothing: they hold one.
        return folder / "documents.npz", ["--indices", "*.ids", "--key", "*log_probs", "--documents"]
    else:
        table = pa.table({"log_probs": lists(values), "ids": lists(ids), "text": ["a"] * len(values)})
        if kind == ".parquet":
            pq.write_table(table, path, row_group_size=7)
        elif kind == ".feather":
            pa.feather.write_feather(table, path)
        else:
            (dataset if kind == "dataset" else arrow)(path, table)
    return path, ["--indices", "ids"]


KINDS = (".npy", ".npz", ".safetensors", ".pt", "shards", ".parquet", ".arrow", ".feather", "dataset")


class TestFormats:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_same_numbers_in_every_format(self, files, tmp_path, kind):
        path, options = save(tmp_path, kind, VALUES, IDS)
        for extra in ([], ["--batch-rows", 7]):
            report = report_of(path, files / "student.npy", *options, *extra, formats=FORMATS)
            assert (report["classes"], report["top_k"], report["samples"]) == (CLASSES, K, SAMPLES)
            (model,) = report["models"]
            assert "top_k" not in model
            agree(model, LEAST, most=MOST, mass=MASS)

    def test_documents_of_different_lengths(self, tmp_path):
        lengths = [1 + k % POSITIONS for k in range(SAMPLES)]
        arrays = {f"{name}{k}": x[k, :n] for name, x in (("v", VALUES), ("i", IDS)) for k, n in enumerate(lengths)}
        np.savez(tmp_path / "p.npz", **arrays)
        np.savez(tmp_path / "q.npz", **{f"v{k}": Q[k, :n] for k, n in enumerate(lengths)})
        options = ("--key", "v*", "--indices", "i*", "--documents")
        (model,) = report_of(tmp_path / "p.npz", tmp_path / "q.npz", *options, formats=FORMATS)["models"]
        weight = (np.arange(POSITIONS) < np.array(lengths)[:, None]).astype(float)
        agree(model, LEAST, weight, most=MOST, mass=MASS)
        table = {"v": [x[:n].tolist() for x, n in zip(VALUES, lengths, strict=True)]}
        table["i"] = [x[:n].tolist() for x, n in zip(IDS, lengths, strict=True)]
        pq.write_table(pa.table(table), tmp_path / "p.parquet")
        other = report_of(tmp_path / "p.parquet", tmp_path / "q.npz", *options, formats=FORMATS)["models"]
        agree(other[0], LEAST, weight, most=MOST, mass=MASS)

    @pytest.mark.parametrize("kind", ["lists", "rows", "padded"])
    def test_k_may_differ_by_row(self, files, tmp_path, kind):
        ks = RNG.integers(1, K + 1, (SAMPLES, POSITIONS))
        is_there = np.arange(K) < ks[..., None]
        known = known_of(np.where(is_there, IDS, -1))
        student = files / "student.npy"
        if kind == "padded":
            path = tmp_path / "p.npz"
            np.savez(path, v=np.where(is_there, VALUES, np.nan), i=np.where(is_there, IDS, -1))
        else:
            path = tmp_path / "p.parquet"
            table = {
                name: [[row[:n].tolist() for row, n in zip(*both, strict=True)] for both in zip(x, ks, strict=True)]
                for name, x in (("v", VALUES), ("i", IDS))
            }
            if kind == "rows":  # each of them a sample
                table = {name: [row for sample in x for row in sample] for name, x in table.items()}
                student = tmp_path / "student.npy"
                np.save(student, Q.reshape(-1, CLASSES))
            pq.write_table(pa.table(table), path)
        (model,) = report_of(path, student, "--indices", "i", "--batch-rows", 11, formats=FORMATS)["models"]
        rows = at_least(LOG_P, LOG_Q, known), at_most(LOG_P, LOG_Q, known), np.where(known, 0, np.exp(LOG_P)).sum(-1)
        if kind == "rows":
            rows = [x.reshape(-1, 1) for x in rows]
        agree(model, rows[0], np.ones(rows[0].shape), most=rows[1], mass=rows[2])

    def test_columns_of_tensors(self, files, tmp_path):
        """As pyarrow has them."""
        table = {}
        for name, x in (("v", VALUES), ("i", IDS.astype(np.int64))):
            kind = pa.fixed_shape_tensor(pa.from_numpy_dtype(x.dtype), x.shape[1:])
            storage = pa.FixedSizeListArray.from_arrays(x.ravel(), x[0].size)
            table[name] = pa.ExtensionArray.from_storage(kind, storage)
        pq.write_table(pa.table(table), tmp_path / "p.parquet", row_group_size=7)
        both = (tmp_path / "p.parquet", files / "student.npy")
        (model,) = report_of(*both, "--indices", "i", formats=FORMATS)["models"]
        agree(model, LEAST, most=MOST, mass=MASS)
        assert "say --indices i" in run(*both, formats=FORMATS, code=2).stderr

    def test_files_of_documents(self, tmp_path):
        """Each a file of its own; and what says which classes they are of likewise."""
        lengths = [1 + k % POSITIONS for k in range(SAMPLES)]
        for name, x in (("p", VALUES), ("ids", IDS), ("q", Q)):
            (tmp_path / name).mkdir()
            for k, n in enumerate(lengths):
                np.save(tmp_path / name / f"{k}.npy", x[k, :n])
        options = ("--indices", tmp_path / "ids", "--documents")
        (model,) = report_of(tmp_path / "p", tmp_path / "q", *options, formats=FORMATS)["models"]
        weight = (np.arange(POSITIONS) < np.array(lengths)[:, None]).astype(float)
        agree(model, LEAST, weight, most=MOST, mass=MASS)
        for k, other in ((0, 1), (1, 0)):  # of the same longest one
            np.save(tmp_path / "ids" / f"{k}.npy", IDS[k, : lengths[other]])
        error = run(tmp_path / "p", tmp_path / "q", *options, formats=FORMATS, code=2).stderr
        assert "--indices must have the shape of the values." in error

    def test_shards_with_longer_lists(self, files, tmp_path):
        (tmp_path / "p").mkdir()
        for k, part in enumerate(np.split(np.arange(SAMPLES), 2)):
            n = K - 3 * k
            arrays = {"v": lists(VALUES[part, :, :n]), "i": lists(IDS[part, :, :n])}
            pq.write_table(pa.table(arrays), tmp_path / "p" / f"{k}.parquet")
        ids = IDS.copy()
        ids[SAMPLES // 2 :, :, K - 3 :] = -1
        known = known_of(ids)
        report = report_of(tmp_path / "p", files / "student.npy", "--indices", "i", formats=FORMATS)
        assert report["top_k"] == K
        agree(report["models"][0], at_least(LOG_P, LOG_Q, known), most=at_most(LOG_P, LOG_Q, known))

    def test_rows_are_aligned_by_ids(self, tmp_path):
        order = RNG.permutation(SAMPLES * POSITIONS)
        flat = [x.reshape(SAMPLES * POSITIONS, -1) for x in (VALUES, IDS, Q)]
        names = [f"row {k}" for k in range(len(order))]
        table = {"name": names, "v": flat[0].tolist(), "i": flat[1].tolist()}
        pq.write_table(pa.table(table), tmp_path / "p.parquet")
        student = {"name": [names[k] for k in order], "logits": flat[2][order].tolist()}
        pq.write_table(pa.table(student), tmp_path / "q.parquet")
        for paths, formats in ((("p", "q"), FORMATS), (("q", "p"), "logits,log_probs")):
            both = [tmp_path / f"{name}.parquet" for name in paths]
            (model,) = report_of(*both, "--indices", "i", "--id", "name", formats=formats)["models"]
            rows = LEAST if paths[0] == "p" else at_least(LOG_Q, LOG_P, KNOWN)
            assert model["at_least"]["value"] == pytest.approx(rows.mean(), rel=2e-6)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_dtypes(self, files, tmp_path, dtype):
        values = torch.from_numpy(top(P, dtype=np.float64)[0]).to(dtype)
        save_file({"v": values, "i": torch.from_numpy(IDS.astype(np.uint16))}, tmp_path / "p.safetensors")
        path = tmp_path / "p.safetensors"
        (model,) = report_of(path, files / "student.npy", "--indices", "i", "--no-check", formats=FORMATS)["models"]
        of_class = np.full(P.shape, -np.inf)
        np.put_along_axis(of_class, IDS.astype(np.int64), values.double().numpy(), -1)
        p, q = coarse(np.exp(of_class), np.exp(LOG_Q), KNOWN)
        p[..., -1] = np.maximum(1 - p[..., :-1].sum(-1), 0)
        if dtype is not torch.float64:  # what is left of 1 is rounding in some rows, and is taken from the student
            eps = 8 * torch.finfo(dtype).eps
            p[..., -1] = np.where(p[..., -1] <= eps, np.minimum(q[..., -1], eps), p[..., -1])
        p /= p.sum(-1, keepdims=True)
        assert model["at_least"]["value"] == pytest.approx(kl_of(p, q).mean(), rel=2e-6)

    def test_probabilities(self, files, tmp_path):
        np.savez(tmp_path / "p.npz", probs=np.exp(VALUES.astype(np.float64)), ids=IDS)
        both = (tmp_path / "p.npz", files / "student.npy", "--indices", "ids", "--worst", 1)
        (model,) = report_of(*both, formats="probs,logits")["models"]
        agree(model, LEAST, most=MOST, mass=MASS)
        (row,) = model["worst"]
        shown = [one["probability"] for one in row["reference"]]
        assert shown == pytest.approx(np.exp(VALUES[row["sample"], row["position"], :5]), rel=1e-6)

    def test_a_format_for_each_file(self, files, tmp_path):
        """Also where all are in full."""
        np.save(tmp_path / "probs.npy", np.exp(in_full(NEAR)))
        paths = (files / "full.npy", files / "student.npy", tmp_path / "probs.npy")
        report = report_of(*paths, formats="logits,logits,probs")
        means = {model["name"]: model["mean"] for model in report["models"]}
        assert means["student"] == pytest.approx(exact(P).mean(), rel=1e-6)
        assert means["probs"] == pytest.approx(exact(P, NEAR).mean(), rel=1e-6)

    def test_one_class_of_each_row(self, files, tmp_path):
        np.savez(tmp_path / "p.npz", v=VALUES[..., :1], ids=IDS[..., :1])
        (model,) = report_of(tmp_path / "p.npz", files / "student.npy", "--indices", "ids", formats=FORMATS)["models"]
        known = known_of(IDS[..., :1])
        agree(model, at_least(LOG_P, LOG_Q, known), most=at_most(LOG_P, LOG_Q, known))

    def test_names_that_differ(self, files, tmp_path):
        values, ids = top(Q, 5)
        save_file({"v": torch.from_numpy(values), "token_ids": torch.from_numpy(ids)}, tmp_path / "q.safetensors")
        names = ("--indices", "ids", "--indices", "token_ids", "--classes", CLASSES)
        report = report_of(files / "teacher.npz", tmp_path / "q.safetensors", *names, formats="log_probs")
        known = KNOWN & known_of(ids)
        agree(report["models"][0], at_least(LOG_P, LOG_Q, known))

    def test_arrays_that_have_other_names_in_the_models(self, files, tmp_path):
        np.savez(tmp_path / "p.npz", log_probs=VALUES, ids=IDS, other=np.zeros(3))
        np.savez(tmp_path / "q.npz", logits=Q, other=np.zeros(3))
        both = (tmp_path / "p.npz", tmp_path / "q.npz", "--indices", "ids", "--key", "log_probs")
        shutil.copy(tmp_path / "p.npz", tmp_path / "again.npz")
        report = report_of(*both, "--key", "logits", "--floor", tmp_path / "again.npz", formats=FORMATS)
        agree(report["models"][0], LEAST, most=MOST, mass=MASS)
        assert report["options"]["key"] == ["log_probs", "logits"]
        assert report["floor"]["mean"] == 0  # of the reference's key
        error = run(*both, formats=FORMATS, code=2).stderr
        assert "`--key` must match an array. Got 'log_probs', and" in error
        np.savez(tmp_path / "all.npz", p=VALUES, q=Q, ids=IDS)
        both = (tmp_path / "all.npz", tmp_path / "all.npz", "--indices", "ids", "--key", "p", "--key", "q")
        error = run(*both, "--key", "more", formats=FORMATS, code=2).stderr
        assert "--key must be given once, or twice: for the reference, and the models." in error

    def test_two_files_of_numpy(self, tmp_path):
        """Each file of class numbers goes to the next one of its shape."""
        paths = {}
        for name, x in (("p", P), ("q", Q)):
            values, ids = top(x)
            for what, array in (("", values), ("_ids", ids)):
                paths[name + what] = tmp_path / f"{name}{what}.npy"
                np.save(paths[name + what], array)
        named = ("--indices", paths["p_ids"], "--indices", paths["q_ids"], "--classes", CLASSES)
        report = report_of(paths["p"], paths["q"], *named, formats="log_probs")
        agree(report["models"][0], at_least(LOG_P, LOG_Q, KNOWN & known_of(top(Q)[1])))
        error = run(paths["p"], paths["q"], *named[:2], *named[4:], formats="log_probs", code=2).stderr
        assert "--indices must belong to one file of its shape" in error

    def test_what_is_read_in_order_is_read_by_one_thread(self, files, tmp_path):
        for name, x in (("values", VALUES), ("ids", IDS)):
            np.save(tmp_path / f"{name}.npy", x)
            np.savez_compressed(tmp_path / f"{name}.npz", x)
        for kinds in ((".npy", ".npz"), (".npz", ".npy"), (".npy", ".npy")):
            paths = [tmp_path / f"{name}{kind}" for name, kind in zip(("values", "ids"), kinds, strict=True)]
            values, indices = (open_saved(path, Choice()) for path in paths)
            (saved,) = topk.beside([values], [("ids", indices)])
            assert saved.is_sequential == (".npz" in kinds)
            report = report_of(paths[0], files / "student.npy", "--indices", paths[1], formats=FORMATS)
            agree(report["models"][0], LEAST, most=MOST, mass=MASS)


class TestBounds:
    def test_of_each_row(self, files, tmp_path):
        """At least, what all classes give, and at most."""
        teacher, student = files / "teacher.npz", files / "student.npy"
        rows = tmp_path / "rows.parquet"
        report_of(teacher, student, "--indices", "ids", "--rows", rows, formats=FORMATS)
        found = {name: np.array(values) for name, values in pq.read_table(rows).to_pydict().items()}
        assert found["kl"] == pytest.approx(LEAST.flatten(), rel=2e-6)
        assert found["at_most"] == pytest.approx(MOST.flatten(), rel=1e-5)  # of float32
        assert found["tail_mass"] == pytest.approx(MASS.flatten(), rel=1e-5)
        all_classes = exact(P).flatten()
        assert (found["kl"] <= all_classes * (1 + 1e-6)).all()
        assert (all_classes <= found["at_most"] * (1 + 1e-6)).all()
        assert (found["kl"] < 0.99 * all_classes).any()
        full = report_of(files / "full.npy", student)["models"][0]
        (model,) = report_of(teacher, student, "--indices", "ids", formats=FORMATS)["models"]
        assert model["at_least"]["value"] < full["mean"] < model["at_most"]["value"]
        report_of(teacher, student, "--indices", "ids", "--rows", tmp_path / "rows.npy", formats=FORMATS)
        assert np.load(tmp_path / "rows.npy")[0] == pytest.approx(LEAST.flatten(), rel=2e-6)

    @pytest.mark.parametrize("direction", ["reverse", "jeffreys", "jensen_shannon"])
    def test_other_directions_have_no_upper_one(self, files, direction):
        options = ("--indices", "ids", "--direction", direction, "--base", 2)
        (model,) = report_of(files / "teacher.npz", files / "student.npy", *options, formats=FORMATS)["models"]
        assert "at_most" not in model
        agree(model, at_least(LOG_P, LOG_Q, KNOWN, direction) / np.log(2), mass=MASS)

    def test_the_unit_is_not_that_of_a_mass(self, files):
        options = ("--indices", "ids", "--base", 2)
        (model,) = report_of(files / "teacher.npz", files / "student.npy", *options, formats=FORMATS)["models"]
        agree(model, LEAST / np.log(2), most=MOST / np.log(2), mass=MASS)

    def test_a_model_that_has_the_top_k(self, files):
        """Of q the classes that are not known may have next to nothing: there is no upper bound."""
        report = report_of(files / "full.npy", files / "api.npz", "--indices", "ids", formats="logits,log_probs")
        known = known_of(top(Q, 5)[1])
        (model,) = report["models"]
        assert model["top_k"] == 5
        assert "top_k" not in report
        assert "at_most" not in model
        agree(model, at_least(LOG_P, LOG_Q, known), mass=np.where(known, 0, np.exp(LOG_Q)).sum(-1))

    def test_both(self, files):
        options = ("--indices", "ids", "--classes", CLASSES)
        report = report_of(files / "teacher.npz", files / "api.npz", *options, formats="log_probs")
        assert report["classes"] == CLASSES
        known = KNOWN & known_of(top(Q, 5)[1])
        (model,) = report["models"]
        assert "at_most" not in model
        agree(model, at_least(LOG_P, LOG_Q, known), mass=np.where(known, 0, np.exp(LOG_P)).sum(-1))

    def test_models_in_full_and_of_the_top_k_in_one_report(self, files):
        paths = [files / name for name in ("teacher.npz", "near.npy", "api.npz", "student.npy")]
        report = report_of(*paths, "--indices", "ids", formats="log_probs,logits,log_probs,logits")
        assert report["options"]["input_format"] == ["log_probs", "logits", "log_probs", "logits"]
        models = {model["name"]: model for model in report["models"]}
        assert [model["name"] for model in report["models"]] == ["near", "api", "student"]
        agree(models["student"], LEAST, most=MOST, mass=MASS)
        agree(models["near"], at_least(LOG_P, in_full(NEAR), KNOWN), most=at_most(LOG_P, in_full(NEAR), KNOWN))
        agree(models["api"], at_least(LOG_P, LOG_Q, KNOWN & known_of(top(Q, 5)[1])))
        assert models["api"]["at_most"]["value"] == "Infinity"
        for name, x in (("api", at_least(LOG_P, LOG_Q, KNOWN & known_of(top(Q, 5)[1]))), ("student", LEAST)):
            difference = x - at_least(LOG_P, in_full(NEAR), KNOWN)
            assert models[name]["difference"]["mean"] == pytest.approx(difference.mean(), rel=1e-5)
        # The reference in full: then a model in full is known, and has both bounds in one.
        report = report_of(files / "full.npy", *paths[1:3], "--indices", "ids", formats="logits,logits,log_probs")
        models = {model["name"]: model for model in report["models"]}
        agree(models["near"], exact(P, NEAR))
        assert models["near"]["tail_mass"]["max"] == 0
        assert models["api"]["tail_mass"]["max"] > 0

    def test_a_recording(self, files, tmp_path):
        """Whose logits are made as they are read, and whose tokens are known."""
        width = 12
        head, hidden = RNG.normal(size=(CLASSES, width)), RNG.normal(size=(SAMPLES, POSITIONS, width))
        tensors = {
            "head": {"weight": head, "bias": np.zeros(CLASSES)},
            "hidden-00001-of-00001": {"hidden": hidden},
        }
        for name, arrays in tensors.items():
            save_file({k: torch.from_numpy(x).float() for k, x in arrays.items()}, tmp_path / f"{name}.safetensors")
        tokens = torch.zeros(SAMPLES, POSITIONS + 1, dtype=torch.int32)
        save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
        about = {"schema": 1, "rows": "hidden", "windows": SAMPLES, "windows_in_a_shard": SAMPLES}
        about |= {"scale": 1.0, "softcap": None}
        (tmp_path / "klmetric-record.json").write_text(json.dumps(about))
        report = report_of(files / "teacher.npz", tmp_path, "--indices", "ids", formats="log_probs")
        log_q = in_full(hidden.astype(np.float32).astype(float) @ head.astype(np.float32).astype(float).T)
        agree(report["models"][0], at_least(LOG_P, log_q, KNOWN), most=at_most(LOG_P, log_q, KNOWN), mass=MASS)
        assert report["no_targets"] == "of the top k not every token has a probability"

    def test_a_padded_vocabulary(self, files, tmp_path):
        padded = np.concatenate([Q, np.full((SAMPLES, POSITIONS, 14), 9, np.float32)], -1)
        np.save(tmp_path / "q.npy", padded)
        options = ("--indices", "ids", "--classes", CLASSES)
        report = report_of(files / "teacher.npz", tmp_path / "q.npy", *options, formats=FORMATS)
        assert report["classes"] == report["options"]["classes"] == CLASSES
        agree(report["models"][0], LEAST, most=MOST, mass=MASS)
        both = (files / "teacher.npz", tmp_path / "q.npy", files / "near.npy", "--indices", "ids")
        error = run(*both, code=2, formats=FORMATS).stderr
        assert "Files in full must have the same classes. Got 50" in error
        assert "If the last 14 are padding, say --classes 50." in error.replace("\n", " ")

    def test_a_drawn_token(self, files, tmp_path):
        """vLLM puts it before the likeliest ones: others that are not known may be likelier than it."""
        drawn = np.argsort(-LOG_P, -1)[..., 20]
        values = np.concatenate([np.take_along_axis(LOG_P, drawn[..., None], -1), VALUES], -1)
        ids = np.concatenate([drawn[..., None], IDS], -1)
        np.savez(tmp_path / "p.npz", v=values.astype(np.float32), ids=ids)
        both = (tmp_path / "p.npz", files / "student.npy", "--indices", "ids")
        (model,) = report_of(*both, "--sampled", formats=FORMATS)["models"]
        known = known_of(ids)
        agree(model, at_least(LOG_P, LOG_Q, known), most=at_most(LOG_P, LOG_Q, known, drawn))
        error = " ".join(run(*both, formats=FORMATS, code=2).stderr.split())
        assert "Is the first column a drawn token, as vLLM saves it? Then say --sampled; if not, --no-check." in error
        (other,) = report_of(*both, "--no-check", formats=FORMATS)["models"]
        assert other["at_most"]["value"] == "Infinity"  # the others have more than it can be
        run(*both, "--direction", "reverse", formats=FORMATS)  # where there is no upper bound

    def test_a_floor(self, files, tmp_path):
        values, ids = top(P + 1e-3 * RNG.normal(size=P.shape))
        np.savez(tmp_path / "again.npz", log_probs=values, ids=ids)
        both = (files / "teacher.npz", files / "student.npy", "--floor", tmp_path / "again.npz", "--indices", "ids")
        report = report_of(*both, formats=FORMATS)
        agree(report["models"][0], LEAST, most=MOST, mass=MASS)
        assert report["floor"]["mean"] < 1e-4
        assert report["models"][0]["above_floor"]["mean"] == pytest.approx(LEAST.mean(), abs=1e-4)


class TestRowsThatCount:
    def test_targets_are_a_mask_alone(self, files, tmp_path):
        targets = IDS[..., 0].copy()
        targets[:, 0] = -100
        np.save(tmp_path / "targets.npy", targets)
        both = (files / "teacher.npz", files / "student.npy", "--indices", "ids")
        report = report_of(*both, "--targets", tmp_path / "targets.npy", formats=FORMATS)
        weight = ONES.copy()
        weight[:, 0] = 0
        agree(report["models"][0], LEAST, weight, most=MOST, mass=MASS)
        assert report["no_targets"] == "of the top k not every token has a probability"
        assert not {"perplexity", "delta_p"} & report["models"][0].keys()
        printed = run(*both, "--targets", tmp_path / "targets.npy", formats=FORMATS).stdout
        assert "No perplexity of the tokens: of the top k not every token has a probability." in printed

    def test_what_is_masked_may_be_anything(self, files, tmp_path):
        values, ids, mask = VALUES.copy(), IDS.copy(), ONES.copy()
        values[3, 1], ids[4, 2], mask[3, 1], mask[4, 2] = np.nan, 10**6, 0, 0
        np.savez(tmp_path / "p.npz", v=values, ids=ids)
        np.save(tmp_path / "mask.npy", mask)
        both = (tmp_path / "p.npz", files / "student.npy", "--indices", "ids")
        report = report_of(*both, "--mask", tmp_path / "mask.npy", formats=FORMATS)
        agree(report["models"][0], LEAST, mask, most=MOST, mass=MASS)

    def test_rows_that_are_no_distributions(self, files, tmp_path):
        values = VALUES.copy()
        values[3, 1, 0] = 0.0  # a probability of 1, and the others besides
        np.savez(tmp_path / "p.npz", v=values, ids=IDS)
        both = (tmp_path / "p.npz", files / "student.npy", "--indices", "ids")
        error = run(*both, formats=FORMATS, code=2).stderr.replace("\n", " ")
        assert "Got sample 3, position 1 of" in error
        assert "has probabilities that add up to" in error
        (model,) = report_of(*both, "--nan-strategy", "ignore", formats=FORMATS)["models"]
        weight = ONES.copy()
        weight[3, 1] = 0
        agree(model, LEAST, weight, most=MOST, mass=MASS)
        assert model["invalid"] == 1

    def test_groups(self, files, tmp_path):
        (tmp_path / "groups.txt").write_text("\n".join("ab"[k % 2] for k in range(SAMPLES)))
        both = (files / "teacher.npz", files / "student.npy", "--indices", "ids", "--groups", tmp_path / "groups.txt")
        (model,) = report_of(*both, formats=FORMATS)["models"]
        for k, name in enumerate("ab"):
            assert model["groups"][name]["mean"] == pytest.approx(LEAST[k::2].mean(), rel=2e-6)


class TestWorst:
    def test_the_likeliest_of_what_is_known(self, files, tmp_path):
        targets = np.full((SAMPLES, POSITIONS), CLASSES - 1)
        np.save(tmp_path / "targets.npy", targets)
        both = (files / "teacher.npz", files / "api.npz", "--indices", "ids", "--classes", CLASSES, "--worst", 3)
        (model,) = report_of(*both, "--targets", tmp_path / "targets.npy", formats="log_probs")["models"]
        rows = at_least(LOG_P, LOG_Q, KNOWN & known_of(top(Q, 5)[1]))
        for row, at in zip(model["worst"], np.argsort(-rows, None), strict=False):
            i = np.unravel_index(at, rows.shape)
            assert (row["sample"], row["position"]) == i
            assert row["kl"] == pytest.approx(rows[i], rel=2e-6)
            for side, logs in (("reference", LOG_P[i]), ("model", LOG_Q[i])):
                order = np.argsort(-logs)[:5]
                assert [one["class"] for one in row[side]] == order.tolist()
                assert [one["probability"] for one in row[side]] == pytest.approx(np.exp(logs[order]), rel=1e-5)
            assert row["target"]["class"] == CLASSES - 1
            for side, ids in (("reference", IDS[i]), ("model", top(Q, 5)[1][i])):
                is_known = CLASSES - 1 in ids
                assert (row["target"][side] is not None) == is_known
        printed = run(*both, "--targets", tmp_path / "targets.npy", formats="log_probs").stdout
        assert "p not known" in printed
        assert "q not known" in printed

    def test_few_that_are_known(self, tmp_path, files):
        np.savez(tmp_path / "p.npz", v=VALUES[..., :2], ids=IDS[..., :2])
        both = (tmp_path / "p.npz", files / "student.npy", "--indices", "ids", "--worst", 1)
        (row,) = report_of(*both, formats=FORMATS)["models"][0]["worst"]
        assert [len(row[side]) for side in ("reference", "model")] == [2, 5]
        i = row["sample"], row["position"]
        shown = [one["probability"] for one in row["model"]]
        assert shown == pytest.approx(np.sort(np.exp(LOG_Q[i]))[::-1][:5], rel=1e-5)


@pytest.fixture
def given(files):
    paths = [files / name for name in ("teacher.npz", "student.npy", "near.npy")]
    return [*paths, "--indices", "ids"]


class TestForms:
    def test_table(self, given):
        printed = run(*given, formats=FORMATS).stdout
        said = "".join(printed.split())  # a long path is broken anywhere
        assert re.match(r"KLdivergencefrom\S*teacher\.npz,atleast\(nats\)", said)
        for label in ("mean, at least", "mean, at most", "Probability of the classes that are not known", "p99.9"):
            assert label in printed
        for text in (
            f"At least: {K} classes of a row are known of {given[0]}. The others count as one",
            "At most: the largest that the classes which are not known allow",
        ):
            assert "".join(text.split()) in said
        assert "Nothingisknownofit" not in said
        plain = run(*given[1:3]).stdout
        assert "at least" not in plain
        assert "not known" not in plain

    def test_what_nothing_is_known_of(self, given, files):
        printed = run(*given, files / "api.npz", formats="log_probs,logits,logits,log_probs").stdout
        assert "Nothing is known of it for api." in printed.replace("\n", " ")

    def test_no_floor_is_advised(self, files, tmp_path):
        np.save(tmp_path / "q.npy", np.where(np.arange(CLASSES) == IDS[..., :1], -np.inf, Q).astype(np.float32))
        printed = run(files / "teacher.npz", tmp_path / "q.npy", "--indices", "ids", formats=FORMATS).stdout
        assert "120 rows are infinite" in printed
        assert "--eps" not in printed

    def test_markdown(self, given):
        printed = run(*given, "--markdown", formats=FORMATS).stdout
        assert ", at least (nats)**" in printed
        assert re.search(r"\| mean, at most \| \d", printed)

    def test_csv(self, given):
        text = run(*given, "--csv", "-", formats=FORMATS).stdout
        lines = {line["name"]: line for line in csv.DictReader(io.StringIO(text))}
        models = report_of(*given, formats=FORMATS)["models"]
        for model in models:
            line = lines[model["name"]]
            for key in ("at_least", "at_most", "tail_mass"):
                assert float(line[key]) == model[key]["value"]
                assert float(line[f"{key}_stderr"]) == model[key]["stderr"]
            # By the names of `KLDivergenceSummary(bounds=True)`.
            for name in (*QUANTILES, "max"):
                assert float(line[f"tail_mass_{name}"]) == model["tail_mass"][name]

    def test_page_and_picture(self, given, tmp_path):
        run(*given, "--html", tmp_path / "o.html", "--plot", tmp_path / "o.svg", formats=FORMATS)
        page = (tmp_path / "o.html").read_text()
        assert "<h1>KL divergence from teacher.npz, at least</h1>" in page
        assert re.search(r"near has the least bound of 2: at least 0\.\d+ nats in the mean", page)
        assert "it is at least what stands here, in every row" in page
        assert "It is at most what it would be" in page
        assert (tmp_path / "o.svg").read_bytes().startswith(b"<?xml")

    def test_names_are_those_of_the_library(self, given):
        from klmetric import KLDivergenceSummary

        summary = KLDivergenceSummary(bounds=True)
        summary.update(torch.rand(2, 3), torch.rand(2, 3))
        names = {re.sub(r"_stderr$", "", key) for key in summary.compute()}
        (model, _) = report_of(*given, formats=FORMATS)["models"]
        ours = {*model, *(f"tail_mass_{name}" for name in model["tail_mass"])}
        assert names - ours == set()


class TestLimits:
    @pytest.mark.parametrize(
        "key", ["at_least", "at_most", "at_most.high", "tail_mass", "tail_mass.p99_5", "tail_mass.max", "tail_mass.low"]
    )
    def test_every_value_has_a_limit(self, files, key):
        both = (files / "teacher.npz", files / "student.npy", "--indices", "ids")
        (model,) = report_of(*both, "--fail-above", f"{key}=1e9", formats=FORMATS)["models"]
        of, _, last = key.partition(".")
        value = model[of][last or "value"]
        assert 0 < value < 1e9
        run(*both, "--fail-above", f"{key}={1.001 * value}", "--fail-below", f"{key}={0.999 * value}", formats=FORMATS)
        above = run(*both, "--fail-above", f"{key}={0.999 * value}", formats=FORMATS, code=1)
        assert f"Failed: student: {key} = " in above.stderr
        below = run(*both, "--fail-below", f"{key}={1.001 * value}", formats=FORMATS, code=1)
        assert "is below" in below.stderr

    def test_what_has_no_upper_bound_exceeds_every_limit(self, files):
        paths = [files / name for name in ("teacher.npz", "student.npy", "api.npz")]
        given = (*paths, "--indices", "ids", "--fail-above", "at_most=1000")
        done = run(*given, formats="log_probs,logits,log_probs", code=1)
        assert "Failed: api: at_most = inf is above 1000" in done.stderr
        assert "student" not in done.stderr

    @pytest.mark.parametrize(
        ("key", "extra", "message"),
        [
            (
                "at_most",
                ["--direction", "reverse"],
                "A limit of at_most needs --indices of the reference, a model that",
            ),
            ("jensen_shannon", [], "A limit of jensen_shannon needs files that have all classes. Got none."),
            ("perplexity.ratio", [], "A limit of perplexity needs files that have all classes. Got none."),
            ("tail_mass.p101", [], "Got 'tail_mass.p101'. Did you mean 'tail_mass'?"),
            ("at_most.p50", [], "Got 'at_most.p50'. Did you mean 'at_most'?"),
        ],
    )
    def test_of_what_there_is_not(self, files, key, extra, message):
        both = (files / "teacher.npz", files / "student.npy", "--indices", "ids", *extra)
        assert message in run(*both, "--fail-above", f"{key}=1", formats=FORMATS, code=2).stderr.replace("\n", " ")

    @pytest.mark.parametrize("key", ["at_least", "at_most", "tail_mass.p50"])
    def test_of_files_in_full(self, files, key):
        error = run(files / "full.npy", files / "student.npy", "--fail-above", f"{key}=1", code=2).stderr
        assert f"A limit of {key.partition('.')[0]} needs --indices" in error


WHOLE = pa.list_(pa.int64())


class TestErrors:
    def raises(self, message, *arguments, formats=FORMATS):
        error = run(*arguments, formats=formats, code=2).stderr.replace("\n", " ")
        assert message in error, error

    @pytest.mark.parametrize("key", [[], ["--key", "log_probs"]])
    @pytest.mark.parametrize("kind", [".npz", ".safetensors", ".pt", ".parquet"])
    def test_nothing_is_guessed(self, files, tmp_path, kind, key):
        """Values beside the numbers of classes are no rows in full."""
        path, _ = save(tmp_path, kind, VALUES, IDS)
        key = [] if kind == ".parquet" else key
        message = "If they are the numbers of its classes (a top k), say --indices ids"
        self.raises(message, path, files / "student.npy", *key)
        self.raises(message, files / "student.npy", path, *key)
        self.raises("'log_probs' and 'ids', whole numbers of the same shape", path, path, *key)

    def test_what_is_no_number_of_a_class_is_not_asked_about(self, tmp_path):
        one_hot = np.eye(CLASSES, dtype=int)[P.argmax(-1)]
        np.savez(tmp_path / "q.npz", logits=Q)
        labels, floats = RNG.integers(0, 99, P.shape), np.broadcast_to(100.0 * np.arange(CLASSES), P.shape)
        for beside in (one_hot, np.argsort(P, -1), one_hot > 0, np.arange(SAMPLES), labels, floats):
            np.savez(tmp_path / "p.npz", logits=P, other=beside)
            (model,) = report_of(tmp_path / "p.npz", tmp_path / "q.npz", "--key", "logits")["models"]
            assert model["mean"] == pytest.approx(exact(P).mean(), rel=1e-6)
        np.savez(tmp_path / "ids.npz", logits=P[..., :K], other=IDS)
        np.savez(tmp_path / "q.npz", logits=Q[..., :K])
        both = (tmp_path / "ids.npz", tmp_path / "q.npz", "--key", "logits")
        self.raises("say --indices other", *both, formats="logits")
        assert report_of(*both, "--no-check")["classes"] == K

    def test_values_without_the_numbers_of_their_classes(self, files, tmp_path):
        np.save(tmp_path / "p.npy", VALUES)
        np.save(tmp_path / "q.npy", top(Q)[0])
        message = f"Is one of them of the top {K}? Then name what says which classes they are with --indices."
        self.raises(message, tmp_path / "p.npy", files / "student.npy")
        message = "Are they the top k? Then name what says which classes they are of with --indices"
        self.raises(message, tmp_path / "p.npy", tmp_path / "q.npy", formats="log_probs")
        np.save(tmp_path / "p.npy", np.exp(VALUES))
        self.raises(message, tmp_path / "p.npy", tmp_path / "p.npy", formats="probs")
        run(tmp_path / "p.npy", tmp_path / "p.npy", "--no-check", formats="probs")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                ["--temperature", 2],
                "--temperature must be 1 with --indices: what normalises at another one is a sum over",
            ),
            (["--eps", 1e-9], "--eps must be 0 with --indices: a floor is under single classes"),
            (["--more"], "--more needs all classes"),
            (
                ["--indices", "tokens"],
                "--indices must name an array, a column or a file. Got 'tokens', which is no file",
            ),
            (["--indices", "nowhere.npy"], "--indices: nowhere.npy does not exist."),
            (["--classes", 51], "--classes must be no more than every file has. Got 51"),
            (["--classes", 40], "--indices must be classes, from 0 to 39, or negative for padding. Got 4"),
            (["--indices", "log_probs"], "One of --indices must be in a file. Got ids, log_probs in"),
            (["--key", "nothing"], "`--key` must match an array. Got 'nothing'"),
        ],
    )
    def test_options(self, files, options, message):
        self.raises(message, files / "teacher.npz", files / "student.npy", "--indices", "ids", *options)

    def test_sampled_alone(self, files):
        self.raises("--sampled is of the top k. Got it without --indices.", *[files / "full.npy"] * 2, "--sampled")

    @pytest.mark.parametrize("formats", ["logits", "log_probs,logits"])
    def test_logits(self, files, formats):
        both = (files / "full.npy", files / "api.npz")
        message = "--input-format of the top k must be log_probs or probs. Got logits for"
        self.raises(message, *both, "--indices", "ids", formats=formats)
        self.raises("what normalises them is a sum over all classes", *both, "--indices", "ids", formats=formats)

    @pytest.mark.parametrize(
        ("given", "places", "better"),
        [
            ("logits", {0: "probs"}, "probs,logits"),
            ("logits", {2: "probs"}, "logits,probs"),
            ("probs,logits,probs", {1: "probs"}, "probs"),
            ("logits,logits,probs,probs", {1: "probs"}, "logits,probs"),
            ("logits,probs,logits,probs", {2: "probs"}, "logits,probs"),
            ("probs,logits,logits,probs", {2: "probs"}, "probs,logits,probs,probs"),
        ],
    )
    def test_the_option_that_is_advised(self, tmp_path, given, places, better):
        formats = given.split(",")
        files = max(len(formats), max(places) + 1, 2)
        formats = formats if len(formats) == files else [formats[0], *[formats[-1]] * (files - 1)]
        for k, its_format in enumerate(formats):
            is_probs = places.get(k, its_format) == "probs"
            np.save(tmp_path / f"{k}.npy", np.exp(LOG_P) if is_probs else P)
        paths = [tmp_path / f"{k}.npy" for k in range(files)]
        self.raises(f"If so, say --input-format {better};", *paths, formats=given)

    def test_formats_must_be_as_many_as_files(self, files):
        paths = [files / name for name in ("teacher.npz", "near.npy", "api.npz", "student.npy")]
        message = "or a pair for the reference and the models, or one for each file. Got 3 for 4 files"
        self.raises(message, *paths, "--indices", "ids", formats="log_probs,logits,log_probs")

    @pytest.mark.parametrize(
        ("change", "formats", "message"),
        [
            (lambda v: v + 9, FORMATS, "The top k must not add up to more than 1. Got"),
            (np.exp, FORMATS, "Are they probabilities? Then say so with --input-format probs,logits."),
            (
                lambda v: v,
                "probs,logits",
                "Are they log-probabilities? Then say so with --input-format log_probs,logits.",
            ),
            (normalised, FORMATS, "Were they normalised over the k?"),
            (lambda v: np.exp(normalised(v)), "probs,logits", "Were they normalised over the k?"),
            (lambda v: v, None, "looks like log_probs: nothing is above 0."),
            (np.exp, None, "looks like probs: nothing is below 0, or above 1."),
            (lambda v: v + 3, None, "looks like logits, of which the top k are not enough"),
        ],
    )
    def test_other_values_than_were_said(self, files, tmp_path, change, formats, message):
        np.savez(tmp_path / "p.npz", v=change(VALUES), ids=IDS)
        self.raises(message, tmp_path / "p.npz", files / "student.npy", "--indices", "ids", formats=formats)

    def test_normalised_all_the_same(self, files, tmp_path):
        np.savez(tmp_path / "p.npz", v=normalised(VALUES), ids=IDS)
        run(tmp_path / "p.npz", files / "student.npy", "--indices", "ids", "--no-check", formats=FORMATS)

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            (
                {"v": VALUES, "ids": IDS.astype(np.float32)},
                "--indices must be integers, the numbers of classes. Got float32",
            ),
            ({"v": VALUES, "ids": IDS > 3}, "--indices must be integers, the numbers of classes. Got bool"),
            ({"v": VALUES, "ids": IDS[..., :3]}, "--indices must have the shape of the values. Got (20, 6, 3)"),
            ({"v": VALUES, "w": VALUES, "ids": IDS}, "`--key` must say which array to take"),
            ({"v": VALUES[:0], "ids": IDS[:0]}, "Predictions must have rows and classes."),
            ({"v": VALUES[:3], "ids": IDS[:3]}, "Both must have the same rows."),
        ],
    )
    def test_arrays_that_do_not_go_together(self, files, tmp_path, arrays, message):
        np.savez(tmp_path / "p.npz", **arrays)
        self.raises(message, tmp_path / "p.npz", files / "student.npy", "--indices", "ids")

    def test_a_pattern_that_fits_more(self, files, tmp_path):
        np.savez(tmp_path / "p.npz", v=VALUES, ids=IDS, ids2=IDS)
        both = (tmp_path / "p.npz", files / "student.npy", "--indices", "ids*")
        self.raises("--indices must match an array for each one of values. Got ids, ids2 for v", *both)

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"v": [[0.5, 0.2]], "ids": [[1, 2, 3]]}, "Each list of values must have as many numbers of classes."),
            ({"v": [[0.5, 0.2]], "ids": [[[1, 2]]]}, "Each list of values must have as many numbers of classes."),
            ({"v": [[[[0.5]]]], "ids": [[[[1]]]]}, "or lists of these. Got 3 levels"),
            (
                {"v": [[0.5, 0.2]], "ids": [[1, None]]},
                "The numbers of classes must be there. Got one missing in column",
            ),
            ({"v": [[0.5]], "ids": pa.array([None], WHOLE)}, "Every row must have a list of classes."),
            ({"v": [[0.5]], "ids": [1]}, "where 'ids' has no lists of whole numbers"),
            (
                {"v": [0.5], "w": [0.1], "ids": [[1]]},
                "Top-k predictions in a table must be a column of lists of values",
            ),
            (
                {"v": pa.array([[]], pa.list_(pa.float32())), "ids": pa.array([[]], WHOLE)},
                "must have rows and classes.",
            ),
            ({"v": [[[0.5]], []], "ids": [[[1]], []]}, "Every document must have rows."),
            ({"v": [[0.5]], "w": [[0.5]], "ids": [[1]]}, "2 columns of lists"),
        ],
    )
    def test_tables(self, files, tmp_path, columns, message):
        pq.write_table(pa.table(columns), tmp_path / "p.parquet")
        np.save(tmp_path / "q.npy", Q[0, :1])
        self.raises(message, tmp_path / "p.parquet", tmp_path / "q.npy", "--indices", "ids", formats="probs,logits")

    def test_a_column_that_two_patterns_fit(self, files, tmp_path):
        path, _ = save(tmp_path, ".parquet", VALUES, IDS)
        both = (path, files / "student.npy", "--indices", "*s", "--columns", "log_probs")
        self.raises("--indices must name one column of a table. Got log_probs, ids in", *both)

    def test_no_number_of_classes(self, files):
        both = (files / "teacher.npz", files / "api.npz", "--indices", "ids")
        self.raises("--classes must say how many classes there are (the vocabulary)", *both, formats="log_probs")

    def test_a_shard_without(self, files, tmp_path):
        (tmp_path / "p").mkdir()
        np.savez(tmp_path / "p" / "a.npz", v=VALUES[:10], ids=IDS[:10])
        np.savez(tmp_path / "p" / "b.npz", v=VALUES[10:])
        both = (tmp_path / "p", files / "student.npy", "--indices", "ids")
        self.raises("--indices must be in every shard, or in none. Got", *both)

    def test_a_file_of_llama_cpp(self, files, tmp_path):
        write_kld(tmp_path / "q.kld", torch.from_numpy(Q), np.zeros(SAMPLES * 13, np.int32), 13)
        both = (files / "teacher.npz", tmp_path / "q.kld", "--indices", "ids")
        self.raises("A file of llama.cpp cannot be compared with the top k.", *both, formats="log_probs")

    def test_a_report_takes_the_place_of_no_input(self, tmp_path, files):
        path, options = save(tmp_path, ".npy", VALUES, IDS)
        message = "A report must not take the place of what it is about."
        self.raises(message, path, files / "student.npy", *options, "--rows", tmp_path / "ids.npy")


class TestMemory:
    def test_no_more_is_held_of_a_table_than_a_part(self, files, tmp_path, monkeypatch):
        path, options = save(tmp_path, ".parquet", np.tile(VALUES, (30, 1, 1)), np.tile(IDS, (30, 1, 1)))
        np.save(tmp_path / "q.npy", np.tile(Q, (30, 1, 1)))
        monkeypatch.setattr(reading, "NUMBERS", 500)
        monkeypatch.setattr(lists_topk, "NUMBERS", 500)
        longest, levels, padded = [], lists_topk.levels, reading.padded
        monkeypatch.setattr(lists_topk, "levels", lambda x, *a: longest.append(len(x)) or levels(x, *a))
        monkeypatch.setattr(reading, "padded", lambda x, *a: longest.append(len(x)) or padded(x, *a))
        (model,) = report_of(path, tmp_path / "q.npy", *options, formats=FORMATS)["models"]
        assert model["mean"] == pytest.approx(LEAST.mean(), rel=2e-6)
        assert len(longest) > 100
        assert max(longest) <= 500 // (POSITIONS * K)

    def test_batches_are_of_the_widest_file(self, files, monkeypatch):
        """The values of a teacher are few, but not the logits that they are compared with."""
        monkeypatch.setattr(measure, "BATCHES", 3 * 4 * CLASSES * 10)
        rows = []
        batch = measure.measure_batch
        monkeypatch.setattr(
            measure,
            "measure_batch",
            lambda task, start, stop, *a: rows.append(stop - start) or batch(task, start, stop, *a),
        )
        run(files / "teacher.npz", files / "student.npy", "--indices", "ids", formats=FORMATS)
        assert max(rows) == 10


def report_in_processes(rank, size, arguments, folder):
    done = run(*arguments, "--json", folder / f"{size}.json", "--rows", folder / f"{size}.npy", formats=FORMATS)
    return done.stdout


def test_in_several_processes(files, tmp_path, processes):
    given = [files / "teacher.npz", files / "student.npy", files / "near.npy", "--indices", "ids"]
    alone = report_in_processes(0, 1, given, tmp_path)
    printed = processes(report_in_processes, given, tmp_path)
    size = len(printed)
    assert [" ".join(text.split()) for text in printed] == [" ".join(alone.split()), *[""] * (size - 1)]
    assert (tmp_path / f"{size}.json").read_text() == (tmp_path / "1.json").read_text()
    assert (tmp_path / f"{size}.npy").read_bytes() == (tmp_path / "1.npy").read_bytes()


@pytest.mark.slow
def test_under_torchrun(files, tmp_path):
    given = [files / "teacher.npz", files / "student.npy", "--indices", "ids", "--fail-above", "at_most=1e-9"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    command += [f"--master-port={free_port()}", "-m", "klmetric", "compare", *map(str, given)]
    command += ["--input-format", FORMATS, "--json", "2.json"]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stderr
    alone = run(*given, "--json", tmp_path / "1.json", formats=FORMATS, code=1)
    assert done.stdout == alone.stdout
    assert (tmp_path / "2.json").read_text() == (tmp_path / "1.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("extra", "status"), [([], 0), (["--fail-above", "at_most=0"], 1), (["--eps", "0.1"], 2)])
def test_the_command_itself(files, tmp_path, extra, status):
    command = [sys.executable, "-m", "klmetric", "compare", "teacher.npz", "student.npy", "--indices", "ids"]
    done = subprocess.run(
        [*command, "--input-format", FORMATS, *extra], cwd=files, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    assert ("mean, at most" in done.stdout) == (status < 2)
    assert "Traceback" not in done.stderr
