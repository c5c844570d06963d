"""Files that have clipped the smallest log-probabilities: what the divergence is without them."""

import json
import math

import numpy as np
import pytest
import torch
from command import report_of, run
from kld import write_kld
from scipy.optimize import minimize
from torch import Tensor

from klmetric.saved.clipped import nearest, rest_of

WIDE = 151_936


def peaked(*peaks: float, rows: int = 3, classes: int = WIDE, noise: float = 0.05) -> tuple[Tensor, Tensor]:
    """Logits of a model that is nearly sure, over a bulk of N(0, 1), and of another one near it."""
    generator = torch.Generator().manual_seed(1)
    p = torch.randn(1, rows, classes, generator=generator)
    for k, peak in enumerate(peaks):
        p[..., 7 * k] = peak
    return p, p + noise * torch.randn(p.shape, generator=generator)


def exact(p: Tensor, q: Tensor, direction: str = "forward") -> np.ndarray:
    """In float64 numpy, straight from the definition."""
    p, q = (x.numpy().astype(np.float64).reshape(-1, x.shape[-1]) for x in (p, q))
    log_p, log_q = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in (p, q))
    if direction == "jensen_shannon":
        middle = np.logaddexp(log_p, log_q) - np.log(2)
        return sum((np.exp(x) * (x - middle)).sum(-1) for x in (log_p, log_q)) / 2
    ways = {"forward": [(log_p, log_q)], "reverse": [(log_q, log_p)], "jeffreys": [(log_p, log_q), (log_q, log_p)]}
    return sum((np.exp(a) * (a - b)).sum(-1) for a, b in ways[direction])


class Files:
    """The same pair of logits, as arrays and as files of llama.cpp."""

    def __init__(self, folder, p, q, window=16.0):
        self.logits = p, q
        for name, x in (("p", p), ("q", q)):
            np.save(folder / f"{name}.npy", x.numpy())
            n_ctx = 2 * x.shape[1] + 1
            write_kld(folder / f"{name}.kld", x, np.zeros(len(x) * n_ctx), n_ctx, window)
        self.folder = folder

    def model(self, kinds, *options):
        paths = [self.folder / f"{name}.{kind}" for name, kind in zip("pq", kinds, strict=True)]
        return report_of(*paths, *options, "--worst", 1)["models"][0]


