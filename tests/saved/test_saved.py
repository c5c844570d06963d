"""What files hold: the order of shards, documents of different lengths, names, and arrays that are the same."""

import os
import pkgutil
import sys
import weakref
import zipfile
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from command import report_of, run
from kld import write_kld
from safetensors.torch import save_file
from torch import Tensor

from klmetric.saved import kept
from klmetric.saved.array import Choice, Saved
from klmetric.saved.open import FORMATS


def noisy(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p = 3 * torch.randn(*shape, generator=generator)
    return p, p + 0.2 * torch.randn(*shape, generator=generator)


def rows_of(p: Tensor, q: Tensor) -> np.ndarray:
    """In float64 numpy, straight from the definition."""
    p, q = (x.numpy().astype(np.float64) for x in (p, q))
    log_p, log_q = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in (p, q))
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def save_arrays(path: Path, arrays: dict[str, Tensor]) -> Path:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".npz":
        np.savez_compressed(path, **{name: x.numpy() for name, x in arrays.items()})
    elif path.suffix == ".safetensors":
        save_file({name: x.contiguous() for name, x in arrays.items()}, path)
    else:
        torch.save(arrays, path)
    return path


KEYED = [".npz", ".safetensors", ".pt"]


class TestShards:
    """Arrays of several files, without an index."""

    def folder(self, path, x, files, suffix, name="logits.{}"):
        for file, numbers in files.items():
            save_arrays(path / f"{file}{suffix}", {name.format(k): x[k] for k in numbers})
        return path

    @pytest.mark.parametrize("suffix", KEYED)
    @pytest.mark.parametrize(
        "files",
        [
            {"a": [0, 2, 4], "b": [1, 3, 5]},
            {"a": [3, 4, 5], "b": [0, 1, 2]},
            {"x-1": [10], "x-2": [9, 11], "x-10": [2]},
        ],
        ids=["in_turn", "the_last_first", "more_digits"],
    )
    def test_numbers_run_on_over_the_files(self, tmp_path, suffix, files):
        p, q = noisy(12, 20, 10)
        numbers = sorted(k for some in files.values() for k in some)
        one = save_arrays(tmp_path / f"q{suffix}", {f"logits.{k}": q[k] for k in numbers})
        folder = self.folder(tmp_path / "p", p, files, suffix)
        model = report_of(folder, one, "--key", "logits.*", "--worst", 1)["models"][0]
        values = rows_of(p[numbers], q[numbers]).ravel()
        assert model["mean"] == pytest.approx(values.mean(), rel=1e-5)
        assert model["worst"][0]["sample"] == values.argmax()

    @pytest.mark.parametrize("suffix", KEYED)
    def test_each_file_begins_anew(self, tmp_path, suffix):
        p, q = noisy(5, 20, 10)
        for name, x in (("p", p), ("q", q)):
            save_arrays(tmp_path / name / f"part-1{suffix}", {"logits.0": x[0], "logits.1": x[1], "logits.2": x[2]})
            save_arrays(tmp_path / name / f"part-2{suffix}", {"logits.0": x[3], "logits.1": x[4]})
        model = report_of(tmp_path / "p", tmp_path / "q", "--key", "logits.*", "--worst", 1)["models"][0]
        assert model["worst"][0]["sample"] == rows_of(p, q).argmax()

    @pytest.mark.parametrize(
        "files",
        [
            {"a": ["b"], "b": ["a"]},  # no numbers, and the files say otherwise
            {"a": ["x.1", "x.2"], "b": ["x.2", "x.3"]},
            {"a": ["x.1"], "b": ["x.01"]},
        ],
        ids=["no_numbers", "twice", "two_that_read_the_same"],
    )
    def test_no_clear_order(self, tmp_path, files):
        p, _ = noisy(20, 10)
        for file, names in files.items():
            save_arrays(tmp_path / "p" / f"{file}.npz", dict.fromkeys(names, p))
        error = run(tmp_path / "p", tmp_path / "p", "--key", "*", code=2).stderr.replace("\n", " ")
        assert (
            "Arrays of several files must have numbers that run on over the files, or begin anew in each. Got" in error
        )
        assert "save them under other names" in error


