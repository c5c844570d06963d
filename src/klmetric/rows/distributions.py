# mypy: disable-error-code="no-any-return, no-untyped-call"
# (Neither the parameters of the distributions of torch nor its helpers have types.)
"""What two distributions of torch are, as rows: the divergence of each element of their batch, computed in float64."""

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    ExponentialFamily,
    Independent,
    Kumaraswamy,
    LowRankMultivariateNormal,
    MultivariateNormal,
    OneHotCategorical,
    TransformedDistribution,
    Weibull,
    Wishart,
    constraints,
)
from torch.distributions import kl as torchs
from torch.distributions.lowrank_multivariate_normal import _batch_capacitance_tril
from torch.distributions.multivariate_normal import _precision_to_scale_tril
from torch.distributions.utils import lazy_property

from klmetric.arithmetic.device import device_of_float64
from klmetric.options import Format, Options
from klmetric.rows.tensors import first_classes

Form: TypeAlias = Callable[[Any, Any], Tensor]

# Of classes: measured like tensors, from what they were made of.
CATEGORICAL = (Categorical, OneHotCategorical)


def kl_of_distributions(
    p: Distribution, q: Distribution, options: Options, forms: Mapping[Form | type, Form]
) -> Tensor:
    """Divergence of each element of the batch in nats, in the direction of `options`.

    Args:
        p: reference.
        q: approximation; the two batch shapes broadcast.
        options: see `klmetric.kl_divergence`.
        forms: closed forms to take, by those of torch that they take the place of.

    Returns:
        shape of the batch, in the dtype that the parameters promote to, at least float32; never negative, and NaN where
        the parameters are no distribution's.

    Raises:
        TypeError: for a pair of which torch knows no divergence.
        ValueError: for options and a direction of categorical distributions.
    """
    usual = Options()
    for name in ("temperature", "eps", "classes"):
        if getattr(options, name) != getattr(usual, name):
            raise ValueError(
                f"`{name}` is for categorical distributions. Got {name}={getattr(options, name)} with"
                f" {type(p).__name__} and {type(q).__name__}."
            )
    if options.direction == "jensen_shannon":
        raise ValueError(
            "direction='jensen_shannon' is for categorical distributions: of others, it has no closed form. Got"
            f" {type(p).__name__} and {type(q).__name__}. 'jeffreys' is symmetric as well."
        )
    tensors = [*_tensors(p), *_tensors(q)]
    exact_p, exact_q = in_float64(p), in_float64(q)
    both = {"forward": [(exact_p, exact_q)], "reverse": [(exact_q, exact_p)]}
    pairs = both.get(options.direction) or both["forward"] + both["reverse"]
    try:
        kl = torch.stack([_kl(a, b, forms) for a, b in pairs])
    except NotImplementedError as error:
        raise TypeError(
            "The pair of distributions must have a KL divergence registered in torch.distributions."
            f" Got {type(p).__name__} and {type(q).__name__}. Must both be wrapped in Independent? Otherwise"
            " register one with torch.distributions.kl.register_kl, or estimate it from samples."
        ) from error
    dtype = torch.float32
    for x in tensors if exact_p is not p and exact_q is not q else [kl]:
        dtype = torch.promote_types(dtype, x.dtype)
    # What is not our own subtracts, and can round to just below 0.
    return kl.clamp_min(0).sum(0).to(tensors[0].device if tensors else kl.device, dtype)


def _kl(p: Distribution, q: Distribution, forms: Mapping[Form | type, Form]) -> Tensor:
    shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    # Some forms of torch answer in the shape of p alone, or fail where that of q is the larger.
    p, q = (d if d.batch_shape == shape else d.expand(shape) for d in (p, q))
    form = torchs._dispatch_kl(type(p), type(q))
    if form is torchs._kl_independent_independent:
        assert isinstance(p, Independent)
        assert isinstance(q, Independent)
        n = p.reinterpreted_batch_ndims
        if n != q.reinterpreted_batch_ndims:
            raise NotImplementedError
        inner = _kl(p.base_dist, q.base_dist, forms)
        return inner.sum(tuple(range(-n, 0))) if n else inner
    if form is torchs._kl_transformed_transformed:
        assert isinstance(p, TransformedDistribution)
        assert isinstance(q, TransformedDistribution)
        if isinstance(p, Weibull) and isinstance(q, Weibull):
            return forms[Weibull](p, q)
        if p.transforms != q.transforms or p.event_shape != q.event_shape:
            raise NotImplementedError
        if isinstance(p, Kumaraswamy) and not all(torch.equal(getattr(p, x), getattr(q, x)) for x in p.arg_constraints):
            raise NotImplementedError  # its transforms are rounded
        return _kl(p.base_dist, q.base_dist, forms)
    if form is NotImplemented:
        raise NotImplementedError
    kl: Tensor = forms.get(form, form)(p, q)
    for d in (p, q):
        if not d._validate_args and _is_of_torch(d):  # then torch has not looked at them
            kl = torch.where(_is_valid(d), kl, math.nan)
    return kl