KINDS = [("kld", "npy"), ("npy", "kld"), ("kld", "kld")]
CASES = {
    "peaks_22_and_21": ((22, 21), 16, 0.05),
    "peak_15": ((15,), 16, 0.05),
    "peaks_22_and_21_in_24": ((22, 21), 24, 0.05),
    "peak_30_in_24": ((30, 29), 24, 0.05),
    "two_alike": ((20, 20), 16, 0.02),
    "a_step_between": ((19, 17, 15, 13, 11, 9), 16, 0.03),
    "far_apart": ((22, 21), 16, 1.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_divergence_without_what_was_clipped(tmp_path, case):
    peaks, window, noise = CASES[case]
    p, q = peaked(*peaks, noise=noise)
    files = Files(tmp_path, p, q, window)
    mass = [np.where(x.numpy() <= x.numpy().max(-1, keepdims=True) - window, x.softmax(-1).numpy(), 0) for x in (p, q)]
    for direction in ("forward", "reverse", "jeffreys", "jensen_shannon"):
        values = exact(p, q, direction)
        for kinds in KINDS:
            model = files.model(kinds, "--direction", direction)
            if direction == "jeffreys":  # which is both ways
                assert model == files.model(kinds, "--direction", direction, "--batch-rows", 1)
            assert model["mean"] == pytest.approx(values.mean(), rel=0.05, abs=0)
            assert model["max"] == pytest.approx(values.max(), rel=0.05, abs=0)
            assert model["stderr"] is None, "one chunk, which is one sample"
            assert model["worst"][0]["position"] == values.argmax()
            assert model["agreement"] == (p.argmax(-1) == q.argmax(-1)).double().mean()
            # It is too large by no more than rounding can make it, and too small by what was clipped.
            assert model["mean"] - values.mean() <= model["storage_error"]["largest"]
            for name, kind, x in zip(("reference", "model"), kinds, mass, strict=True):
                known = model["clipped"][name] if kind == "kld" else x.sum(-1).mean()
                assert known == pytest.approx(x.sum(-1).mean(), abs=window / 65535 / 2)


def test_the_clipped_mass_is_named(tmp_path):
    files = Files(tmp_path, *peaked(15))
    mass = files.model(("kld", "npy"))["clipped"]
    assert mass["model"] == 0
    assert 1e-3 < mass["reference"] < 3e-3
    printed = run(tmp_path / "p.kld", tmp_path / "q.npy", "--markdown").stdout
    assert (
        f"the divergence is a lower bound. The files have clipped the classes with {mass['reference']:.4g} of p"
        in printed
    )
    both = run(tmp_path / "p.kld", tmp_path / "q.kld", "--markdown").stdout
    assert " of p and " in both
    assert "lower bound" not in run(tmp_path / "p.npy", tmp_path / "q.npy", "--markdown").stdout


def test_rows_with_nothing_clipped_are_as_they_were(tmp_path):
    """Also those that span a whole number of nats, and those in which all classes are alike."""
    p, q = peaked(6, classes=1000, rows=4)
    p[0, 1], q[0, 1] = 2.0, 1.0
    p[0, 2, 1:9], q[0, 2, 5:15] = -8, -8
    p[0, 2, 0] = q[0, 2, 0] = 6
    files = Files(tmp_path, p, q)
    for kinds in KINDS:
        model = files.model(kinds)
        assert "clipped" not in model
        assert model["mean"] == pytest.approx(exact(p, q).mean(), rel=1e-3)


@pytest.mark.parametrize("span", [16, 18, 24])
def test_a_span_that_looks_clipped_by_chance(tmp_path, span):
    p, q = peaked(6, classes=1000, rows=1)
    p[..., 1:9], q[..., 5:15] = 6 - span, 6 - span
    q[..., 0] = 6
    files = Files(tmp_path, p, q, window=30)
    for kinds in KINDS:
        assert files.model(kinds)["mean"] == pytest.approx(exact(p, q).mean(), rel=1e-3)


def test_weights_and_groups(tmp_path):
    p, q = peaked(15, rows=4)
    files = Files(tmp_path, p, q)
    np.save(tmp_path / "weight.npy", np.array([[1.0, 0.0, 2.0, 0.5]]))
    np.save(tmp_path / "groups.npy", np.array([[0, 1, 1, 0]]))
    values = exact(p, q)
    options = ("--weight", tmp_path / "weight.npy", "--groups", tmp_path / "groups.npy")
    model = files.model(("kld", "npy"), *options)
    assert model["mean"] == pytest.approx(np.average(values, weights=[1, 0, 2, 0.5]), rel=0.05)
    assert model["groups"]["1"]["mean"] == pytest.approx(values[2], rel=0.05)
    alone = [files.model(("kld", "npy"), "--mask", mask_of(tmp_path, k))["clipped"]["reference"] for k in range(4)]
    assert model["clipped"]["reference"] == pytest.approx(np.average(alone, weights=[1, 0, 2, 0.5]))


def mask_of(folder, k):
    np.save(folder / "mask.npy", np.arange(4).reshape(1, 4) == k)
    return folder / "mask.npy"


def test_the_first_classes_only(tmp_path):
    """Of a padded vocabulary: what was clipped of the padding is not among them."""
    p, q = peaked(15, 14)
    for x in (p, q):
        x[..., -2000:] = -50
    files = Files(tmp_path, p, q)
    kept = WIDE - 2000
    for kinds in KINDS:
        model = files.model(kinds, "--classes", kept)
        assert model["mean"] == pytest.approx(exact(p[..., :kept], q[..., :kept]).mean(), rel=0.05)


@pytest.mark.parametrize("input_format", ["probs", "log_probs"])
def test_against_other_formats(tmp_path, input_format):
    p, q = peaked(15)
    Files(tmp_path, p, q)
    np.save(tmp_path / "q.npy", (q.double().softmax(-1) if input_format == "probs" else q.log_softmax(-1)).numpy())
    done = run(tmp_path / "p.kld", tmp_path / "q.npy", "--json", "-", formats=input_format)
    assert json.loads(done.stdout)["models"][0]["mean"] == pytest.approx(exact(p, q).mean(), rel=0.05)


def test_several_models_are_measured_in_one_pass(tmp_path):
    p, q = peaked(15)
    files = Files(tmp_path, p, q)
    alone = {kind: files.model(("kld", kind)) for kind in ("npy", "kld")}
    both = report_of(tmp_path / "p.kld", tmp_path / "q.npy", tmp_path / "q.kld")["models"]
    for model in both:
        kind = model["path"][-3:]
        assert model["mean"] == alone[kind]["mean"]
        assert model["clipped"] == alone[kind]["clipped"]


def test_a_temperature_is_refused(tmp_path):
    files = Files(tmp_path, *peaked(15))
    error = run(tmp_path / "p.kld", tmp_path / "q.npy", "--temperature", 2, code=2).stderr.replace("\n", " ")
    assert "--temperature must be 1 where log-probabilities are clipped" in error
    assert "Got 2, and 3 such rows at once in" in error
    assert "Save the logits themselves." in error
    # Where nothing is clipped, or what is does not count, all is known.
    p, q = peaked(6, classes=100)
    p[0, 1, 0] = 30
    files = Files(tmp_path, p, q)
    np.save(tmp_path / "mask.npy", np.array([[1, 0, 1]]))
    model = files.model(("kld", "npy"), "--temperature", 2, "--mask", tmp_path / "mask.npy")
    assert model["mean"] == pytest.approx(exact(p[:, ::2] / 2, q[:, ::2] / 2).mean(), rel=1e-3)


def test_models_that_have_nothing_in_common(tmp_path):
    """One is sure of a class that the other has clipped: each class has the edge for a bound, not only all of them."""
    p, q = peaked(22, 21, classes=50_000)
    q[..., 0], q[..., 1], q[..., 7] = 0, 25, 0
    files = Files(tmp_path, p, q)
    for direction in ("forward", "reverse"):
        for kinds in KINDS:
            value, model = exact(p, q, direction).mean(), files.model(kinds, "--direction", direction)
            # No class is more likely than the edge.
            assert 15 < model["mean"] <= value + model["storage_error"]["largest"]


def test_masked_classes_and_bad_rows(tmp_path):
    p, q = peaked(22, 21, classes=2000)
    q[0, 0, 100:200] = -math.inf  # where p may have next to nothing
    q[0, 1, 0] = -math.inf  # where p has nearly all
    q[0, 2, 5] = math.nan
    files = Files(tmp_path, p, q.nan_to_num())
    np.save(tmp_path / "q.npy", q.numpy())
    error = run(tmp_path / "p.kld", tmp_path / "q.npy", code=2).stderr.replace("\n", " ")
    assert "Got sample 0, position 2 of" in error
    assert "q.npy, which has NaN at class 5 (nan)" in error
    model = files.model(("kld", "npy"), "--nan-strategy", "ignore")
    assert [model["count"], model["infinite"], model["invalid"]] == [2, 1, 1]
    assert model["worst"][0]["position"] == 1


def test_processes_share_the_rows(tmp_path, two_processes):
    p, q = (x.reshape(3, 2, -1) for x in peaked(15, rows=6, classes=20_000))
    Files(tmp_path, p, q)
    arguments = [tmp_path / "p.kld", tmp_path / "q.npy", "--json"]
    run(*arguments, tmp_path / "1.json")
    two_processes(_in_processes, [*arguments, tmp_path / "2.json"])
    assert (tmp_path / "2.json").read_text() == (tmp_path / "1.json").read_text()
    assert '"clipped"' in (tmp_path / "1.json").read_text()


def _in_processes(rank, size, arguments):
    return run(*arguments).stdout


class TestNearest:
    """The clipped classes of one row, beside a general solver."""

    def row(self, seed):
        """Log-probabilities of ten classes, those of another, and the first clipped at 3 nats below its largest."""
        generator = torch.Generator().manual_seed(seed)
        p, q = (2 * torch.randn(2, 1, 10, generator=generator, dtype=torch.float64)).log_softmax(-1)
        edge = p.amax(-1, keepdim=True) - 3
        clipped = p.masked_fill(p <= edge, -math.inf)
        # A grid so fine that the mass is known to 1e-5.
        return p, q, clipped, torch.cat([torch.full_like(edge, 1e-5), edge], -1)

    @pytest.mark.parametrize("seed", range(8))
    @pytest.mark.parametrize("direction", ["forward", "reverse"])
    def test_no_other_is_nearer(self, seed, direction):
        p, q, clipped, grid = self.row(seed)
        rest = rest_of(clipped, grid, None)
        if rest is None:
            pytest.skip("nothing is clipped")
        assert float(rest.least) <= float(p.exp()[rest.is_clipped].sum()) <= float(rest.most)
        found, same = nearest(clipped, q, rest, None)
        assert same is q
        where = rest.is_clipped[0].numpy()
        assert (found[0].exp()[where] <= rest.edge.exp() * (1 + 1e-9)).all()
        known, edge = clipped[0].exp().numpy()[~where], float(rest.edge.exp())
        most = float(p.exp()[rest.is_clipped].sum())

        def divergence(x):
            full = np.empty(10)
            full[~where], full[where] = known, x
            pair = (np.log(full), q[0].numpy())
            return float(exact(*(torch.from_numpy(y) for y in pair), direction)[0])

        n = int(where.sum())
        best = minimize(
            divergence,
            np.full(n, most / n),
            bounds=[(1e-12, edge)] * n,
            constraints={"type": "eq", "fun": lambda x: x.sum() - most},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 1000},
        )
        assert divergence(found[0].exp().numpy()[where]) == pytest.approx(best.fun, rel=1e-3, abs=1e-4)
        assert divergence(found[0].exp().numpy()[where]) <= divergence(p[0].exp().numpy()[where]) + 1e-4
