"""`klmetric compare`: predictions of real models, in every format that it reads."""

import csv
import json
import os
import re
import signal
import struct
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import torch
from command import report_of, run
from kld import write_kld
from processes import forked, free_port
from safetensors.torch import save_file
from torch import Tensor
from trained import digits, text
from typer.testing import CliRunner

from klmetric import KLDivergence, KLDivergenceSummary
from klmetric.command import measure
from klmetric.command.cli import app
from klmetric.saved.formats.llama import storage_error

# What the library makes of the same numbers.
KEYS = ("mean", "stderr", "max", "p50", "p90", "p95", "p99", "p99_9", "agreement", "count", "infinite", "invalid")


def expected(p, q, weight=None, **options):
    summary = KLDivergenceSummary(**{"input_format": "logits", **options}).set_dtype(torch.float64)
    summary.update(p, q, weight)
    return {key: value.item() for key, value in summary.compute().items()}


def agree(model, values, rel=0.0):
    for key in KEYS:
        assert model[key] == pytest.approx(values[key], rel=rel, abs=0), key


def save(x: Tensor, path: Path) -> Path:
    if path.suffix == ".npy":
        np.save(path, x.numpy())
    elif path.suffix == ".npz":
        np.savez_compressed(path, other=np.zeros(3), logits=x.numpy())
    elif path.suffix == ".safetensors":
        save_file({"logits": x.contiguous(), "other": torch.zeros(3)}, path)
    elif path.suffix in (".pt", ".pth"):
        torch.save({"logits": x, "other": torch.zeros(3)} if path.suffix == ".pt" else x, path)
    elif path.suffix in (".parquet", ".csv"):
        names = [f"class_{k}" for k in range(x.shape[-1])]
        table = {"id": [f"row {k}" for k in range(len(x))], **dict(zip(names, x.double().T.numpy(), strict=True))}
        if path.suffix == ".parquet":
            pq.write_table(pa.table(table), path, row_group_size=100)
        else:
            with path.open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(table)
                writer.writerows(zip(*table.values(), strict=True))
    return path


def options_for(suffix):
    return {
        ".npz": ["--key", "logits"],
        ".safetensors": ["--key", "logits"],
        ".pt": ["--key", "logits"],
        ".parquet": ["--columns", "class_*"],
        ".csv": ["--columns", "class_*"],
    }.get(suffix, [])


class TestFormats:
    @pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".pt", ".pth", ".parquet", ".csv"])
    def test_the_same_numbers_in_every_format(self, tmp_path, suffix):
        data = digits()
        p, q = (save(data[name], tmp_path / f"{name}{suffix}") for name in ("full", "int8"))
        for extra in ([], ["--batch-rows", 7]):
            report = report_of(p, q, *options_for(suffix), *extra)
            # Tables hold float64, of which float32 logits are a part.
            double = suffix in (".parquet", ".csv")
            agree(report["models"][0], expected(*(data[n].double() if double else data[n] for n in ("full", "int8"))))

    @pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".pt", ".pth"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
    def test_tokens_in_every_dtype(self, tmp_path, suffix, dtype):
        if dtype == torch.bfloat16 and suffix.startswith(".np"):
            pytest.skip("numpy has no bfloat16")
        data = {name: x.to(dtype) for name, x in text().items()}
        p, q = (save(data[name], tmp_path / f"{name}{suffix}") for name in ("full", "bf16"))
        report = report_of(p, q, *options_for(suffix), "--batch-rows", 31)
        agree(report["models"][0], expected(data["full"], data["bf16"]))

    def test_probabilities_and_one_format_for_each(self, tmp_path):
        data = digits()
        p = save(data["full"].softmax(-1), tmp_path / "p.npy")
        q, raw = save(data["int8"].softmax(-1), tmp_path / "q.npy"), save(data["int8"], tmp_path / "raw.npy")
        values = expected(data["full"].softmax(-1), data["int8"].softmax(-1), input_format="probs")
        agree(report_of(p, q, formats="probs")["models"][0], values)
        values = expected(data["full"].softmax(-1), data["int8"], input_format=("probs", "logits"))
        agree(report_of(p, raw, formats="probs,logits")["models"][0], values)

    @pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".csv"])
    def test_shards(self, tmp_path, suffix):
        data = digits()
        folders = []
        for name in ("full", "int8"):
            folder = tmp_path / name
            folder.mkdir()
            for k, part in enumerate(data[name].split(60)):  # ten and more of them: 10 comes after 9
                save(part, folder / f"part-{k}{suffix}")
            folders.append(folder)
        report = report_of(*folders, *options_for(suffix), "--batch-rows", 47)
        agree(report["models"][0], expected(data["full"], data["int8"]), rel=1e-6)

    def test_an_index_and_a_pattern_of_keys(self, tmp_path):
        data = digits()
        for name in ("full", "int8"):
            first, second, third = data[name].split(200)
            save_file(
                {"logits.2": second.contiguous(), "logits.1": first.contiguous()}, tmp_path / f"{name}-a.safetensors"
            )
            save_file({"logits.10": third.contiguous()}, tmp_path / f"{name}-b.safetensors")
            where = {"logits.1": "a", "logits.2": "a", "logits.10": "b"}
            index = {"weight_map": {key: f"{name}-{file}.safetensors" for key, file in where.items()}}
            (tmp_path / f"{name}.safetensors.index.json").write_text(json.dumps(index))
        p, q = (tmp_path / f"{name}.safetensors.index.json" for name in ("full", "int8"))
        agree(report_of(p, q, "--key", "logits.*")["models"][0], expected(data["full"], data["int8"]))
        (tmp_path / "int8-b.safetensors").unlink()
        assert "Every shard must be there" in run(p, q, "--key", "logits.*", code=2).stderr

    @pytest.mark.parametrize("suffix", [".parquet", ".csv"])
    def test_rows_are_aligned_by_their_ids(self, tmp_path, suffix):
        data = digits()
        p = save(data["full"], tmp_path / f"p{suffix}")
        order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
        names = ["id", *(f"class_{k}" for k in range(10))]
        columns = [np.array([f"row {k}" for k in range(600)])[order], *data["int8"].double()[order].T.numpy()]
        table = pa.table(dict(zip(names, columns, strict=True)))
        q = tmp_path / f"q{suffix}"
        if suffix == ".parquet":
            pq.write_table(table, q)
        else:
            pa_csv.write_csv(table, q)
        values = expected(data["full"].double(), data["int8"].double())
        report = report_of(p, q, "--id", "id", "--batch-rows", 100, "--worst", 1)
        agree(report["models"][0], values)
        kl = KLDivergence(reduction="none", input_format="logits")
        kl.update(data["full"], data["int8"])
        assert report["models"][0]["worst"][0]["sample"] == kl.compute().argmax()
        assert report["models"][0]["worst"][0]["id"] == f"row {report['models'][0]['worst'][0]['sample']}"
        labels = tmp_path / "labels.csv"
        pa_csv.write_csv(pa.table({"id": columns[0], "digit": [f"{k % 3}" for k in order.tolist()]}), labels)
        grouped = report_of(p, q, "--id", "id", "--groups", labels)["models"][0]["groups"]
        agree(grouped["1"], expected(data["full"].double()[1::3], data["int8"].double()[1::3]))
        forgotten = run(p, q, "--columns", "class_*", code=2).stderr
        assert "Got the same values of the column 'id' in another order" in forgotten
        other = save(data["int8"][:599], tmp_path / f"less{suffix}")
        assert (
            "Both must have the same ids. Got 600 in the reference and 599"
            in run(p, other, "--id", "id", code=2).stderr
        )

    def test_fortran_order_and_other_endians(self, tmp_path):
        data = digits()
        p, q = tmp_path / "p.npy", tmp_path / "q.npy"
        np.save(p, np.asfortranarray(data["full"].numpy()))
        np.save(q, data["int8"].numpy().astype(">f4"))
        agree(report_of(p, q, "--batch-rows", 99)["models"][0], expected(data["full"], data["int8"]))

    def test_pt_of_the_old_kind(self, tmp_path):
        data = digits()
        p, q = tmp_path / "p.pt", save(data["int8"], tmp_path / "q.npy")
        torch.save(data["full"], p, _use_new_zipfile_serialization=False)
        agree(report_of(p, q)["models"][0], expected(data["full"], data["int8"]))


