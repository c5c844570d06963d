"""Distributions as inputs: every pair that torch registers, against its definition and its formula in 60 digits."""

import math
import re
import warnings

import closed_forms_reference as reference
import mpmath
import pytest
import torch
import torch.distributions as D
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions.kl import _KL_REGISTRY, register_kl

from klmetric import KLDivergence, KLDivergenceSummary, kl_divergence
from klmetric.rows.distributions import in_float64

# Of each family two that are apart, and within the other's support where they can be.
ORDINARY = {
    D.Bernoulli: ((0.3,), (0.6,)),
    D.Binomial: ((5, 0.3), (5, 0.6)),
    D.Geometric: ((0.3,), (0.6,)),
    D.Poisson: ((2.5,), (4.0,)),
    D.Beta: ((2.5, 1.5), (3.0, 0.7)),
    D.ContinuousBernoulli: ((0.3,), (0.8,)),
    D.Exponential: ((1.5,), (0.4,)),
    D.Gamma: ((2.5, 1.5), (3.0, 0.7)),
    D.Gumbel: ((0.3, 1.5), (-0.3, 0.7)),
    D.HalfNormal: ((1.5,), (0.4,)),
    D.Laplace: ((0.3, 1.5), (-0.3, 0.7)),
    D.Normal: ((0.3, 1.5), (-0.3, 0.7)),
    D.Cauchy: ((0.3, 1.5), (-0.3, 0.7)),
    D.Pareto: ((1.5, 3.5), (0.7, 1.5)),
    D.Uniform: ((0.8, 0.9), (-1.0, 2.0)),
}
MATRICES = {D.MultivariateNormal, D.LowRankMultivariateNormal, D.Dirichlet, D.Wishart}
# Their pairs are others': of what they are made of, or of the classes.
WRAPPERS = {D.Independent, D.TransformedDistribution, D.ExponentialFamily, D.Categorical, D.OneHotCategorical}
PAIRS = [pair for pair in _KL_REGISTRY if not {*pair} & (WRAPPERS | MATRICES)]
CROSS = [pair for pair in PAIRS if not _KL_REGISTRY[pair].__name__.endswith("_infinity")]
INFINITE = [pair for pair in PAIRS if pair not in CROSS]


def name(x):
    return "-".join(kind.__name__ for kind in x) if isinstance(x, tuple) else getattr(x, "__name__", None)


def made(kind, values, dtype=torch.float64, **options):
    count = kind is D.Binomial
    tensors = [x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.float64) for x in values]
    return kind(*(int(x) if count and i == 0 else x.to(dtype) for i, x in enumerate(tensors)), **options)


def kl(p, q, **options):
    return kl_divergence(p, q, reduction="none", **options)


def to(d, dtype):
    """The same distribution, as nearly as another dtype can say it."""
    return made(type(d), [getattr(d, n) for n in NAMES[type(d)]], dtype)


NAMES = {
    D.Bernoulli: ("probs",), D.Binomial: ("total_count", "probs"), D.Geometric: ("probs",), D.Poisson: ("rate",),
    D.Beta: ("concentration1", "concentration0"), D.ContinuousBernoulli: ("probs",), D.Exponential: ("rate",),
    D.Gamma: ("concentration", "rate"), D.Gumbel: ("loc", "scale"), D.HalfNormal: ("scale",),
    D.Laplace: ("loc", "scale"), D.Normal: ("loc", "scale"), D.Cauchy: ("loc", "scale"), D.Pareto: ("scale", "alpha"),
    D.Uniform: ("low", "high"), D.Dirichlet: ("concentration",),
}  # fmt: skip


