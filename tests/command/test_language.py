"""What `klmetric compare` says of language models, against plain float64 numpy."""

import csv
import functools
import io
import math
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from command import report_of, run
from kld import write_kld
from language import Value, normalised, of_classes, of_mean, of_targets, quantiles
from trained import text

from klmetric.command.numbers import number

N_CTX = 50  # 24 positions, as the text has


@pytest.fixture(scope="module")
def logits():
    data = {name: x.numpy() for name, x in text().items()}
    noise = torch.randn(text()["full"].shape, generator=torch.Generator().manual_seed(0)).numpy()
    return {**data, "noisy": data["full"] + np.float32(0.3) * noise, "again": data["full"] + np.float32(1e-3) * noise}


@pytest.fixture(scope="module")
def targets(logits):
    generator = torch.Generator().manual_seed(1)
    p = torch.from_numpy(logits["full"]).softmax(-1).flatten(0, 1)
    return torch.multinomial(p, 1, generator=generator).reshape(60, 24).numpy()


@pytest.fixture(scope="module")
def files(logits, targets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    for name, x in logits.items():
        np.save(folder / f"{name}.npy", x)
    np.save(folder / "targets.npy", targets)
    return folder


def at(x, targets):
    return np.take_along_axis(x, targets[..., None], -1)[..., 0]


def log_probs(x):
    return normalised(x.astype(np.float64))


def agree(found, expected, rel=1e-6, quantile=0.01):
    assert found.keys() >= expected.keys()
    for name, value in expected.items():
        if isinstance(value, Value):
            assert found[name]["value"] == pytest.approx(value.value, rel=rel, abs=1e-9), name
            assert found[name]["stderr"] == pytest.approx(value.stderr, rel=max(rel, 1e-6), abs=1e-15), name
            assert found[name]["low"] <= found[name]["value"] <= found[name]["high"], name
        elif isinstance(value, dict):
            agree(found[name], value, rel, quantile)
        else:
            assert found[name] == pytest.approx(value, rel=quantile, abs=1e-12), name


class TestArrays:
    def test_targets(self, files, logits, targets):
        report = report_of(
            *(files / f"{name}.npy" for name in ("full", "noisy", "int8")), "--targets", files / "targets.npy"
        )
        weight = np.ones((60, 24))
        p = log_probs(logits["full"])
        assert [model["name"] for model in report["models"]] == ["int8", "noisy"]
        for model in report["models"]:
            q = log_probs(logits[model["name"]])
            agree(model, of_targets(at(p, targets), at(q, targets), weight))
            kl = (np.exp(p) * (p - q)).sum(-1)
            of_kl = quantiles(kl, weight)
            assert of_kl.keys() - model.keys() == {"p75"}
            agree(model, {key: value for key, value in of_kl.items() if key in model})
            assert model["min"] == pytest.approx(kl.min(), rel=1e-6), "exact"
            delta = np.exp(at(q, targets)) - np.exp(at(p, targets))
            ends = [model["delta_p"][end] for end in ("min", "max")]
            assert ends == pytest.approx([delta.min(), delta.max()], rel=1e-6), "exact"
        difference = report["models"][1]["difference"]
        q = {name: at(log_probs(logits[name]), targets) for name in ("int8", "noisy")}
        agree(
            difference,
            {
                "ln_ratio": of_mean(q["int8"] - q["noisy"], weight),
                "delta_p": of_mean(np.exp(q["noisy"]) - np.exp(q["int8"]), weight),
            },
        )

    def test_intervals_of_perplexities_are_those_of_their_logarithms(self, files):
        model = report_of(files / "full.npy", files / "noisy.npy", "--targets", files / "targets.npy")["models"][0]
        ln_ratio, ratio = (model["perplexity"][name] for name in ("ln_ratio", "ratio"))
        assert [ratio["low"], ratio["high"]] == pytest.approx([math.exp(ln_ratio[end]) for end in ("low", "high")])
        for name in ("reference", "model"):
            found = model["perplexity"][name]
            assert found["low"] * found["high"] == pytest.approx(found["value"] ** 2)

    def test_weights_masks_and_targets_that_do_not_count(self, files, logits, targets, tmp_path):
        rng = np.random.default_rng(0)
        weight, mask = rng.random(60), rng.random((60, 24)) < 0.8
        some = np.where(rng.random((60, 24)) < 0.3, -100, targets)
        for name, x in {"weight": weight, "mask": mask, "some": some}.items():
            np.save(tmp_path / f"{name}.npy", x)
        arguments = (files / "full.npy", files / "int8.npy", "--targets", tmp_path / "some.npy", "--more")
        arguments += ("--mask", tmp_path / "mask.npy", "--weight", tmp_path / "weight.npy")
        model = report_of(*arguments, "--batch-rows", 31)["models"][0]
        of_rows = weight[:, None] * mask * (some != -100)
        p, q = (log_probs(logits[name]) for name in ("full", "int8"))
        agree(model, of_targets(at(p, targets), at(q, targets), of_rows))
        agree(model, of_classes(p, q, of_rows))
        mean = of_mean((np.exp(p) * (p - q)).sum(-1), of_rows)
        assert [model["mean"], model["stderr"]] == pytest.approx([mean.value, mean.stderr], rel=1e-6)
        assert model["count"] == (of_rows > 0).sum()

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float64])
    def test_kinds_of_targets(self, files, targets, tmp_path, dtype):
        np.save(tmp_path / "t.npy", targets.astype(dtype))
        pair = (files / "full.npy", files / "int8.npy", "--targets")
        assert report_of(*pair, tmp_path / "t.npy")["models"] == report_of(*pair, files / "targets.npy")["models"]

    def test_targets_in_text_and_of_single_rows(self, files, logits, targets, tmp_path):
        for name in ("full", "int8"):
            np.save(tmp_path / f"{name}.npy", logits[name][:, 0])
        (tmp_path / "t.csv").write_text("token\n" + "\n".join(map(str, targets[:, 0])) + "\n")
        model = report_of(tmp_path / "full.npy", tmp_path / "int8.npy", "--targets", tmp_path / "t.csv")["models"][0]
        p, q = (at(log_probs(logits[name]), targets)[:, :1] for name in ("full", "int8"))
        agree(model, of_targets(p, q, np.ones((60, 1))))

    def test_formats_and_temperature(self, files, logits, targets, tmp_path):
        np.save(tmp_path / "p.npy", np.exp(log_probs(logits["full"])))
        np.save(tmp_path / "q.npy", log_probs(logits["int8"]))
        arguments = (tmp_path / "p.npy", tmp_path / "q.npy", "--targets", files / "targets.npy", "--temperature", 2)
        model = report_of(*arguments, "--more", formats="probs,log_probs")["models"][0]
        p, q = (log_probs(logits[name] / 2) for name in ("full", "int8"))
        agree(
            model,
            {**of_targets(at(p, targets), at(q, targets), np.ones((60, 24))), **of_classes(p, q, np.ones((60, 24)))},
            rel=1e-6,
        )

    def test_equal_models(self, files):
        model = report_of(files / "full.npy", files / "full.npy", "--targets", files / "targets.npy", "--more")[
            "models"
        ][0]
        for value in (model["perplexity"]["ln_ratio"], model["perplexity"]["difference"], model["delta_p"]["mean"]):
            assert value == {"value": 0, "stderr": 0, "low": 0, "high": 0}
        assert model["perplexity"]["ratio"]["value"] == model["perplexity"]["correlation"]["value"] == 1
        assert [model["delta_p"][key] for key in ("min", "p50", "max")] == [0, 0, 0]
        assert model["delta_p"]["rms"] == {"value": 0, "stderr": 0, "low": 0, "high": 0}
        assert model["agreement_10"]["value"] == 1

    def test_a_target_that_the_model_gives_no_chance(self, files, logits, targets, tmp_path):
        q = logits["int8"].copy()
        q[3, 4, targets[3, 4]] = -np.inf
        np.save(tmp_path / "q.npy", q)
        model = report_of(files / "full.npy", tmp_path / "q.npy", "--targets", files / "targets.npy")["models"][0]
        perplexity = model["perplexity"]
        assert [perplexity[name]["value"] for name in ("model", "ln_ratio", "ratio")] == ["Infinity"] * 3
        assert perplexity["ratio"]["stderr"] is None
        assert perplexity["reference"]["stderr"] > 0
        assert model["delta_p"]["mean"]["stderr"] > 0
        printed = run(files / "full.npy", tmp_path / "q.npy", "--targets", files / "targets.npy", "--markdown").stdout
        assert "| ratio | inf |" in printed
        assert not re.search("nan ±|± nan|inf ±", printed)

    def test_documents_of_different_lengths(self, logits, targets, tmp_path):
        lengths = np.random.default_rng(0).integers(1, 25, 60)
        for name in ("full", "int8"):
            np.savez(tmp_path / f"{name}.npz", **{f"doc{k}": logits[name][k, :n] for k, n in enumerate(lengths)})
        np.save(tmp_path / "t.npy", np.concatenate([targets[k, :n] for k, n in enumerate(lengths)]))
        arguments = (tmp_path / "full.npz", tmp_path / "int8.npz", "--key", "doc*", "--documents", "--more")
        weight = (np.arange(24) < lengths[:, None]).astype(float)
        p, q = (log_probs(logits[name]) for name in ("full", "int8"))
        for rows in (1, 100):
            report = report_of(*arguments, "--targets", tmp_path / "t.npy", "--batch-rows", rows)
            agree(report["models"][0], of_targets(at(p, targets), at(q, targets), weight))
            agree(report["models"][0], of_classes(p, q, weight))

    def test_aligned_by_ids(self, logits, targets, tmp_path):
        order = np.random.default_rng(0).permutation(60)
        for name, rows in (("full", np.arange(60)), ("int8", order)):
            columns = {f"p_{k}": logits[name][rows, 0, k] for k in range(100)}
            pq.write_table(pa.table({"row": rows, **columns}), tmp_path / f"{name}.parquet")
        pq.write_table(pa.table({"row": order[::-1], "token": targets[order[::-1], 0]}), tmp_path / "t.parquet")
        arguments = (tmp_path / "full.parquet", tmp_path / "int8.parquet", "--id", "row")
        model = report_of(*arguments, "--targets", tmp_path / "t.parquet")["models"][0]
        p, q = (at(log_probs(logits[name]), targets)[:, :1] for name in ("full", "int8"))
        agree(model, of_targets(p, q, np.ones((60, 1))))