class TestLlama:
    def test_files_of_llama_cpp(self, tmp_path):
        data = {name: x[:, :11] for name, x in text().items()}  # of contexts of 23 or 24 tokens
        for n_ctx in (23, 24):
            tokens = np.arange(60 * n_ctx)
            p, q = tmp_path / "full.kld", tmp_path / "int8.kld"
            held = [write_kld(path, data[path.stem], tokens, n_ctx) for path in (p, q)]
            report = report_of(p, q, "--batch-rows", 17, formats=None)
            agree(report["models"][0], expected(*held, input_format="log_probs"), rel=1e-6)  # some rows are clipped
            exact = expected(data["full"], data["int8"])["mean"]
            error = report["models"][0]["storage_error"]
            assert abs(report["models"][0]["mean"] - exact) < error["largest"]
            assert error["usual"] < error["largest"]
        wide = save(data["int8"], tmp_path / "int8.npy")
        report = report_of(p, wide, formats="logits")  # the .kld knows its own
        values = expected(held[0], data["int8"], input_format=("log_probs", "logits"))
        agree(report["models"][0], values, rel=1e-3)

    def test_what_rounding_adds(self, tmp_path):
        """Rows of one model, each rounded: as a rule the divergence between the two is what is said."""
        logits = text()["full"][:, :11]
        p, q = tmp_path / "p.kld", tmp_path / "q.npy"
        write_kld(p, logits.clamp_min(logits.amax(-1, keepdim=True) - 15.9), np.zeros(60 * 23), 23)
        save(logits.clamp_min(logits.amax(-1, keepdim=True) - 15.9), q)
        model = report_of(p, q)["models"][0]
        assert model["mean"] < 2 * model["storage_error"]["usual"]
        assert model["max"] < model["storage_error"]["largest"]

    def test_the_bound_holds(self):
        generator = torch.Generator().manual_seed(0)
        for scale in (1e-3, 0.1):
            for distance in (0.0, 0.1, 2.0):
                p = torch.randn(200, 50, generator=generator, dtype=torch.float64) * 3
                q = p + distance * torch.randn(200, 50, generator=generator, dtype=torch.float64)
                a, b = (x + scale * (torch.rand(200, 50, generator=generator).double() - 0.5) for x in (p, q))
                exact, rounded = (
                    KLDivergence(input_format="logits").set_dtype(torch.float64)(*both).item()
                    for both in ((p, q), (a, b))
                )
                assert abs(exact - rounded) <= storage_error(scale, scale, exact)[1]

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda data: b"GGUF" + data[4:], "A .kld file must begin with '_logits_'. Got b'GGUFits_'"),
            (lambda data: data[:-50], "Did llama.cpp end before the last"),
            (lambda data: data[:10], "A .kld file must begin with"),
            (lambda data: data[:8] + struct.pack("<iii", 0, 0, 0) + data[20:], "must have classes and chunks"),
            # More tokens than there is memory for: the size is looked at first.
            (lambda data: data[:8] + struct.pack("<iii", 2**30, 2**30, 2**30) + data[20:], "Did llama.cpp end before"),
            (lambda data: data[:8] + struct.pack("<iii", 2**31 - 1, 10, 9) + data[20:], "Did llama.cpp end before"),
            (lambda data: data[:296] + struct.pack("<f", -1e-4) + data[300:], "must not be negative. Got -0.0001 in"),
            (lambda data: data[:20] + data[20:-208] + struct.pack("<f", -3.0) + data[-204:], "must not be negative"),
        ],
    )
    def test_damaged_files(self, tmp_path, damage, message):
        logits = text()["full"][:3, :11]
        p, q = tmp_path / "p.kld", tmp_path / "q.kld"
        write_kld(p, logits, np.zeros(3 * 23), 23)
        q.write_bytes(damage(p.read_bytes()))
        assert message in run(p, q, code=2, formats=None).stderr.replace("\n", " ")

    def test_other_tokens(self, tmp_path):
        logits = text()["full"][:3, :11]
        tokens = np.zeros(3 * 23)
        p, q = tmp_path / "p.kld", tmp_path / "q.kld"
        write_kld(p, logits, tokens, 23)
        tokens[30] = 7
        write_kld(q, logits, tokens, 23)
        assert "Both must be of the same tokens. Got 0 in" in run(p, q, code=2, formats=None).stderr


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    data = text()
    noisy = data["full"] + 0.3 * torch.randn(data["full"].shape, generator=torch.Generator().manual_seed(0))
    return {name: save(x, folder / f"{name}.npy") for name, x in {**data, "noisy": noisy}.items()}