class TestTheSameArray:
    @pytest.mark.parametrize("suffix", KEYED)
    @pytest.mark.parametrize("link", [None, os.symlink, os.link], ids=["itself", "symlink", "hard_link"])
    def test_a_key_names_it_on_both_sides(self, tmp_path, suffix, link):
        p, q = noisy(20, 10)
        both = other = save_arrays(tmp_path / f"both{suffix}", {"full": p, "int8": q})
        if link is not None:
            other = tmp_path / f"other{suffix}"
            link(both, other)
        error = run(both, other, "--key", "int8", code=2).stderr.replace("\n", " ")
        assert "--key must not name the same array on both sides. Got 'int8' of one file as" in error
        assert "Save the array of the model in a file of its own." in error
        separate = save_arrays(tmp_path / f"separate{suffix}", {"int8": q})
        assert report_of(both, separate, "--key", "int8")["models"][0]["mean"] == 0, "a copy"

    @pytest.mark.parametrize("kind", ["file", "symlink", "folder", "folder_of_links"])
    def test_a_file_on_both_sides_is_noted(self, tmp_path, kind):
        p, q = noisy(20, 10)
        (tmp_path / "p").mkdir()
        np.save(tmp_path / "p" / "0.npy", p.numpy())
        np.save(tmp_path / "q.npy", q.numpy())
        (tmp_path / "links").mkdir()
        (tmp_path / "links" / "0.npy").symlink_to(tmp_path / "p" / "0.npy")
        (tmp_path / "folder").symlink_to(tmp_path / "p")
        first = {"file": "p/0.npy", "symlink": "p/0.npy", "folder": "p", "folder_of_links": "p"}[kind]
        second = {"file": "p/0.npy", "symlink": "links/0.npy", "folder": "folder", "folder_of_links": "links"}[kind]
        printed = run(tmp_path / first, tmp_path / second, tmp_path / "q.npy", "--markdown").stdout
        assert printed.count("it is read from the same file as the reference") == 1
        report = report_of(tmp_path / first, tmp_path / second, tmp_path / "q.npy")
        assert [model.get("same_arrays") for model in report["models"]] == [1, None]

    @pytest.mark.parametrize("names", [(1, "1"), (1.5, "1.5"), ("None", None)], ids=str)
    def test_two_keys_that_read_the_same(self, tmp_path, names):
        p, q = noisy(20, 10)
        torch.save(dict(zip(names, (p, q), strict=True)), tmp_path / "two.pt")
        np.save(tmp_path / "q.npy", q.numpy())
        error = run(tmp_path / "q.npy", tmp_path / "two.pt", "--key", str(names[0]), code=2).stderr.replace("\n", " ")
        assert f"Arrays must have names of their own. Got two that read '{names[0]}' in" in error

    def test_two_members_of_one_name(self, tmp_path):
        np.save(tmp_path / "q.npy", noisy(20, 10)[1].numpy())
        with zipfile.ZipFile(tmp_path / "two.npz", "w") as file:
            file.write(tmp_path / "q.npy", "x.npy")
            file.write(tmp_path / "q.npy", "x")
        error = run(tmp_path / "q.npy", tmp_path / "two.npz", "--key", "x", code=2).stderr.replace("\n", " ")
        assert "Arrays must have names of their own. Got two that read 'x' in" in error