class TestMore:
    def test_other_measures(self, files, logits):
        report = report_of(*(files / f"{name}.npy" for name in ("full", "int8", "noisy")), "--more", "--base", 2)
        weight, p = np.ones((60, 24)), log_probs(logits["full"])
        for model in report["models"]:
            expected = of_classes(p, log_probs(logits[model["name"]]), weight)
            for name in ("reverse", "jensen_shannon"):  # in bits
                expected[name] = Value(*(x / math.log(2) for x in expected[name]))
            agree(model, expected)
            assert model["agreement_1"]["value"] == pytest.approx(model["agreement"], rel=1e-15)
        assert "perplexity" not in report["models"][0]

    def test_bands(self, files, logits):
        model = report_of(files / "full.npy", files / "int8.npy", "--more")["models"][0]
        p, q = (log_probs(logits[name]) for name in ("full", "int8"))
        kl, confidence = (np.exp(p) * (p - q)).sum(-1), np.exp(p.max(-1))
        assert [*model["bands"]] == ["0 to 0.2", "0.2 to 0.4", "0.4 to 0.6", "0.6 to 0.8", "0.8 to 1"]
        for band, (low, high) in zip(
            model["bands"].values(), [(0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 2)], strict=True
        ):
            inside = ((confidence >= low) & (confidence < high)).astype(float)
            mean = of_mean(kl, inside)
            assert band["count"] == inside.sum() > 0
            assert [band["mean"], band["stderr"]] == pytest.approx([*mean], rel=1e-6)

    def test_what_is_shown(self, files):
        pair = (files / "full.npy", files / "int8.npy")
        usual = run(*pair, "--markdown").stdout
        assert "Jensen-Shannon" not in usual
        more = run(*pair, "--more", "--markdown").stdout
        assert more.startswith(usual.partition("\n\n100 classes.")[0])
        for line in ("| reverse KL(q‖p) |", "| total variation |", "| same top 10, in order |", "| 0.8 to 1 |"):
            assert line in more
        shown = run(*pair, "--targets", files / "targets.npy", "--markdown").stdout
        for line in (
            "| perplexity of the reference |",
            "| ln ratio |",
            "| p99.9 |",
            "| root mean square |",
            "| p0.1 |",
        ):
            assert line in shown

    def test_csv(self, files):
        arguments = (files / "full.npy", files / "int8.npy", "--more", "--targets", files / "targets.npy")
        model = report_of(*arguments)["models"][0]
        first, *bands = csv.DictReader(io.StringIO(run(*arguments, "--csv", "-").stdout))
        assert float(first["perplexity_ratio"]) == model["perplexity"]["ratio"]["value"]
        assert float(first["perplexity_ratio_low"]) == model["perplexity"]["ratio"]["low"]
        assert float(first["delta_p_p99_9"]) == model["delta_p"]["p99_9"]
        assert float(first["reverse_stderr"]) == model["reverse"]["stderr"]
        assert [line["group"] for line in bands] == [f"confidence {band}" for band in model["bands"]]
        assert float(bands[0]["mean"]) == model["bands"]["0 to 0.2"]["mean"]