class TestReport:
    def test_several_models(self, files):
        report = report_of(files["full"], files["noisy"], files["int8"], files["bf16"], "--worst", 2)
        assert [report["schema"], report["unit"], report["samples"], report["partial"]] == [1, "nats", 60, False]
        names = [model["name"] for model in report["models"]]
        means = [model["mean"] for model in report["models"]]
        assert names[-1] == "noisy"
        assert means == sorted(means)
        p = torch.from_numpy(np.load(files["full"]))
        rows = {}
        for model in report["models"]:
            q = torch.from_numpy(np.load(files[model["name"]]))
            agree(model, expected(p, q))
            assert model["high"] == pytest.approx(model["mean"] + 1.96 * model["stderr"])
            metric = KLDivergence(reduction="none", input_format="logits")
            metric.update(p, q)
            rows[model["name"]] = metric.compute().double().reshape(60, 24).numpy()
            first = np.unravel_index(rows[model["name"]].argmax(), (60, 24))
            assert (model["worst"][0]["sample"], model["worst"][0]["position"]) == first
        assert "difference" not in report["models"][0]
        for model in report["models"][1:]:
            differences = (rows[model["name"]] - rows[names[0]]).mean(1)
            assert model["difference"]["to"] == names[0]
            assert model["difference"]["mean"] == pytest.approx(differences.mean(), rel=1e-6)
            assert model["difference"]["stderr"] == pytest.approx(differences.std(ddof=1) / 60**0.5, rel=1e-6)

    def test_csv_on_the_screen(self, files, tmp_path):
        printed = run(files["full"], files["int8"], "--csv", "-").stdout
        run(files["full"], files["int8"], "--csv", tmp_path / "report.csv")
        assert printed == (tmp_path / "report.csv").read_text()
        for two in (("--csv", "-", "--json", "-"), ("--csv", "-", "--markdown")):
            done = run(files["full"], files["int8"], *two, code=2)
            assert "One report can be printed: --json -, --csv - or --markdown." in done.stderr.replace("\n", " ")

    def test_an_id_on_one_side_alone(self, tmp_path):
        p, q = digits()["full"], digits()["int8"]
        columns = {f"p_{k}": q[:, k].numpy() for k in range(10)}
        pq.write_table(pa.table({**columns, "sample_id": np.arange(600)[::-1]}), tmp_path / "q.parquet")
        arguments = (save(p, tmp_path / "p.npy"), tmp_path / "q.parquet", "--columns", "p_*")
        assert report_of(*arguments)["models"][0]["unused_ids"] == "sample_id"
        assert (
            "The column 'sample_id' is in one of the two only, and is not used." in run(*arguments, "--markdown").stdout
        )
        pq.write_table(pa.table(columns), tmp_path / "q.parquet")
        assert "unused_ids" not in report_of(*arguments)["models"][0]

    def test_what_is_not_known(self, files, tmp_path):
        q = text()["int8"].clone()
        q[0, 0, 1] = -torch.inf
        done = run(files["full"], files["int8"], save(q, tmp_path / "q.npy"), "--markdown")
        assert "| not known |" in done.stdout
        assert "nan to" not in done.stdout
        assert "nan ±" not in done.stdout

    def test_masks_weights_and_groups(self, files, tmp_path):
        rng = np.random.default_rng(0)
        mask, weight = rng.random((60, 24)) < 0.8, rng.random(60)
        labels = rng.choice(["code", "prose"], 60)
        np.save(tmp_path / "mask.npy", mask)
        np.save(tmp_path / "weight.npy", weight)
        (tmp_path / "labels.txt").write_text("\n".join(labels))
        arguments = [
            "--mask",
            tmp_path / "mask.npy",
            "--weight",
            tmp_path / "weight.npy",
            "--groups",
            tmp_path / "labels.txt",
        ]
        report = report_of(files["full"], files["noisy"], files["int8"], *arguments, "--batch-rows", 50)
        p = torch.from_numpy(np.load(files["full"]))
        both = torch.from_numpy(mask * weight[:, None])
        rows = {}
        for model in report["models"]:
            q = torch.from_numpy(np.load(files[model["name"]]))
            agree(model, expected(p, q, both))
            for label in ("code", "prose"):
                chosen = torch.from_numpy(labels == label)
                agree(model["groups"][label], expected(p[chosen], q[chosen], both[chosen]))
            metric = KLDivergence(reduction="none", input_format="logits")
            metric.update(p, q)
            rows[model["name"]] = metric.compute().double().reshape(60, 24).numpy()
        d = (rows["noisy"] - rows["int8"]) * both.numpy()
        s, n = d.sum(1), both.numpy().sum(1)
        mean = s.sum() / n.sum()
        error = np.sqrt(60 / 59 * ((s - mean * n) ** 2).sum()) / n.sum()
        assert report["models"][1]["difference"]["mean"] == pytest.approx(mean, rel=1e-6)
        assert report["models"][1]["difference"]["stderr"] == pytest.approx(error, rel=1e-6)

    @pytest.mark.parametrize("suffix", [".npy", ".csv", ".parquet"])
    def test_groups_in_other_files(self, files, tmp_path, suffix):
        labels = np.arange(60) % 3
        path = tmp_path / f"labels{suffix}"
        table = pa.table({"group": labels})
        {
            ".npy": lambda: np.save(path, labels),
            ".csv": lambda: pa_csv.write_csv(table, path),
            ".parquet": lambda: pq.write_table(table, path),
        }[suffix]()
        report = report_of(files["full"], files["int8"], "--groups", path)
        assert {name: group["count"] for name, group in report["models"][0]["groups"].items()} == {
            "0": 480,
            "1": 480,
            "2": 480,
        }

    @pytest.mark.parametrize(
        ("arguments", "options"),
        [
            (["--direction", "jeffreys"], {"direction": "jeffreys"}),
            (["--direction", "jensen_shannon"], {"direction": "jensen_shannon"}),
            (["--temperature", 2], {"temperature": 2.0}),
            (["--base", 2], {"base": 2}),
            (["--eps", 1e-4], {"eps": 1e-4}),
        ],
        ids=str,
    )
    def test_options_of_the_library(self, files, arguments, options):
        report = report_of(files["full"], files["int8"], *arguments)
        agree(
            report["models"][0], expected(*(torch.from_numpy(np.load(files[n])) for n in ("full", "int8")), **options)
        )
        assert report["unit"] == ("bits" if "base" in options else "nats")

    def test_limit_and_classes(self, files):
        p, q = (torch.from_numpy(np.load(files[n])) for n in ("full", "int8"))
        report = report_of(files["full"], files["int8"], "--limit", 7, "--classes", 50)
        agree(report["models"][0], expected(p[:7, :, :50], q[:7, :, :50]))
        assert (report["samples"], report["partial"]) == (7, False)

    def test_what_is_printed(self, files, tmp_path):
        done = run(
            files["full"],
            files["noisy"],
            files["int8"],
            "--worst",
            1,
            "--csv",
            tmp_path / "o.csv",
            "--json",
            tmp_path / "o.json",
        )
        report = json.loads((tmp_path / "o.json").read_text())
        mean = f"{report['models'][0]['mean']:.4g}"
        for words in ("KL divergence from", "95 % interval", "more than the best", "p99.9", mean, "Worst rows of int8"):
            assert words in done.stdout
        with (tmp_path / "o.csv").open(newline="") as file:
            lines = list(csv.DictReader(file))
        assert [line["name"] for line in lines] == [model["name"] for model in report["models"]]
        assert float(lines[0]["p99"]) == report["models"][0]["p99"]
        markdown = run(files["full"], files["noisy"], files["int8"], "--markdown").stdout
        assert f"| mean | {mean} |" in markdown
        widths = {line.count("|") for line in markdown.splitlines() if line.startswith("|")}
        assert widths == {4}

    def test_a_picture(self, files, tmp_path):
        run(files["full"], files["noisy"], files["int8"], "--plot", tmp_path / "kl.png")
        assert (tmp_path / "kl.png").read_bytes().startswith(b"\x89PNG")
        assert (
            "--plot must name a picture"
            in run(files["full"], files["int8"], "--plot", tmp_path / "kl.xyz", code=2).stderr
        )

    def test_infinite_and_invalid_rows(self, tmp_path):
        x = digits()["full"][:5].softmax(-1)
        q = x.clone()
        q[1], q[1, 0] = 0, 1
        q[2, 3] = float("nan")
        p, q = save(x, tmp_path / "p.npy"), save(q, tmp_path / "q.npy")
        model = report_of(p, q, "--nan-strategy", "ignore", formats="probs")["models"][0]
        assert (model["mean"], model["stderr"], model["infinite"], model["invalid"], model["count"]) == (
            "Infinity",
            None,
            1,
            1,
            4,
        )
        done = run(p, q, "--nan-strategy", "ignore", formats="probs")
        assert "q: 1 rows are infinite, and so is the mean" in done.stdout
        assert "1 rows were no distributions and were left out" in done.stdout

    def test_one_sample_has_no_standard_error_and_the_report_says_why(self, tmp_path):
        x = digits()["full"][:6]
        p, q = (save(y[None], tmp_path / f"{name}.npy") for name, y in (("p", x), ("q", x + 1 / (1 + x.abs()))))
        done = run(p, q)
        said = " ".join(done.stdout.split())
        assert (
            "q: the standard error needs at least two samples (the first axis) of weight above 0; the rows of" in said
        )
        assert report_of(p, q)["models"][0]["stderr"] is None
        assert "standard error needs" not in run(save(x, tmp_path / "r.npy"), save(x, tmp_path / "s.npy")).stdout

    def test_equal_models(self, files):
        _, other = report_of(files["full"], files["int8"], files["int8"])["models"]
        assert str(other["difference"]["mean"]) == "0.0"
        assert other["difference"]["stderr"] == 0

    def test_names_tell_the_models_apart(self, tmp_path):
        x = digits()["full"]
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        paths = [save(x, tmp_path / "a" / "q.npy"), save(x, tmp_path / "b" / "q.npy")]
        report = report_of(paths[0], *paths)
        assert [model["name"] for model in report["models"]] == list(map(str, paths))