class TestOrderAndNames:
    @pytest.mark.parametrize("suffix", [".npy", ".npz"])
    @pytest.mark.parametrize("shape", [(50, 10), (9, 7, 10), (5, 1, 10), (1, 6, 10)], ids=str)
    @pytest.mark.parametrize("dtype", ["<f4", ">f8"])
    def test_fortran_order(self, tmp_path, suffix, shape, dtype):
        p, q = noisy(*shape)
        array = np.asfortranarray(p.numpy().astype(dtype))
        path = tmp_path / f"p{suffix}"
        np.save(path, array) if suffix == ".npy" else np.savez_compressed(path, p=array)
        np.save(tmp_path / "q.npy", q.numpy())
        values = rows_of(p, q).ravel()
        for extra in ([], ["--batch-rows", 4], ["--limit", len(p) // 2 or 1]):
            model = report_of(path, tmp_path / "q.npy", *extra)["models"][0]
            count = len(values) if extra[:1] != ["--limit"] else extra[1] * len(values) // len(p)
            assert model["mean"] == pytest.approx(values[:count].mean(), rel=1e-5)
            assert model["count"] == count

    def test_a_damaged_array_in_fortran_order(self, tmp_path):
        p, q = noisy(9, 7, 10)
        whole, cut = tmp_path / "whole.npy", tmp_path / "cut.npz"
        np.save(whole, np.asfortranarray(p.numpy()))
        with zipfile.ZipFile(cut, "w") as file:
            file.writestr("p.npy", whole.read_bytes()[:-8])
        whole.write_bytes(whole.read_bytes()[:-8])
        np.save(tmp_path / "q.npy", q.numpy())
        for path in (whole, cut):
            assert "ends before its last row" in run(tmp_path / "q.npy", path, code=2).stderr.replace("\n", " ")

    @pytest.mark.parametrize("ending", [".NPY", ".NPZ", ".SafeTensors", ".PT", ".KLD"])
    def test_endings_in_capitals(self, tmp_path, ending):
        p, q = noisy(4, 11, 10)
        if ending == ".KLD":
            path = tmp_path / "p.kld"
            write_kld(path, p, np.zeros(4 * 23), 23)
        else:
            path = tmp_path / f"p{ending.lower()}"
            np.save(path, p.numpy()) if ending == ".NPY" else save_arrays(path, {"x": p})
        (tmp_path / "folder").mkdir()
        path = path.rename(tmp_path / "folder" / f"p{ending}")
        np.save(tmp_path / "q.npy", q.numpy())
        for given in (path, path.parent):
            mean = report_of(given, tmp_path / "q.npy")["models"][0]["mean"]
            assert mean == pytest.approx(rows_of(p, q).mean(), rel=1e-3)

    @pytest.mark.parametrize("name", ["base", "base.dat", "base.logits", "base.npy", "base.bin.gz", "base.pt"])
    def test_a_base_file_of_any_name(self, tmp_path, name):
        p, q = noisy(4, 11, 10)
        (tmp_path / "folder").mkdir()
        path = tmp_path / "folder" / name
        write_kld(path, p, np.zeros(4 * 23), 23)
        np.save(tmp_path / "q.npy", q.numpy())
        for given in (path, path.parent):
            model = report_of(given, tmp_path / "q.npy")["models"][0]
            assert model["mean"] == pytest.approx(rows_of(p, q).mean(), rel=1e-3)
            assert "storage_error" in model

    def test_text_that_begins_alike(self, tmp_path):
        p, q = noisy(20, 3)
        for name, x in (("p", p), ("q", q)):
            lines = ["_logits_0,_logits_1,_logits_2", *(",".join(map(repr, row)) for row in x.tolist())]
            (tmp_path / f"{name}.csv").write_text("\n".join(lines))
        mean = report_of(tmp_path / "p.csv", tmp_path / "q.csv")["models"][0]["mean"]
        assert mean == pytest.approx(rows_of(p, q).mean(), rel=1e-5)


LENGTHS = [5, 1, 12, 3, 12, 7, 2, 30, 4, 9, 6]


class TestDocuments:
    """Samples of different lengths."""

    def files(self, folder, suffix, lengths=LENGTHS, shape=lambda x: x):
        p, q = noisy(sum(lengths), 10)
        p = p * torch.linspace(0.2, 3, sum(lengths)).unsqueeze(-1)
        paths = []
        for name, x in (("p", p), ("q", q)):
            arrays = {f"doc{k}": shape(part) for k, part in enumerate(x.split(lengths))}
            paths.append(save_arrays(folder / f"{name}{suffix}", arrays))
        return p, q, paths

    def by_hand(self, p, q, lengths=LENGTHS, weight=None):
        """The mean over the rows, and its standard error with the documents as clusters (Cochran)."""
        w = np.ones(sum(lengths)) if weight is None else weight
        edges = np.cumsum([0, *lengths])[:-1]
        s, n = np.add.reduceat(rows_of(p, q) * w, edges), np.add.reduceat(w, edges)
        s, n = s[n > 0], n[n > 0]
        mean = s.sum() / n.sum()
        return mean, np.sqrt(len(n) / (len(n) - 1) * ((s - mean * n) ** 2).sum()) / n.sum()

    @pytest.mark.parametrize("suffix", KEYED)
    @pytest.mark.parametrize("shape", [lambda x: x, lambda x: x.unsqueeze(0)], ids=["rows", "a_batch_of_one"])
    @pytest.mark.parametrize("batch", [1, 7, 1000])
    def test_each_is_one_sample(self, tmp_path, suffix, shape, batch):
        p, q, paths = self.files(tmp_path, suffix, shape=shape)
        report = report_of(*paths, "--key", "doc*", "--documents", "--batch-rows", batch, "--worst", 1)
        model, (mean, error) = report["models"][0], self.by_hand(p, q)
        assert report["samples"] == len(LENGTHS)
        assert model["count"] == sum(LENGTHS)
        assert model["mean"] == pytest.approx(mean, rel=1e-5)
        assert model["stderr"] == pytest.approx(error, rel=1e-5)
        worst = int(rows_of(p, q).argmax())
        document = int(np.searchsorted(np.cumsum(LENGTHS), worst, "right"))
        position = worst - sum(LENGTHS[:document])
        assert [model["worst"][0][key] for key in ("sample", "position")] == [document, position]

    def test_a_folder_of_files_with_one_each(self, tmp_path):
        p, q, _ = self.files(tmp_path, ".npz")
        for name, x in (("p", p), ("q", q)):
            (tmp_path / name).mkdir()
            for k, part in enumerate(x.split(LENGTHS)):
                np.save(tmp_path / name / f"{k}.npy", part.numpy())
        model = report_of(tmp_path / "p", tmp_path / "q", "--documents")["models"][0]
        assert [model["mean"], model["stderr"]] == pytest.approx(self.by_hand(p, q), rel=1e-5)

    def test_the_same_for_every_batch_size(self, tmp_path):
        _, _, paths = self.files(tmp_path, ".npz")
        reports = [report_of(*paths, "--key", "doc*", "--documents", "--batch-rows", n) for n in (1, 7, 1000)]
        assert reports[0] == reports[1] == reports[2]

    def test_documents_of_one_length(self, tmp_path):
        lengths = [6] * 8
        p, q, paths = self.files(tmp_path, ".npz", lengths)
        model = report_of(*paths, "--key", "doc*", "--documents")["models"][0]
        assert [model["mean"], model["stderr"]] == pytest.approx(self.by_hand(p, q, lengths), rel=1e-5)
        rows = report_of(*paths, "--key", "doc*")
        assert rows["samples"] == 48
        assert rows["models"][0]["stderr"] == pytest.approx(rows_of(p, q).std(ddof=1) / np.sqrt(48), rel=1e-5)

    def test_what_a_sample_is_must_be_clear(self, tmp_path):
        p, q, paths = self.files(tmp_path, ".npz")
        error = run(*paths, "--key", "doc*", code=2).stderr.replace("\n", " ")
        assert "It must be clear what a sample is. Got arrays of different lengths" in error
        assert "say --documents; if each row is, --no-documents." in error
        rows = report_of(*paths, "--key", "doc*", "--no-documents")
        assert rows["samples"] == sum(LENGTHS)
        error = rows_of(p, q).std(ddof=1) / np.sqrt(sum(LENGTHS))
        assert rows["models"][0]["stderr"] == pytest.approx(error, rel=1e-5)

    @pytest.mark.parametrize("each", ["sample", "row"])
    def test_weights_masks_and_groups(self, tmp_path, each):
        p, q, paths = self.files(tmp_path, ".safetensors")
        rng = np.random.default_rng(0)
        size = len(LENGTHS) if each == "sample" else sum(LENGTHS)
        weight, mask, labels = rng.random(size), rng.random(size) < 0.8, rng.integers(0, 2, size)
        for name, x in (("weight", weight), ("mask", mask), ("groups", labels)):
            np.save(tmp_path / f"{name}.npy", x)
        options = [x for name in ("weight", "mask", "groups") for x in (f"--{name}", tmp_path / f"{name}.npy")]
        model = report_of(*paths, "--key", "doc*", "--documents", *options, "--batch-rows", 8)["models"][0]
        if each == "sample":
            weight, mask, labels = (np.repeat(x, LENGTHS) for x in (weight, mask, labels))
        counted = weight * mask
        expected = self.by_hand(p, q, weight=counted)
        assert [model["mean"], model["stderr"]] == pytest.approx(expected, rel=1e-5)
        group = model["groups"]["1"]
        expected = self.by_hand(p, q, weight=counted * (labels == 1))
        assert [group["mean"], group["stderr"]] == pytest.approx(expected, rel=1e-5)

    def test_paired_differences_and_a_limit(self, tmp_path):
        p, q, paths = self.files(tmp_path, ".npz")
        other = save_arrays(tmp_path / "r.npz", {f"doc{k}": x + 0.3 * x.sin() for k, x in enumerate(p.split(LENGTHS))})
        models = report_of(*paths, other, "--key", "doc*", "--documents", "--limit", 6)["models"]
        n = sum(LENGTHS[:6])
        means = [rows_of(p[:n], x[:n]).mean() for x in (q, p + 0.3 * p.sin())]
        assert [model["mean"] for model in models] == pytest.approx(sorted(means), rel=1e-5)
        assert models[1]["difference"]["mean"] == pytest.approx(abs(means[0] - means[1]), rel=1e-4)
        assert models[0]["count"] == n

    def test_the_same_from_two_and_three_processes(self, tmp_path, two_processes, three_processes):
        _, _, paths = self.files(tmp_path, ".npz")
        arguments = [*paths, "--key", "doc*", "--documents", "--worst", 3, "--json"]
        run(*arguments, tmp_path / "1.json")
        for processes in (two_processes, three_processes):
            processes(run_of_rank, [*arguments, tmp_path / "n.json"])
            assert (tmp_path / "n.json").read_text() == (tmp_path / "1.json").read_text()

    def test_a_bad_row(self, tmp_path):
        _, q, paths = self.files(tmp_path, ".npz")
        q[20, 3] = float("nan")
        bad = save_arrays(tmp_path / "bad.npz", {f"doc{k}": x for k, x in enumerate(q.split(LENGTHS))})
        error = run(paths[0], bad, "--key", "doc*", "--documents", code=2).stderr.replace("\n", " ")
        assert "Got sample 3, position 2 of" in error

    def test_others(self, tmp_path):
        p, _, paths = self.files(tmp_path, ".npz")
        cut = {f"doc{k}": x for k, x in enumerate(p.split([*LENGTHS[:3], 4, 11, *LENGTHS[5:]]))}
        other = save_arrays(tmp_path / "other.npz", cut)
        error = run(paths[0], other, "--key", "doc*", "--documents", code=2).stderr.replace("\n", " ")
        assert "Both must have samples of the same lengths. Got 3 and 4 rows in sample 3 of" in error
        files = {
            n: save_arrays(tmp_path / f"{n}.npz", {f"doc{k}": x for k, x in enumerate(p[: sum(n)].split(n))})
            for n in ((6, 6, 6), (3, 6, 3), (6, 3, 3))
        }
        for pair in permutations(files.values(), 2):
            error = run(*pair, "--key", "doc*", "--documents", code=2).stderr.replace("\n", " ")
            assert "Both must have samples of the same lengths. Got" in error
        empty = save_arrays(tmp_path / "empty.npz", {"doc0": p[:3], "doc1": p[:0], "doc2": p[:5]})
        error = run(empty, empty, "--key", "doc*", "--documents", code=2).stderr.replace("\n", " ")
        assert "Every document must have rows. Got" in error
        np.save(tmp_path / "mask.npy", np.ones(3))
        error = run(*paths, "--key", "doc*", "--documents", "--mask", tmp_path / "mask.npy", code=2).stderr
        text = f"for each sample, ({len(LENGTHS)},), or for each row, ({sum(LENGTHS)},). Got shape (3,)"
        assert text in error.replace("\n", " ")


class TestManyArrays:
    """Their header is long, so it is not read for each of them."""

    COUNT = 300

    @pytest.mark.parametrize(
        ("suffix", "opening"),
        [
            (".npz", "klmetric.saved.formats.numpy.ZipFile"),
            (".safetensors", "safetensors.safe_open"),
            (".pt", "torch.load"),
        ],
    )
    @pytest.mark.parametrize("batch", [1, 1000])
    def test_the_header_is_read_once(self, tmp_path, monkeypatch, suffix, opening, batch):
        p, q = noisy(self.COUNT, 2, 10)
        paths = [
            save_arrays(tmp_path / f"{name}{suffix}", {f"doc{k}": x[k] for k in range(self.COUNT)})
            for name, x in (("p", p), ("q", q))
        ]
        opened, open_file = [], pkgutil.resolve_name(opening)
        monkeypatch.setattr(opening, lambda *a, **options: opened.append(a) or open_file(*a, **options))
        model = report_of(*paths, "--key", "doc*", "--documents", "--batch-rows", batch)["models"][0]
        assert model["mean"] == pytest.approx(rows_of(p, q).mean(), rel=1e-5)
        assert len(opened) == len(paths)

    def test_a_few_files_and_bytes_are_kept(self, monkeypatch):
        monkeypatch.setattr(kept, "MOST_FILES", 3)
        monkeypatch.setattr(kept, "MOST_BYTES", 100)
        opened = []
        closed = []
        files = [
            kept.Kept(lambda k=k: opened.append(k) or Tensor([k]), lambda x: closed.append(int(x))) for k in range(5)
        ]
        assert [file.get().item() for file in files[:3]] == [0, 1, 2]
        assert [file.get(20).item() for file in files[:3]] == [0, 1, 2]
        assert opened == [0, 1, 2]
        mapped = weakref.ref(files[0].get())
        assert files[3].get().item() == 3, "one more than are kept"
        assert mapped() is None
        assert sorted(closed) == [0, 1, 2]
        files[3].get(60)
        assert opened == [0, 1, 2, 3]
        files[3].get(60)
        assert opened == [0, 1, 2, 3, 3], "more bytes than are kept"
        del files[3]
        assert sorted(closed) == [0, 1, 2, 3, 3]


@pytest.mark.parametrize("content", [[torch.zeros(2, 3)] * 2, (torch.zeros(2, 3),), {"a": [torch.zeros(2, 3)]}, 3.0])
def test_a_pt_file_without_names_for_its_tensors(tmp_path, content):
    np.save(tmp_path / "q.npy", np.zeros((2, 3)))
    torch.save(content, tmp_path / "p.pt")
    error = run(tmp_path / "p.pt", tmp_path / "q.npy", code=2).stderr.replace("\n", " ")
    assert f"A .pt file must hold a tensor, or a dict of tensors. Got a {type(content).__name__} in" in error
    assert "Save a dict that has the tensors by name." in error


@pytest.mark.parametrize(
    ("library", "name", "option"),
    [
        ("safetensors", "x.safetensors", None),
        ("pyarrow", "x.csv", None),
        ("pyarrow", "x.parquet", None),
        ("pyarrow", "x.csv", "--groups"),
    ],
)
def test_a_library_that_is_not_installed(tmp_path, monkeypatch, library, name, option):
    for module in [module for module in sys.modules if module.startswith("klmetric.saved.tables.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)
    np.save(tmp_path / "q.npy", np.zeros((2, 3)))
    path = tmp_path / name
    path.write_text("p_0,p_1,p_2")
    given = [path, tmp_path / "q.npy"] if option is None else [tmp_path / "q.npy"] * 2 + [option, path]
    error = run(*given, code=2).stderr.replace("\n", " ")
    assert f"{path} needs {library}: pip install 'klmetric[compare]'." in error


def test_another_format(tmp_path, monkeypatch):
    """A function from a path to the array, and a line in the table."""
    p, q = noisy(20, 10)

    def open_raw(path: Path, choice: Choice) -> Saved:
        x = torch.from_file(str(path), size=path.stat().st_size // 4).reshape(-1, 10)
        return Saved(str(path), tuple(x.shape), x.dtype, lambda start, stop: x[start:stop])

    monkeypatch.setitem(FORMATS, ".raw", open_raw)
    for name, x in (("p", p), ("q", q)):
        (tmp_path / name).mkdir()
        x[:5].numpy().tofile(tmp_path / name / "1.raw")
        x[5:].numpy().tofile(tmp_path / name / "2.RAW")
    mean = report_of(tmp_path / "p", tmp_path / "q")["models"][0]["mean"]
    assert mean == pytest.approx(rows_of(p, q).mean(), rel=1e-5)


def run_of_rank(rank, size, arguments):
    return run(*arguments).stdout