def _is_of_torch(d: Distribution) -> bool:
    """Whether it is of a family of torch, if only by descent."""
    return any(
        kind.__module__.startswith("torch.distributions.") and kind not in (Distribution, ExponentialFamily)
        for kind in type(d).__mro__
    )


def _is_valid(d: Distribution) -> Tensor:
    """Whether each element of the batch has parameters that a distribution can have."""
    valid = torch.ones((), dtype=torch.bool)
    for name, constraint in d.arg_constraints.items():
        is_lazy = isinstance(inspect.getattr_static(type(d), name, None), lazy_property)
        # The sum of probabilities that were rounded need not be 1: they are normalised again.
        if (
            constraints.is_dependent(constraint)
            or constraint is constraints.simplex
            or (is_lazy and name not in vars(d))
        ):
            continue
        checked = constraint.check(getattr(d, name))
        valid = valid.to(checked.device) & checked
    return valid


def _tensors(d: Distribution) -> Iterator[Tensor]:
    for x in vars(d).values():
        if isinstance(x, Distribution):
            yield from _tensors(x)
        elif isinstance(x, Tensor) and x.is_floating_point():
            yield x


def in_float64(d: Distribution) -> Distribution:
    """The same distribution with parameters of float64, from which gradients flow to its own.

    A family that torch does not know stays as it is. So do transforms, which must remain the same for p and q.
    """
    if not _is_of_torch(d):
        return d
    result = copy.copy(d)
    own = vars(result)
    for name, x in vars(d).items():
        if isinstance(x, Distribution):
            own[name] = in_float64(x)
        elif isinstance(x, Tensor) and x.is_floating_point():
            own[name] = x.to(device_of_float64(x.device), torch.float64)
    # What torch has computed meanwhile, in the old precision, from the parameter that was given: it comes after it.
    given, *computed = [x for x in own if isinstance(inspect.getattr_static(type(d), x, None), lazy_property)] or [""]
    for name in computed:
        del own[name]
    if isinstance(d, (MultivariateNormal, Wishart)):
        own["_unbroadcasted_scale_tril"] = _scale_tril(result, given)
    elif isinstance(d, LowRankMultivariateNormal):
        own["_capacitance_tril"] = _batch_capacitance_tril(
            own["_unbroadcasted_cov_factor"], own["_unbroadcasted_cov_diag"]
        )
    return result


def _scale_tril(d: Any, given: str) -> Tensor:
    """The Cholesky factor, from the matrix that the distribution was made of."""
    rounded: Tensor = d._unbroadcasted_scale_tril
    if given not in ("covariance_matrix", "precision_matrix"):
        return rounded
    matrix: Tensor = getattr(d, given)
    # One matrix for a batch of means is repeated there: take it once.
    matrix = matrix[(0,) * (matrix.ndim - rounded.ndim)]
    for axis, size in enumerate(rounded.shape[:-2]):
        matrix = matrix.narrow(axis, 0, size)
    return torch.linalg.cholesky(matrix) if given == "covariance_matrix" else _precision_to_scale_tril(matrix)


def tensors_of(p: Distribution, q: Distribution, options: Options) -> tuple[Tensor, Tensor, Options]:
    """The tensors that two categorical distributions were made from, and how to read them."""
    (p_param, p_format), (q_param, q_format) = _parameter(p), _parameter(q)
    options = replace(options, input_format=(p_format, q_format), dim=-1)
    p_param, q_param = first_classes("p", p_param, options), first_classes("q", q_param, options)
    if p_param.shape[-1] == q_param.shape[-1]:  # one prior for a batch of posteriors
        shape = torch.broadcast_shapes(p_param.shape, q_param.shape)
        p_param, q_param = p_param.expand(shape), q_param.expand(shape)
    return p_param, q_param, options


def _parameter(d: Distribution) -> tuple[Tensor, Format]:
    # `.logits` of a distribution made from probabilities are clamped, `.probs` of one made from logits rounded: only
    # `_param` is what it was made from.
    own = d._categorical if isinstance(d, OneHotCategorical) else d
    assert isinstance(own, Categorical)
    return own._param, "probs" if own._param is vars(own).get("probs") else "logits"