class TestEveryPairOfTorch:
    @pytest.mark.parametrize("pair", CROSS, ids=name)
    def test_by_the_definition(self, pair):
        p, q = made(pair[0], ORDINARY[pair[0]][0]), made(pair[1], ORDINARY[pair[1]][1])
        exact = reference.integral(p, q)
        assert float(abs(kl(p, q).item() - exact) / exact) < 2e-14
        if pair[0] is pair[1]:  # and the reference of other tests is one
            assert float(abs(reference.textbook(p, q) - exact) / exact) < 1e-15

    @pytest.mark.parametrize("pair", INFINITE, ids=name)
    def test_infinite_where_q_has_no_mass(self, pair):
        p, q = made(pair[0], ORDINARY[pair[0]][0]), made(pair[1], ORDINARY[pair[1]][1])
        assert kl(p, q) == math.inf
        assert kl(p, q.expand((3,))).tolist() == [math.inf] * 3

    def test_all_pairs_are_known(self):
        """A pair that another version of torch adds is to be looked at."""
        families = set().union(*_KL_REGISTRY)
        assert families - WRAPPERS - MATRICES - {D.HalfNormal} <= {*ORDINARY}


def near(kind, share, dtype):
    """Many of one family, and others that share away: places by a scale, all else by itself."""
    generator = torch.Generator().manual_seed(0)

    def some(low, high, n=40):
        return 10 ** (torch.rand(n, generator=generator, dtype=torch.float64) * (high - low) + low)

    ranges = {
        "probs": (-4, -0.4), "rate": (-6, 6), "concentration": (-2, 6), "concentration1": (-2, 6), "loc": (0, 1),
        "concentration0": (-2, 6), "scale": (-1, 1), "alpha": (-2, 2), "low": (0, 1), "high": (2, 3),
        "total_count": (0, 2),
    }  # fmt: skip
    a, b = [], []
    for n in NAMES[kind]:
        x = some(*ranges[n], *([(40, 5)] if kind is D.Dirichlet else []))
        sign = torch.where(torch.rand(x.shape, generator=generator) < 0.5, -1, 1)
        if n == "total_count":
            x, y = torch.tensor(7.0), torch.tensor(7.0)
        else:
            y = x * (1 + share * sign)
        if kind is D.Uniform or (kind is D.Pareto and n == "scale"):
            y = x * (1 + share) if n == "high" else x * (1 - share)
        a.append(x)
        b.append(y)
    return made(kind, a, dtype), made(kind, b, dtype)


def elements(d):
    """Each element of a batch as a distribution of its own."""
    values = [getattr(d, n) for n in NAMES[type(d)]]
    return [made(type(d), [x[i] if x.ndim else x for x in values], values[-1].dtype) for i in range(d.batch_shape[0])]


@pytest.mark.parametrize("kind", NAMES, ids=name)
class TestNearEqual:
    @pytest.mark.parametrize("share", [1e-6, 1e-3, 0.3])
    def test_in_float32_to_the_last_digit(self, kind, share):
        p, q = near(kind, share, torch.float32)
        values = kl(p, q)
        assert values.dtype == torch.float32
        for value, a, b in zip(values.tolist(), elements(p), elements(q), strict=True):
            exact = reference.textbook(a, b)
            assert abs(value - exact) <= exact * 1.2e-7 + 1e-40

    @pytest.mark.parametrize("share", [1e-6, 1e-3, 0.3])
    def test_in_float64(self, kind, share):
        p, q = near(kind, share, torch.float64)
        for value, a, b in zip(kl(p, q).tolist(), elements(p), elements(q), strict=True):
            exact = reference.textbook(a, b)
            # As if a parameter were off by a few of its last digits.
            assert abs(value - exact) <= exact * (1e-13 + 1e-14 / share)

    def test_equal_ones_are_exactly_0(self, kind):
        p, q = near(kind, 0.0, torch.float32)
        assert kl(p, q, direction="jeffreys").count_nonzero() == 0

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
    def test_small_dtypes_are_computed_in_float64(self, kind, dtype):
        values = [[torch.tensor(x) for x in values] for values in ORDINARY.get(kind, [((3.0, 0.5),), ((1.0, 2.0),)])]
        p, q = (made(kind, x, dtype) for x in values)
        exact = kl(to(p, torch.float64), to(q, torch.float64))
        value = kl(p, q)
        assert value.dtype == torch.float32
        assert value == exact.float()

    def test_the_same_bits_in_any_batch(self, kind):
        p, q = near(kind, 0.3, torch.float64)
        values = kl(p, q)
        for index in (slice(0, 1), slice(3, 10), slice(1, 40, 3)):
            a, b = (made(kind, [getattr(d, n)[index] for n in NAMES[kind]]) if kind is not D.Binomial else
                    made(kind, [7, d.probs[index]]) for d in (p, q))  # fmt: skip
            assert torch.equal(kl(a, b), values[index])