class TestLlama:
    """A pair of files of llama.cpp, and the tokens in them."""

    @pytest.fixture(params=[50, 49])
    def pair(self, request, logits, tmp_path):
        """Two files, what they hold, and the targets: by their places in the text that llama.cpp was given."""
        n_ctx = request.param
        tokens = np.random.default_rng(0).integers(0, 100, 60 * n_ctx)
        held = []
        for name in ("full", "noisy"):
            x = torch.from_numpy(logits[name])
            held.append(write_kld(tmp_path / f"{name}.kld", x, tokens, n_ctx).double().numpy())
            (tmp_path / name).mkdir()
            for k in range(2):  # the same in shards
                part = (x[30 * k :][:30], tokens[30 * k * n_ctx :][: 30 * n_ctx])
                write_kld(tmp_path / name / f"{k}.kld", *part, n_ctx)
        # The token after each of the positions n_ctx/2 ... n_ctx - 2 of a chunk.
        places = [[chunk * n_ctx + k + 1 for k in range(n_ctx // 2, n_ctx - 1)] for chunk in range(60)]
        return tmp_path, held, tokens[places]

    def test_the_tokens_of_the_file(self, pair):
        folder, (p, q), targets = pair
        model = report_of(folder / "full.kld", folder / "noisy.kld", formats=None)["models"][0]
        # As they stand, of clipped classes the edge: as llama.cpp has it.
        agree(model, of_targets(at(p, targets), at(q, targets), np.ones(targets.shape)), rel=1e-6)
        in_pieces = report_of(folder / "full.kld", folder / "noisy.kld", "--batch-rows", 7, formats=None)
        assert in_pieces["models"] == [model]
        in_shards = report_of(folder / "full", folder / "noisy", formats=None)["models"][0]
        assert in_shards == {**model, "path": str(folder / "noisy")}

    def test_their_estimate(self, pair, logits, tmp_path):
        folder, (p, _), targets = pair
        np.save(tmp_path / "q.npy", logits["noisy"])
        theirs = np.where(p > -16, np.exp(p) * (p - log_probs(logits["noisy"])), 0).sum(-1)
        for arguments in ((tmp_path / "q.npy", "--batch-rows", 13), (tmp_path / "q.npy",)):
            model = report_of(folder / "full.kld", *arguments)["models"][0]
            agree(model, {"llama_cpp": of_mean(theirs, np.ones(targets.shape))}, rel=1e-6)
        assert "| KL as llama.cpp estimates it |" in run(folder / "full.kld", tmp_path / "q.npy", "--markdown").stdout
        reverse = report_of(folder / "full.kld", tmp_path / "q.npy", "--direction", "reverse")
        assert "llama_cpp" not in reverse["models"][0]

    def test_other_targets(self, pair):
        folder, (p, q), targets = pair
        other = targets[:, ::-1]
        np.save(folder / "t.npy", other)
        arguments = (folder / "full.kld", folder / "noisy.kld", "--targets", folder / "t.npy")
        model = report_of(*arguments, formats=None)["models"][0]
        agree(model, of_targets(at(p, other), at(q, other), np.ones(other.shape)), rel=1e-6)

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            (("--classes", 50), "a token is not among the 50 classes"),
            (("--eps", 1e-9), "--eps changes q"),
        ],
    )
    def test_why_there_is_no_perplexity(self, pair, arguments, reason):
        folder, _, _ = pair
        report = report_of(folder / "full.kld", folder / "noisy.kld", *arguments, formats=None)
        assert report["no_targets"] == reason
        assert "perplexity" not in report["models"][0]
        done = run(folder / "full.kld", folder / "noisy.kld", *arguments, formats=None)
        assert f"No perplexity of the tokens: {reason}." in done.stdout


class TestErrors:
    def raises(self, message, *arguments, **options):
        assert message in run(*arguments, code=2, **options).stderr.replace("\n", " ")

    def test_targets(self, files, targets, tmp_path):
        pair, bad = (files / "full.npy", files / "int8.npy", "--targets"), tmp_path / "bad.npy"
        self.raises("--targets: no.npy does not exist", *pair, "no.npy")
        for value, shown in ((100, "100"), (-1, "-1"), (0.5, "0.5"), (np.nan, "nan")):
            wrong = targets.astype(float)
            wrong[7, 3] = value
            np.save(bad, wrong)
            rule = "--targets must be classes, from 0 to 99, or -100 for rows that do not count."
            self.raises(f"{rule} Got {shown} in", *pair, bad)
        np.save(bad, targets[:, 0])
        self.raises("--targets must have one entry for each row, (60, 24). Got shape (60,) in", *pair, bad)
        np.save(bad, targets[:50])
        self.raises("--targets must have one entry for each sample, (60,), or for each row, (60, 24).", *pair, bad)
        for option in (["--more"], ["--targets", files / "targets.npy"]):
            message = f"--eps must be 0 with {option[0]}, which are of q as it is. Got 0.1."
            self.raises(message, *pair[:2], *option, "--eps", 0.1)


class TestGates:
    def test_any_key(self, files):
        arguments = (files / "full.npy", files / "noisy.npy", files / "int8.npy", "--floor", files / "again.npy")
        arguments += ("--targets", files / "targets.npy", "--more")
        report = report_of(*arguments)
        keys = {
            "jensen_shannon": "jensen_shannon.value",
            "agreement_10.low": "agreement_10.low",
            "perplexity.ratio": "perplexity.ratio.value",
            "perplexity.ln_ratio.high": "perplexity.ln_ratio.high",
            "delta_p.rms": "delta_p.rms.value",
            "delta_p.p99.9": "delta_p.p99_9",
            "delta_p.min": "delta_p.min",
            "difference.mean": "difference.mean",
            "difference.ln_ratio.high": "difference.ln_ratio.high",
            "above_floor.high": "above_floor.high",
        }
        for key, path in keys.items():
            models = report["models"][1:] if key.startswith("difference") else report["models"]
            largest = max(functools.reduce(dict.__getitem__, path.split("."), model) for model in models)
            run(*arguments, "--fail-above", f"{key}={largest!r}")
            done = run(*arguments, "--fail-above", f"{key}={largest - 1e-6!r}", code=1)
            assert f": {key.replace('p99.9', 'p99_9')} = " in done.stderr

    def test_a_limit_alone_asks_for_the_value(self, files):
        pair = (files / "full.npy", files / "int8.npy")
        report = report_of(*pair, "--fail-below", "agreement_5=0.99", code=1)
        assert "agreement_5 = " in report["limits"]["failed"][0]
        three = (*pair, files / "noisy.npy")
        report = report_of(*three, "--fail-above", "difference.total_variation=0.01", code=1)
        assert "noisy: difference.total_variation = " in report["limits"]["failed"][0]
        done = run(*three, "--fail-above", "difference.ln_ratio=0.01", code=2)
        assert "A limit of ln_ratio needs --targets" in done.stderr

    @pytest.mark.parametrize(
        ("limit", "needs"),
        [
            ("perplexity.ratio", "--targets, a recording or a file of llama.cpp, and no --eps"),
            ("delta_p.mean", "--targets, a recording or a file of llama.cpp, and no --eps"),
            ("llama_cpp", "a file of llama.cpp as the reference"),
            ("above_floor.mean", "--floor"),
            ("above_floor.ln_ratio", "--floor"),
            ("difference.mean", "two models or more"),
        ],
    )
    def test_what_a_limit_needs(self, files, limit, needs):
        done = run(files / "full.npy", files / "int8.npy", "--fail-above", f"{limit}=1", code=2)
        assert f"A limit of {limit.partition('.')[0]} needs {needs}. Got none." in done.stderr

    @pytest.mark.parametrize(
        "limit", ["perplexity", "perplexity.mean", "delta_p.p101", "bands", "reverse.mean", "p50.low"]
    )
    def test_no_such_value(self, files, limit):
        done = run(files / "full.npy", files / "int8.npy", "--fail-above", f"{limit}=1", code=2)
        assert f"Got '{limit}'." in done.stderr.replace("\n", " ")

    def test_of_q_as_it_is(self, files):
        done = run(files / "full.npy", files / "int8.npy", "--fail-above", "reverse=1", "--eps", 1e-9, code=2)
        assert "--eps must be 0 with limits of reverse, which are of q as it is. Got 1e-09." in done.stderr


def report_in_processes(rank, size, arguments, folder):
    run(*arguments, "--json", folder / f"{size}.json")
    return rank


def test_the_same_report_from_1_2_and_3_processes(files, tmp_path, two_processes, three_processes):
    arguments = [files / "full.npy", files / "noisy.npy", files / "int8.npy", "--floor", files / "again.npy"]
    arguments += ["--targets", files / "targets.npy", "--more"]
    report_in_processes(0, 1, [*arguments, "--batch-rows", 7], tmp_path)
    for processes in (two_processes, three_processes):
        processes(report_in_processes, arguments, tmp_path)
        assert (tmp_path / f"{processes.size}.json").read_text() == (tmp_path / "1.json").read_text()


class TestFloor:
    def test_beside_its_floor(self, files, logits, targets):
        arguments = (
            files / "full.npy",
            files / "noisy.npy",
            files / "int8.npy",
            "--floor",
            files / "again.npy",
            "--more",
        )
        report = report_of(*arguments, "--targets", files / "targets.npy")
        alone = report_of(files / "full.npy", files / "again.npy", "--more", "--targets", files / "targets.npy")[
            "models"
        ][0]
        assert report["floor"] == alone
        p, floor = (log_probs(logits[name]) for name in ("full", "again"))
        weight = np.ones((60, 24))
        for model in report["models"]:
            q = log_probs(logits[model["name"]])
            above, kl = model["above_floor"], of_mean((np.exp(p) * (floor - q)).sum(-1), weight)
            assert above["to"] == "again"
            assert [above["mean"], above["stderr"]] == pytest.approx([*kl], rel=1e-6)
            assert [above["low"], above["high"]] == pytest.approx(
                [kl.value + z * kl.stderr for z in (-1.96, 1.96)], rel=1e-6
            )
            agree(above, {"ln_ratio": of_mean(at(floor - q, targets), weight)})
        assert "difference" not in report["models"][0]
        assert report["models"][1]["difference"]["to"] == "int8"

    def test_what_is_shown(self, files):
        shown = run(files / "full.npy", files / "int8.npy", "--floor", files / "again.npy", "--markdown").stdout
        assert "|  | int8 | floor |" in shown
        assert re.search(r"\| above the floor \| [\d.e-]+ ± [\d.e-]+ \|  \|", shown)
        lines = [
            *csv.DictReader(
                io.StringIO(
                    run(files / "full.npy", files / "int8.npy", "--floor", files / "again.npy", "--csv", "-").stdout
                )
            )
        ]
        assert [line["name"] for line in lines] == ["int8", "again"]

    def test_it_has_the_format_of_the_reference(self, files, logits, tmp_path):
        np.save(tmp_path / "q.npy", np.exp(log_probs(logits["int8"])))
        report = report_of(
            files / "full.npy", tmp_path / "q.npy", "--floor", files / "again.npy", formats="logits,probs"
        )
        assert report["floor"]["mean"] == report_of(files / "full.npy", files / "again.npy")["models"][0]["mean"]

    def test_it_must_be_of_the_same_rows(self, files, logits, tmp_path):
        np.save(tmp_path / "short.npy", logits["full"][:50])
        done = run(files / "full.npy", files / "int8.npy", "--floor", tmp_path / "short.npy", code=2)
        assert "Both must have the same rows" in done.stderr
        assert (
            "--floor: no.npy does not exist"
            in run(files / "full.npy", files / "int8.npy", "--floor", "no.npy", code=2).stderr
        )


@pytest.mark.parametrize(
    ("value", "margin", "shown"),
    [
        (12345, 0.0, "12,345"),
        (0.123456, 0.0, "0.1235"),
        (0.99998643, 4.407e-07, "0.99998643"),
        (1.0002502, 9.6e-05, "1.00025"),
        (0.001, 5.0, "0.001"),
        (2.5, 0.0, "2.5"),
        (math.inf, 1.0, "inf"),
        (1.0, 1e-300, "1"),
    ],
)
def test_as_many_digits_as_are_known(value, margin, shown):
    assert number(value, margin) == shown