class TestWhatWasWrongOnce:
    """Each of these gave another number, or another exit status, without a word."""

    @pytest.mark.parametrize("suffix", [".npz", ".csv", ".parquet"])
    def test_weights_that_are_read_in_order(self, tmp_path, suffix):
        data = digits()
        p, q = (save(data[name], tmp_path / f"{name}.npy") for name in ("full", "int8"))
        weight = torch.rand(600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        path = tmp_path / f"w{suffix}"
        table = pa.table({"w": weight.numpy()})
        {
            ".npz": lambda: np.savez(path, w=weight),
            ".csv": lambda: pa_csv.write_csv(table, path),
            ".parquet": lambda: pq.write_table(table, path),
        }[suffix]()
        threads = torch.get_num_threads()
        torch.set_num_threads(4)
        try:
            report = report_of(p, q, "--weight", path, "--batch-rows", 7)
        finally:
            torch.set_num_threads(threads)
        agree(report["models"][0], expected(data["full"], data["int8"], weight))

    @pytest.mark.parametrize("suffix", [".csv", ".parquet"])
    def test_columns_in_another_order(self, tmp_path, suffix):
        data = {name: x.double() for name, x in digits().items()}
        names = [f"class_{k}" for k in range(10)]
        order = torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist()

        def write(x, path, columns):
            table = pa.table({names[k]: x[:, k].numpy() for k in columns})
            pa_csv.write_csv(table, path) if suffix == ".csv" else pq.write_table(table, path)

        p, q = tmp_path / f"p{suffix}", tmp_path / "q"
        q.mkdir()
        write(data["full"], p, range(10))
        write(data["int8"][:300], q / f"part-0{suffix}", order)
        write(data["int8"][300:], q / f"part-1{suffix}", range(10))
        agree(report_of(p, q)["models"][0], expected(data["full"], data["int8"]))
        write(data["int8"][300:], q / f"part-1{suffix}", range(9))
        assert "Every table must have the same classes. Got no column 'class_9'" in run(p, q, code=2).stderr

    def test_an_index_that_deals_out_arrays_in_turns(self, tmp_path):
        data, where = digits(), {}
        for k in range(4):
            where[f"l.{k}"] = f"{'ab'[k % 2]}.safetensors"
        for file in set(where.values()):
            parts = {k: data["int8"].split(150)[int(k[2:])].clone() for k, name in where.items() if name == file}
            save_file(parts, tmp_path / file)
        (tmp_path / "q.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        p = save(data["full"], tmp_path / "p.npy")
        report = report_of(p, tmp_path / "q.safetensors.index.json", "--key", "l.*")
        agree(report["models"][0], expected(data["full"], data["int8"]))

    def test_masks_of_more_axes_and_in_shards(self, tmp_path):
        x = logits_of(6, 4, 3, 5)
        p, q = save(x, tmp_path / "p.npy"), save(x + 0.1 * logits_of(6, 4, 3, 5, seed=1), tmp_path / "q.npy")
        mask = np.random.default_rng(0).random((6, 4, 3)) < 0.6
        np.save(tmp_path / "mask.npy", mask)
        folder = tmp_path / "weights"
        folder.mkdir()
        weight = np.random.default_rng(0).random(6)
        for k in range(3):
            np.save(folder / f"{k}.npy", weight[2 * k : 2 * k + 2])
        y = torch.from_numpy(np.load(q))
        for size in (1, 7, 100):
            report = report_of(p, q, "--mask", tmp_path / "mask.npy", "--weight", folder, "--batch-rows", size)
            both = torch.from_numpy(mask * weight[:, None, None])
            agree(report["models"][0], expected(x.reshape(6, 12, 5), y.reshape(6, 12, 5), both.reshape(6, 12)))

    def test_a_strided_tensor(self, tmp_path):
        data = text()
        torch.save(data["full"].transpose(0, 1).contiguous().transpose(0, 1), tmp_path / "p.pt")
        q = save(data["int8"], tmp_path / "q.npy")
        agree(report_of(tmp_path / "p.pt", q, "--batch-rows", 7)["models"][0], expected(data["full"], data["int8"]))

    @pytest.mark.slow
    def test_a_broken_pipe_does_not_hide_the_gate(self, files, tmp_path):
        arguments = ["compare", files["full"], files["noisy"], "--input-format", "logits", "--fail-above", "mean=0"]
        done = forked(*arguments, cwd=tmp_path, first=break_the_pipe)
        assert done.returncode == 1, done.stderr
        assert "Failed: noisy: mean" in done.stderr
        assert "Traceback" not in done.stderr

    def test_a_bad_row_does_not_switch_off_the_question(self, tmp_path):
        x = digits()["full"].clone()
        x[0, 0] = float("nan")
        p = save(x, tmp_path / "p.npy")
        done = run(p, p, "--nan-strategy", "ignore", formats="probs", code=2)
        assert "Are they logits? Then say so" in done.stderr

    def test_names_of_quantiles_and_the_tighter_limit(self, files):
        run(files["full"], files["noisy"], "--fail-above", "p099=9", "p99_0=9", "p99.00=9")
        run(files["full"], files["noisy"], "--fail-above", "mean=1e-9", "mean=9", code=1)

    def test_odd_names(self, tmp_path):
        x = digits()["full"]
        for name in ("$x^{$", "_u", "[red]", ":warning:", "a=1"):
            path = save(x, tmp_path / f"{name}.npy")
            done = run(path, path, "--plot", tmp_path / "kl.png", "--json", tmp_path / "o.json")
            assert json.loads((tmp_path / "o.json").read_text())["models"][0]["name"] == name
            assert name in done.stdout


def break_the_pipe():
    """As of `| head`, which has seen enough."""
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)


def logits_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestGate:
    def test_exit_status(self, files):
        mean = report_of(files["full"], files["noisy"])["models"][0]["mean"]
        pair = files["full"], files["noisy"]
        run(*pair, "--fail-above", f"mean={mean * 1.01}")
        done = run(*pair, "--fail-above", f"mean={mean * 0.99}", code=1)
        assert f"Failed: noisy: mean = {mean:.4g} is above {mean * 0.99:g}" in done.stderr
        assert "p99.9" in done.stdout, "the report is there all the same"
        for limits in (
            ["mean=1", "p99=1e-9"],
            ["mean=1,p99=1e-9"],
            ["p99_5=1e-9"],
            ["mean=1", "--fail-above", "p99=1e-9"],
        ):
            done = run(*pair, "--fail-above", *limits, code=1)
            assert len(re.findall("Failed", done.stderr)) == 1
        run(*pair, "--fail-below", "agreement=0.999", code=1)
        run(*pair, "--fail-below", "agreement=0.1")

    def test_before_the_models(self, files):
        arguments = ["--fail-above", "mean=9", "p99=1e-9", files["full"], files["noisy"]]
        run(*arguments, code=1)

    def test_both_kinds(self, files, tmp_path):
        limits = ["--fail-above", "mean=1e-9", "p99.9=9", "--fail-below", "agreement=0.1", "count=9999"]
        done = run(files["full"], files["noisy"], *limits, "--json", tmp_path / "o.json", code=1)
        report = json.loads((tmp_path / "o.json").read_text())["limits"]
        assert report["above"] == {"mean": 1e-9, "p99_9": 9}
        assert report["below"] == {"agreement": 0.1, "count": 9999}
        assert [f"Failed: {sentence}" for sentence in report["failed"]] == done.stderr.splitlines()
        assert len(report["failed"]) == 2

    def test_a_value_that_is_not_known_fails(self, files):
        done = run(files["full"], files["int8"], "--limit", 1, "--fail-above", "stderr=1", code=1)
        assert "stderr is not known" in done.stderr

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--fail-above", "mean"], "A limit must be a value and a number, as mean=0.01. Got 'mean'"),
            (["--fail-above", "mean=x"], "A limit must be a value and a number"),
            (["--fail-above", "mena=1"], "A limit must be of a value of the report. Got 'mena'. Did you mean 'mean'?"),
            (["--fail-above", "median=1"], "Did you mean 'p50'?"),
            (["--fail-above", "xyz=1"], "A limit must be of mean, stderr, low, high, max, agreement"),
            (["--fail-above", "p101=1"], "A limit must be of mean"),
            (["mean=1"], "mean=1 does not exist"),
        ],
        ids=str,
    )
    def test_bad_limits(self, files, arguments, message):
        assert message in run(files["full"], files["int8"], *arguments, code=2).stderr