def matrix(seed, n=4, dtype=torch.float64):
    return torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def of_matrix(kind, m, dtype=torch.float64):
    """One with parameters that are smooth functions of a square matrix."""
    loc, positive = m[0].to(dtype), (m @ m.mT + torch.eye(4)).to(dtype)
    if kind == "low_rank":
        return D.LowRankMultivariateNormal(loc, m[:, :2].to(dtype), m[:, 2].exp().to(dtype))
    if kind == "wishart":
        return D.Wishart(loc[0].exp() + 4, positive)
    tril = (m.tril(-1) + m.diagonal().exp().diag()).to(dtype)
    return D.MultivariateNormal(loc, **{kind: tril if kind == "scale_tril" else positive})


def multivariate(kind, seed, share=0.0, dtype=torch.float64):
    return of_matrix(kind, matrix(seed) * (1 + share * matrix(seed + 1)), dtype)


@pytest.mark.parametrize("kind", ["scale_tril", "covariance_matrix", "precision_matrix", "low_rank", "wishart"])
class TestMatrices:
    @pytest.mark.parametrize("share", [1e-5, 1e-2, 1.0])
    def test_to_the_last_digit(self, kind, share):
        p, q = multivariate(kind, 0, 0.0, torch.float32), multivariate(kind, 0, share, torch.float32)
        assert kl(p, q).item() == pytest.approx(float(reference.textbook(p, q)), rel=2e-7)

    def test_looked_at_before(self, kind):
        p, q = multivariate(kind, 0, 0.0, torch.float32), multivariate(kind, 0, 1e-5, torch.float32)
        value = kl(p, q)
        for d in (p, q):
            _ = d.covariance_matrix, d.precision_matrix, d.scale_tril
        assert torch.equal(kl(p, q), value)

    def test_equal_ones_are_exactly_0(self, kind):
        assert kl(multivariate(kind, 0), multivariate(kind, 0)) == 0

    @pytest.mark.slow
    def test_gradients(self, kind):
        def f(a, b):
            return kl_divergence(of_matrix(kind, a), of_matrix(kind, b))

        a, b = matrix(0).requires_grad_(), matrix(1).requires_grad_()
        assert gradcheck(f, (a, b))
        same = a.detach().clone().requires_grad_()
        assert gradcheck(f, (a, same))
        assert gradgradcheck(f, (a, same), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_weibull_of_any_concentrations(dtype):
    """To torch a power of an exponential distribution, with powers that are rounded."""
    cases = [(1.0, 2.0, 1.5, 3.0), (1.0, 1.484375, 1.0, 1.4921875), (2.0, 3.0, 2.015625, 3.0), (0.5, 0.5, 5.0, 8.0)]
    s, a, t, b = torch.tensor(cases, dtype=torch.float64).T
    value = kl_divergence(D.Weibull(s.to(dtype), a.to(dtype)), D.Weibull(t.to(dtype), b.to(dtype)), reduction="none")
    expected = [weibull(*case) for case in cases]
    torch.testing.assert_close(value.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=0)
    assert kl_divergence(D.Weibull(s, a), D.Weibull(s, a)) == 0


def weibull(s, a, t, b):
    """From E[log x] = log s - gamma/a and E[x^b] = s^b Gamma(1 + b/a)."""
    s, a, t, b = map(mpmath.mpf, (s, a, t, b))
    of_p, of_q = mpmath.log(a / s**a) - 1, mpmath.log(b / t**b) - (s / t) ** b * mpmath.gamma(1 + b / a)
    return float(of_p - of_q + (a - b) * (mpmath.log(s) - mpmath.euler / a))


def test_kumaraswamy_of_other_parameters_is_not_0():
    p, q = (D.Kumaraswamy(torch.tensor(2.0), torch.tensor(x)) for x in (3.777549982070923, 3.777550220489502))
    assert kl_divergence(p, p) == 0
    with pytest.raises(TypeError, match=r"registered in torch\.distributions\. Got Kumaraswamy"):
        kl_divergence(p, q)


def test_low_rank_and_full_and_one_covariance_for_a_batch():
    low, full = multivariate("low_rank", 0), multivariate("covariance_matrix", 1)
    for p, q in ((low, full), (full, low)):
        assert kl(p, q).item() == pytest.approx(float(reference.textbook(p, q)), rel=1e-13)
    many = D.MultivariateNormal(matrix(3), full.covariance_matrix)
    each = [kl(D.MultivariateNormal(m, full.covariance_matrix), low).item() for m in matrix(3)]
    assert kl(many, low).tolist() == pytest.approx(each, rel=1e-14)
    assert kl(many.expand((2, 4)), low).shape == (2, 4)


def test_low_rank_of_many_dimensions_is_torchs_in_float64():
    generator = torch.Generator().manual_seed(0)
    p, q = (
        D.LowRankMultivariateNormal(
            *(torch.rand(shape, generator=generator) + 0.1 for shape in ((300,), (300, 2), (300,)))
        )
        for _ in range(2)
    )
    full = (D.MultivariateNormal(d.loc.double(), in_float64(d).covariance_matrix) for d in (p, q))
    torch.testing.assert_close(kl(p, q), kl(*full).float())


T = torch.tensor
HALF = torch.float16


def half(*values):
    return [T(x, dtype=HALF) for x in values]


# name: (p, q, KL), most of them such as torch itself answers wrongly
EDGES = {
    "normal_half": (D.Normal(*half(300, 1)), D.Normal(*half(0, 1)), 45_000),
    "normal_half_scale": (D.Normal(*half(0, 3e-4)), D.Normal(*half(0, 1)), 7.61196),
    "poisson_half": (D.Poisson(*half(100)), D.Poisson(*half(101)), 0.0049669),
    "gamma_half": (D.Gamma(*half(1000, 1)), D.Gamma(*half(1001, 1)), 5.0008e-4),
    "normal_near": (D.Normal(T(1e-4), T(1.0001)), D.Normal(0.0, 1.0), 1.50033e-8),
    "log_normal_near": (D.LogNormal(T(1e-4), T(1.0001)), D.LogNormal(0.0, 1.0), 1.50033e-8),
    "dirichlet": (D.Dirichlet(T([1e6, 2e6, 3e6])), D.Dirichlet(T([1e6, 2e6, 3e6]) * 1.001), 5.0006e-7),
    "beta": (D.Beta(T(2e6), T(3e6)), D.Beta(T(2e6) * 1.001, T(3e6) * 1.001), 2.50129e-7),
    "poisson_0": (D.Poisson(T(0.0)), D.Poisson(T(1.0)), 1.0),
    "poisson_0_0": (D.Poisson(T(0.0)), D.Poisson(T(0.0)), 0.0),
    "poisson_from_0": (D.Poisson(T(1.0)), D.Poisson(T(0.0)), math.inf),
    "poisson_0_bernoulli": (D.Poisson(T(0.0)), D.Bernoulli(T(0.5)), math.log(2)),
    "bernoulli_1": (D.Bernoulli(T(1.0)), D.Bernoulli(T(1.0)), 0.0),
    "bernoulli_logits": (D.Bernoulli(logits=T(1000.0)), D.Bernoulli(logits=T(-1000.0)), 1000.0),
    "bernoulli_infinite_logit": (D.Bernoulli(logits=T(math.inf)), D.Bernoulli(T(0.5)), math.log(2)),
    "binomial_none": (D.Binomial(5, T(0.0)), D.Binomial(3, T(0.5)), 3 * math.log(2)),
    "binomial_all": (D.Binomial(5, T(1.0)), D.Binomial(5, T(0.5)), 5 * math.log(2)),
    "geometric_1": (D.Geometric(T(1.0)), D.Geometric(T(0.5)), math.log(2)),
    "continuous_bernoulli_uniform": (D.ContinuousBernoulli(T(0.3)), D.Uniform(T(0.0), T(1.0)), 0.0293862),
    "uniform_continuous_bernoulli": (D.Uniform(T(0.0), T(1.0)), D.ContinuousBernoulli(T(0.3)), 0.0297361),
    "uniform_beta": (D.Uniform(T(0.0), T(1.0)), D.Beta(T(1.0), T(1.0)), 0.0),
    "laplace_normal_far_out": (D.Laplace(T(1e6), T(1.0)), D.Normal(T(1e6), T(1.0)), 0.2257914),
    "pareto_no_variance": (D.Pareto(T(1.0), T(1.5)), D.Normal(T(0.0), T(1.0)), math.inf),
    "gamma_normal": (D.Gamma(T(1e6), T(1.0)), D.Normal(T(1e6), T(1e3)), 3.33333417e-7),
    "beta_normal": (D.Beta(T(1e5), T(1e5)), D.Normal(T(0.5).double(), T(1 / 200001).double().sqrt() / 2), 1.875e-11),
    "gamma_exponential": (D.Gamma(T(1.0), T(2.0)), D.Exponential(T(2.0)), 0.0),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`stderr` is NaN")  # of one row
@pytest.mark.parametrize("case", EDGES)
def test_edges(case):
    p, q, exact = EDGES[case]
    expected = pytest.approx(exact, rel=5e-5, abs=0)
    assert kl_divergence(p, q).item() == expected
    assert kl_divergence(q, p, direction="reverse").item() == expected
    metric, summary = KLDivergence(), KLDivergenceSummary()
    for each in (metric, summary):
        each.update(p, q)
    assert metric.compute().item() == expected
    assert summary.compute()["max"].item() == expected


class TestParameters:
    def test_what_was_looked_at_does_not_matter(self):
        for kind in (D.Bernoulli, D.Geometric, D.ContinuousBernoulli):
            for made_of in ("probs", "logits"):
                p, q = (kind(**{made_of: T([x], dtype=torch.bfloat16)}) for x in (0.3, 0.31))
                value = kl(p, q)
                _ = p.probs, p.logits, q.probs, q.logits
                assert torch.equal(kl(p, q), value)

    def test_of_two_formats(self):
        p, q = D.Bernoulli(T([0.3, 0.0, 1.0])), D.Bernoulli(logits=T([1.0, -800.0, 2.0]))
        exact = [0.3 * math.log(0.3) + 0.7 * math.log(0.7) + math.log(1 + math.e) - 0.3, 0, math.log1p(math.exp(-2))]
        assert kl(p, q).tolist() == pytest.approx(exact, rel=1e-6)

    @pytest.mark.parametrize("base", [D.Normal, D.Laplace, D.Gumbel], ids=name)
    def test_through_wrappers(self, base):
        a, b = (base(T([[300.0, 1.0]], dtype=HALF), T([[2.0, x]], dtype=HALF)) for x in (1.0, 1.01))
        exact = kl(to(a, torch.float64), to(b, torch.float64)).sum(-1).float()
        transform = [D.ExpTransform(), D.AffineTransform(T(1.0), T(2.0))]
        for wrap in (
            lambda d: D.Independent(d, 1),
            lambda d: D.Independent(D.TransformedDistribution(d, transform), 1),
            lambda d: D.TransformedDistribution(D.Independent(d, 1), transform),
        ):
            assert torch.equal(kl(wrap(a), wrap(b)), exact)

    def test_independent_categorical_keeps_zeros(self):
        p, q = (
            D.Independent(D.Categorical(probs=T([[0.5, 0.5, 0.0], x])), 1) for x in ([0.2, 0.8, 0.0], [0.4, 0.6, 0.0])
        )
        exact = 0.2 * math.log(0.5) + 0.8 * math.log(0.8 / 0.6)
        assert kl(p, q).item() == pytest.approx(exact, rel=1e-6)

    def test_gradients_reach_parameters_of_their_own_dtype(self):
        mean = T([300.0, 1.0], dtype=HALF, requires_grad=True)
        kl_divergence(D.Normal(mean, T(1.0, dtype=HALF)), D.Normal(T(0.0, dtype=HALF), T(1.0, dtype=HALF))).backward()
        assert mean.grad.tolist() == [150.0, 0.5]

    def test_one_of_float64_makes_the_result_float64(self):
        assert kl(D.Normal(T(0.0), 1.0), D.Normal(T(0.0).double(), 1.0)).dtype == torch.float64

    def test_shapes_broadcast(self):
        p = D.Pareto(T(1.0), T(2.0))
        assert kl(p, D.Exponential(torch.ones(3))).shape == (3,)
        assert kl(D.Beta(T(2.0), T(2.0)), D.Uniform(torch.zeros(2, 1), torch.ones(3))).shape == (2, 3)

    @pytest.mark.filterwarnings("ignore:2 of 3 rows")
    @pytest.mark.parametrize("kind", [D.Normal, D.Laplace, D.Gumbel, D.Cauchy, D.LogNormal], ids=name)
    def test_nan_and_values_out_of_range_are_nan(self, kind):
        p = kind(T([math.nan, 0.0, 0.0]), T([1.0, -1.0, 1.0]), validate_args=False)
        assert kl(p, kind(0.0, 1.0)).isnan().tolist() == [True, True, False]
        assert kl(p, p).isnan().tolist() == [True, True, False]
        if kind is D.Normal:  # also where the divergence would be infinite
            assert kl(p, D.Uniform(0.0, 1.0)).isnan().tolist() == [True, True, False]


SMOOTH = [k for k in NAMES if k not in (D.Pareto, D.Uniform)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", NAMES, ids=name)
@pytest.mark.parametrize("equal", [False, True], ids=["apart", "equal"])
def test_gradients(kind, equal):
    if equal and kind not in SMOOTH:
        pytest.skip("their divergence has an edge there")
    values = ORDINARY.get(kind, [((3.0, 0.5, 20.0),), ((1.0, 2.0, 19.0),)])
    count = values[0][:1] if kind is D.Binomial else ()
    a, b = ([T(x, dtype=torch.float64, requires_grad=True) for x in v[len(count) :]] for v in values)
    b = [x.detach().clone().requires_grad_() for x in a] if equal else b
    if kind is D.Uniform:
        b = [T(x, dtype=torch.float64, requires_grad=True) for x in (-1.0, 2.0)]

    def f(*xs):
        p, q = (kind(*count, *part, validate_args=False) for part in (xs[: len(a)], xs[len(a) :]))
        return kl_divergence(p, q)

    assert gradcheck(f, (*a, *b))
    assert gradgradcheck(f, (*a, *b), atol=1e-4)
    point = tuple(x.detach() for x in (*a, *b))
    hessian = torch.autograd.functional.hessian(f, point)[0][0]
    torch.testing.assert_close(torch.func.hessian(f)(*point), hessian)


class TestRegisteredByUsers:
    def test_theirs_is_used_and_gets_their_own(self):
        class Own(D.Distribution):
            arg_constraints = {}  # noqa: RUF012

            def __init__(self, x):
                self.x = x
                super().__init__(x.shape)

        class OfNormal(D.Normal):
            pass

        seen = []

        def form(p, q):
            seen.append((p, q))
            return torch.full((2,), 7.0)

        register_kl(Own, Own)(form)
        register_kl(OfNormal, OfNormal)(form)
        try:
            p = Own(torch.ones(2))
            assert kl(p, p).tolist() == [7.0, 7.0]
            assert seen[-1] == (p, p)
            normal = OfNormal(torch.zeros(2), 1.0)
            assert kl(normal, normal).tolist() == [7.0, 7.0]
        finally:
            for kind in (Own, OfNormal):
                del _KL_REGISTRY[kind, kind]
        torch.distributions.kl._KL_MEMOIZE.clear()
        assert kl(OfNormal(T(1.0), 1.0), OfNormal(T(0.0), 1.0)) == 0.5


class TestWords:
    """What is said of a row that is NaN speaks of parameters, not of logits."""

    P = D.Normal(T([0.0, math.nan]), T([1.0, 1.0]), validate_args=False)
    Q = D.Normal(T([0.0, 0.0]), T([1.0, 1.0]))
    TEXT = re.escape(
        "1 of 2 rows were no distributions and make the result NaN. nan_strategy='error' names the first. Look for NaN,"
        " and for values out of range, in their parameters."
    )

    @pytest.mark.parametrize("kind", ["normal", "categorical"])
    def test_warning(self, kind):
        p, q = self.P, self.Q
        if kind == "categorical":
            p, q = (D.Categorical(logits=T([[0.0, 1.0], [x, 0.0]]), validate_args=False) for x in (math.nan, 0.0))
        with pytest.warns(UserWarning, match=f"^{self.TEXT}$"):
            kl_divergence(p, q)
        for metric in (KLDivergence(), KLDivergenceSummary()):
            metric.update(p, q)
            with pytest.warns(UserWarning, match=f"^{self.TEXT}$"):
                metric.compute()
        with pytest.warns(UserWarning, match=f"^{self.TEXT}$"):
            KLDivergence()(p, q)

    def test_tensors_are_still_told_of_logits(self):
        metric = KLDivergence()
        metric.update(self.P, self.Q)
        metric.update(T([[-1.0, 2.0]]), T([[0.5, 0.5]]))
        with pytest.warns(UserWarning, match="Were they logits or log-probabilities"):
            metric.compute()

    def test_error(self):
        text = re.escape(
            "Every row must be a distribution (nan_strategy='error'). 1 of 2 rows are not; the first is row 1: its"
            " divergence is NaN; look for NaN, and for values out of range, in the parameters. Mask it with `weight`"
        )
        for call in (
            lambda: kl_divergence(self.P, self.Q, nan_strategy="error"),
            lambda: KLDivergence(nan_strategy="error").update(self.P, self.Q),
        ):
            with pytest.raises(ValueError, match=text):
                call()


def test_nothing_is_said_of_good_ones():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kl(D.Wishart(T(5.0), torch.eye(3)), D.Wishart(T(6.0), torch.eye(3)))
        kl(D.Dirichlet(T([0.1, 1e6])), D.Dirichlet(T([1e6, 0.1])))


def test_the_reference_can_fail():
    p, q = made(D.Gamma, (2.5, 1.5)), made(D.Gamma, (2.5, 1.5000001))
    assert reference.textbook(p, q) > 0
    assert mpmath.almosteq(reference.textbook(p, q), 2.5 * mpmath.mpf(1e-7 / 1.5) ** 2 / 2, rel_eps=1e-6)