class TestBadInput:
    def raises(self, message, *arguments, **options):
        done = run(*arguments, code=2, **options)
        assert message in done.stderr.replace("\n", " "), done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
        assert "Traceback" in run(*arguments, "--debug", code=2, **options).stderr

    def test_shapes(self, files, tmp_path):
        x = text()["int8"]
        self.raises("Both must have the same rows. Got shape (60, 24,", files["full"], save(x[:59], tmp_path / "a.npy"))
        classes = x.shape[-1]
        wide = save(torch.nn.functional.pad(x, (0, 4)), tmp_path / "wide.npy")
        self.raises(f"If the last 4 are padding, say --classes {classes}.", files["full"], wide)
        agree(report_of(files["full"], wide, "--classes", classes)["models"][0], expected(text()["full"], x))
        other = save(x.transpose(0, 2).contiguous(), tmp_path / "transposed.npy")
        self.raises("Is one of them transposed", files["full"], other)
        self.raises("--classes must be no more than every file has", files["full"], wide, "--classes", classes + 1)
        self.raises(
            "Predictions must be of (rows, classes)", files["full"], save(x.argmax(-1).flatten(), tmp_path / "c.npy")
        )

    def test_one_class(self, tmp_path):
        x = save(torch.rand(5, 1), tmp_path / "x.npy")
        self.raises("Predictions must have two classes or more. Got shape (5, 1)", x, x)
        self.raises("Of a sigmoid, save both classes", x, x)

    def test_kinds_of_numbers(self, files, tmp_path):
        x = text()["int8"]
        self.raises(
            "Predictions must be float16, bfloat16, float32 or float64. Got int64",
            files["full"],
            save(x.long(), tmp_path / "a.npy"),
        )
        odd = tmp_path / "odd.npy"
        np.save(odd, np.array([["a"]]))
        self.raises("The numbers must be of a dtype that torch has", files["full"], odd)
        np.save(odd, np.array([{}], dtype=object), allow_pickle=True)
        self.raises("Got one of objects, which is not loaded", files["full"], odd)

    @pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".pt", ".parquet", ".csv"])
    def test_damaged_files(self, tmp_path, suffix):
        good = save(digits()["full"], tmp_path / f"good{suffix}")
        data = good.read_bytes()
        options = options_for(suffix)
        for name, damaged in {"short": data[: len(data) * 2 // 3], "other": b"\x00\x01 no such file " * 20}.items():
            path = tmp_path / f"{name}{suffix}"
            path.write_bytes(damaged)
            if (name, suffix) == ("short", ".csv"):
                continue  # a shorter table
            self.raises(str(path), good, path, *options)
        empty = tmp_path / f"empty{suffix}"
        empty.write_bytes(b"")
        self.raises("which is empty", good, empty, *options)

    def test_a_corrupt_member(self, tmp_path):
        good = save(digits()["full"], tmp_path / "good.npz")
        with zipfile.ZipFile(good) as file:
            begin = file.getinfo("logits.npy").header_offset + 200
        data = bytearray(good.read_bytes())
        data[begin : begin + 8] = b"\xff" * 8
        bad = tmp_path / "bad.npz"
        bad.write_bytes(data)
        self.raises("bad.npz cannot be read as .npz", good, bad, "--key", "logits")

    def test_nothing_is_unpickled(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (os.mkdir, (str(tmp_path / "done"),))

        path = tmp_path / "evil.pt"
        torch.save({"logits": Evil()}, path)
        self.raises("it could run code", path, path)
        assert not (tmp_path / "done").exists()
        torch.save([1, 2], path)
        self.raises("A .pt file must hold a tensor, or a dict of tensors. Got a list", path, path)

    def test_rows_that_are_no_distributions(self, files, tmp_path):
        x = text()["int8"].clone()
        x[41, 5, 3] = float("nan")
        bad = save(x, tmp_path / "bad.npy")
        self.raises(
            "Got sample 41, position 5 of " + str(bad) + ", which has NaN at class 3",
            files["full"],
            bad,
            "--batch-rows",
            10,
        )
        mask = np.ones((60, 24))
        mask[41, 5] = 0
        np.save(tmp_path / "mask.npy", mask)
        assert report_of(files["full"], bad, "--mask", tmp_path / "mask.npy")["models"][0]["count"] == 60 * 24 - 1

    def test_formats_are_asked_about(self, files, tmp_path):
        probs = save(text()["int8"].softmax(-1), tmp_path / "probs.npy")
        self.raises("--input-format must say what the files hold", files["full"], files["int8"], formats=None)
        self.raises("looks like logits", files["full"], files["int8"], formats=None)
        self.raises("looks like probs", probs, probs, formats=None)
        self.raises(
            "Are they logits? Then say so with --input-format logits", files["full"], files["int8"], formats="probs"
        )
        logs = save(text()["int8"].log_softmax(-1), tmp_path / "logs.npy")
        self.raises("looks like log_probs", logs, logs, formats=None)
        self.raises("say so with --input-format log_probs,probs", logs, probs, formats="probs")
        self.raises("say so with --input-format probs,log_probs", probs, logs, formats="probs")
        self.raises("looks like probabilities", files["full"], probs)
        report_of(files["full"], probs, "--no-check")
        scaled = save(7 * text()["int8"].softmax(-1), tmp_path / "scaled.npy")
        self.raises("Probabilities should add up to 1. Got 7", scaled, scaled, formats="probs")
        assert report_of(scaled, scaled, "--no-check", formats="probs")["models"][0]["mean"] == 0
        self.raises("`--input-format` must be one of", files["full"], files["int8"], formats="logit")
        self.raises("must be one format, or a pair", files["full"], files["int8"], formats="logits,probs,logits")

    def test_files_and_keys(self, files, tmp_path):
        self.raises("nothing.npy does not exist.", files["full"], tmp_path / "nothing.npy")
        (tmp_path / "q4.npy").touch()
        self.raises(f"q5.npy does not exist. Did you mean {tmp_path / 'q4.npy'}?", files["full"], tmp_path / "q5.npy")
        other = tmp_path / "other.xyz"
        other.write_text("hello")
        self.raises("A file must be one of .npy", files["full"], other)
        several = save(text()["int8"], tmp_path / "several.safetensors")
        self.raises("`--key` must say which array to take. Got", files["full"], several)
        self.raises("has logits, other", files["full"], several, "--key", "logit")
        empty = tmp_path / "folder"
        empty.mkdir()
        self.raises("A folder must hold shards of one kind", files["full"], empty)
        for k in (1, 3):
            save(text()["int8"][:2], empty / f"part-{k}-of-3.npy")
        self.raises("has 2 of 3. Missing is number 2", files["full"], empty)
        save(text()["int8"][:2, :, :3], empty / "part-2-of-3.npy")
        self.raises("Shards must have rows of the same shape", files["full"], empty)
        self.raises(
            "The folder of a file to write must be there",
            files["full"],
            files["int8"],
            "--json",
            tmp_path / "no" / "o.json",
        )

    def test_tables(self, tmp_path):
        p = save(digits()["full"], tmp_path / "p.csv")
        self.raises("It must be clear which columns are classes. Got", p, p)
        self.raises("`--columns` must be of the table. Got 'x'", p, p, "--columns", "x")
        self.raises("Classes must be numbers. Got column 'id'", p, p, "--columns", "*")
        self.raises("`--id` must be a column. Got 'x'", p, p, "--id", "x")
        report_of(p, p, "--id", "id")
        nothing = tmp_path / "nothing.csv"
        nothing.write_text("a,b\n")
        self.raises("Predictions must have rows and classes", nothing, nothing, "--columns", "a,b")
        array = save(digits()["full"], tmp_path / "p.npy")
        self.raises("--id is for tables", p, array, "--id", "id")

    def test_beside(self, files, tmp_path):
        pair = files["full"], files["int8"]
        bad = tmp_path / "bad.npy"
        np.save(bad, np.full(60, 0.5))
        self.raises("--mask must be 0 or 1. Got 0.5", *pair, "--mask", bad)
        np.save(bad, np.full(60, -1.0))
        self.raises("--weight must be finite and at least 0. Got -1", *pair, "--weight", bad)
        np.save(bad, np.ones(59))
        self.raises(
            "--weight must have one entry for each sample, (60,), or for each row, (60, 24). Got shape (59,)",
            *pair,
            "--weight",
            bad,
        )
        self.raises("--groups must have one entry for each sample", *pair, "--groups", bad)
        self.raises(f"--groups: {tmp_path}/no.txt does not exist", *pair, "--groups", tmp_path / "no.txt")
        self.raises("--groups must be a file of .txt", *pair, "--groups", tmp_path)
        self.raises(f"--mask: {tmp_path}/no.npy does not exist", *pair, "--mask", tmp_path / "no.npy")
        np.save(bad, np.arange(60 * 24).reshape(60, 24))
        self.raises("--groups must have at most 1000 groups. Got 1440", *pair, "--groups", bad)
        two = tmp_path / "two.csv"
        two.write_text("a,b\n1,2\n")
        self.raises("It must be clear which column has the groups", *pair, "--groups", two)


def report_in_processes(rank, size, arguments, code, folder):
    done = run(*arguments, "--json", folder / f"{size}.json", code=code)
    return done.stdout, done.stderr


@pytest.fixture
def grouped(files, tmp_path):
    np.save(tmp_path / "mask.npy", np.random.default_rng(0).random((60, 24)) < 0.7)
    (tmp_path / "labels.txt").write_text("\n".join("abc"[k % 3] for k in range(60)))
    arguments = [files["full"], files["noisy"], files["int8"], "--worst", 3, "--fail-above", "mean=1e-9"]
    return [*arguments, "--mask", tmp_path / "mask.npy", "--groups", tmp_path / "labels.txt"]


def test_the_same_report_from_1_2_and_3_processes(grouped, tmp_path, two_processes, three_processes):
    alone = report_in_processes(0, 1, grouped, 1, tmp_path)
    assert "Failed: noisy: mean" in alone[1]
    for processes in (two_processes, three_processes):
        first, *others = processes(report_of_rank, grouped, tmp_path)
        assert first == alone
        assert others == [("", "")] * (processes.size - 1), "it is printed once"
        assert (tmp_path / f"{processes.size}.json").read_text() == (tmp_path / "1.json").read_text()


def report_of_rank(rank, size, arguments, folder):
    return report_in_processes(rank, size, arguments, 1 if rank == 0 else 0, folder)


@pytest.mark.slow
def test_under_torchrun(grouped, tmp_path):
    alone = report_in_processes(0, 1, grouped, 1, tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    command += [f"--master-port={free_port()}", "-m", "klmetric", "compare", *map(str, grouped)]
    command += ["--input-format", "logits", "--json", "2.json"]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("Failed: noisy: mean") == 1
    assert done.stdout == alone[0]
    assert (tmp_path / "2.json").read_text() == (tmp_path / "1.json").read_text()


def bad_rows_in_processes(rank, size, arguments):
    done = run(*arguments, code=2)
    return done.stdout, done.stderr


def test_bad_rows_on_one_process(files, tmp_path, three_processes):
    x = text()["int8"].clone()
    x[30, 0, 0] = float("nan")
    bad = save(x, tmp_path / "bad.npy")
    printed = three_processes(bad_rows_in_processes, [files["full"], bad])
    assert [out for out, _ in printed] == [""] * 3
    assert ["sample 30, position 0" in err for _, err in printed] == [False, True, False]


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


@pytest.mark.slow
@pytest.mark.parametrize("batches", [1, 40])
def test_ctrl_c_reports_what_was_measured(files, tmp_path, batches):
    arguments = ["compare", files["full"], files["noisy"], "--input-format", "logits", "--batch-rows", "24"]
    arguments += ["--json", "o.json", "--fail-above", "mean=0"]
    done = forked(*arguments, cwd=tmp_path, first=partial(interrupt_after, batches))
    assert done.returncode == 130, done.stderr
    report = json.loads((tmp_path / "o.json").read_text())
    n = report["samples"]
    assert report["partial"]
    assert batches <= n <= batches + 3, "what threads were reading"
    p, q = (torch.from_numpy(np.load(files[name])) for name in ("full", "noisy"))
    agree(report["models"][0], expected(p[:n], q[:n]))
    assert f"Interrupted: this is of {n} of 60 samples." in done.stderr
    assert "Traceback" not in done.stderr
    assert "p99.9" in done.stdout


@pytest.mark.slow
def test_a_second_ctrl_c_ends_it(files, tmp_path):
    arguments = ["compare", files["full"], files["noisy"], "--input-format", "logits", "--batch-rows", "24"]
    done = forked(*arguments, "--json", "o.json", cwd=tmp_path, first=partial(interrupt_after, 3, times=2))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    p = logits_of(40, 6)
    paths = [save(p, folder / "p.npy")]
    for k in range(30):
        name = f"q{k:02}" if k % 3 else f"meta-llama-3.1-8B-Instruct-GGUF-Q{k}_K_M-imatrix-of-a-long-name"
        paths.append(save(p + 0.01 * (k + 1) * logits_of(40, 6, seed=k + 1), folder / f"{name}.npy"))
    (folder / "labels.txt").write_text("\n".join("ab"[k % 2] for k in range(40)))
    return [*paths, "--groups", folder / "labels.txt"]


class TestManyModels:
    def seen(self, *arguments, folder):
        """The report, and what is printed."""
        shown = run(*arguments, "--json", folder / "o.json").stdout
        return json.loads((folder / "o.json").read_text()), shown

    @pytest.mark.parametrize("width", [80, 160])
    def test_a_row_a_model(self, many, tmp_path, width, monkeypatch):
        monkeypatch.setenv("COLUMNS", str(width))
        report, shown = self.seen(*many, folder=tmp_path)
        assert max(map(len, shown.splitlines())) <= width
        cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line[:1] == "│"]
        heads = [[cell.strip() for cell in line.split("┃")[1:-1]] for line in shown.splitlines() if line[:1] == "┃"]
        labels = [label for head in heads for label in head[1:]]
        for label in ("mean", "95 % interval", "more than the best", "p99.9", "agreement", "count"):
            assert labels.count(label) == 1
        for model in report["models"]:
            rows = [row for row in cells if row[0] and model["name"].startswith(row[0])]
            assert f"{model['mean']:.4g}" in [cell for row in rows for cell in row]
            assert f"{model['p99_9']:.4g}" in [cell for row in rows for cell in row], "no number is folded"

    def test_in_markdown(self, many, tmp_path):
        report, shown = self.seen(*many, "--markdown", folder=tmp_path)
        lines = shown.splitlines()
        head = next(line for line in lines if line.startswith("| model | mean | 95 % interval |"))
        for model in report["models"]:
            line = next(line for line in lines if line.startswith(f"| {model['name']} | {model['mean']:.4g} |"))
            assert line.count("|") == head.count("|")
        assert "| model | a | b |" in lines

    def test_few_models_are_columns(self, many, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        shown = run(*many[:3]).stdout
        assert sum("meta-llama" in line for line in shown.splitlines()) == 1
        assert shown.count("┏") == 1

    @pytest.mark.slow
    def test_many_groups_and_many_models(self, many, tmp_path, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        (tmp_path / "labels.txt").write_text("\n".join(f"group {k}" for k in range(40)))
        report, shown = self.seen(*many[:-1], tmp_path / "labels.txt", folder=tmp_path)
        assert max(map(len, shown.splitlines())) <= 80
        for model in report["models"]:
            assert f"{model['groups']['group 39']['mean']:.4g}" in shown


def test_masks_of_large_numbers_are_masks(tmp_path):
    p, q = torch.tensor([[0.5, -1.0, 2.0, -1e9]] * 2), torch.tensor([[0.0, -0.5, 1.0, -torch.inf]] * 2)
    model = report_of(save(p, tmp_path / "p.npy"), save(q, tmp_path / "q.npy"))["models"][0]
    a, b = p[0, :3].double().log_softmax(-1), q[0, :3].double().log_softmax(-1)
    assert model["mean"] == pytest.approx((a.exp() * (a - b)).sum().item(), rel=1e-6)
    assert model["infinite"] == 0


def test_help():
    done = CliRunner().invoke(app, ["compare", "--help"])
    assert done.exit_code == 0
    for words in ("REFERENCE", "MODEL", "--input-format", "--fail-above", ".safetensors", "torchrun"):
        assert words in done.stdout
