"""What people use for the KL divergence of logits or of probabilities, as each library's documentation has it.

Each function makes two tensors and returns the call that is timed. With `shape` (rows, classes), `dtype` the name of a
torch dtype, and `kind` how far the two are apart: "near" (q is p with noise, as a quantised model is), or "far"
(unrelated), of logits; "near probs" and "far probs", of probabilities.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor

Shape = tuple[int, int]
Call = Callable[[], object]
NOISE = 0.02


def inputs(shape: Shape, dtype: str, kind: str) -> tuple[Tensor, Tensor]:
    """Two tensors of logits, or of probabilities."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(shape, generator=generator) for _ in range(2))
    if kind.startswith("near"):
        q.mul_(NOISE).add_(p)
    if is_of_probs(kind):
        p, q = p.softmax(-1), q.softmax(-1)
    torch.set_grad_enabled(False)
    return p.to(getattr(torch, dtype)), q.to(getattr(torch, dtype))


def is_of_probs(kind: str) -> bool:
    """Whether the tensors hold probabilities."""
    return kind.endswith("probs")


def probs(x: Tensor, kind: str) -> Tensor:
    """Probabilities, for what takes those."""
    return x if is_of_probs(kind) else x.softmax(-1)


def logs(x: Tensor, kind: str) -> Tensor:
    """Log-probabilities, for what takes those."""
    return x.log() if is_of_probs(kind) else x.log_softmax(-1)


def klmetric(shape: Shape, dtype: str, kind: str) -> Call:
    """`klmetric.KLDivergence`."""
    from klmetric import KLDivergence

    p, q = inputs(shape, dtype, kind)
    metric = KLDivergence(input_format="probs" if is_of_probs(kind) else "logits")

    def call() -> Tensor:
        metric.reset()
        metric.update(p, q)
        return metric.compute()

    return call


def klmetric_plain(shape: Shape, dtype: str, kind: str) -> Call:
    """`klmetric.KLDivergence` without the kernel, as where none could be built."""
    os.environ["KLMETRIC_KERNEL"] = "plain"  # in a process of its own
    return klmetric(shape, dtype, kind)


def klmetric_compiled(shape: Shape, dtype: str, kind: str) -> Call:
    """`klmetric.kl_divergence` under `torch.compile`."""
    from klmetric import kl_divergence

    p, q = inputs(shape, dtype, kind)
    torch._dynamo.reset()  # of the shapes before, of which it remembers eight
    compiled = torch.compile(kl_divergence, fullgraph=True, dynamic=False)
    input_format = "probs" if is_of_probs(kind) else "logits"
    return lambda: compiled(p, q, input_format=input_format)


def torchmetrics_log(shape: Shape, dtype: str, kind: str) -> Call:
    """Log-softmax, then `torchmetrics.KLDivergence(log_prob=True)`."""
    from torchmetrics.regression import KLDivergence

    p, q = inputs(shape, dtype, kind)
    metric = KLDivergence(log_prob=True)

    def call() -> Tensor:
        metric.reset()
        metric.update(logs(p, kind), logs(q, kind))
        return metric.compute()

    return call


def torchmetrics_probs(shape: Shape, dtype: str, kind: str) -> Call:
    """Softmax, then `torchmetrics.KLDivergence()`."""
    from torchmetrics.regression import KLDivergence

    p, q = inputs(shape, dtype, kind)
    metric = KLDivergence()

    def call() -> Tensor:
        metric.reset()
        metric.update(probs(p, kind), probs(q, kind))
        return metric.compute()

    return call


def torch_kl_div(shape: Shape, dtype: str, kind: str) -> Call:
    """Log-softmax, then `F.kl_div`."""
    p, q = inputs(shape, dtype, kind)
    return lambda: torch.nn.functional.kl_div(logs(q, kind), logs(p, kind), log_target=True, reduction="batchmean")


def ignite(shape: Shape, dtype: str, kind: str) -> Call:
    """`ignite.metrics.KLDivergence`, which takes logits."""
    from ignite.metrics import KLDivergence

    p, q = inputs(shape, dtype, kind)
    metric = KLDivergence()
    as_logits = logs if is_of_probs(kind) else lambda x, kind: x

    def call() -> float:
        metric.reset()
        metric.update((as_logits(q, kind), as_logits(p, kind)))
        return metric.compute()

    return call


def keras(shape: Shape, dtype: str, kind: str) -> Call:
    """Softmax, then `keras.metrics.KLDivergence` on the torch backend."""
    os.environ["KERAS_BACKEND"] = "torch"
    from keras.metrics import KLDivergence

    p, q = inputs(shape, dtype, kind)
    metric = KLDivergence(dtype=dtype)

    def call() -> object:
        metric.reset_state()
        metric.update_state(probs(p, kind), probs(q, kind))
        return metric.result()

    return call


def scipy(shape: Shape, dtype: str, kind: str) -> Call:
    """Softmax, then `scipy.special.rel_entr`."""
    from scipy.special import rel_entr

    p, q = inputs(shape, dtype, kind)
    return lambda: rel_entr(probs(p, kind).float().numpy(), probs(q, kind).float().numpy()).sum(-1).mean()


def floor(shape: Shape, dtype: str, kind: str) -> Call:
    """Both inputs read once: no method can be faster."""
    p, q = inputs(shape, dtype, kind)
    return lambda: p.sum() + q.sum()


PEERS = {
    "torchmetrics, log": torchmetrics_log,
    "torchmetrics, probs": torchmetrics_probs,
    "F.kl_div": torch_kl_div,
    "ignite": ignite,
    "keras": keras,
    "scipy": scipy,
}
OURS = {"klmetric": klmetric, "klmetric, no kernel": klmetric_plain}
EVERYONE = {**OURS, "klmetric, compiled": klmetric_compiled, **PEERS, "read only": floor}
SHAPES: tuple[Shape, ...] = ((100_000, 2), (100_000, 10), (20_000, 100), (8192, 1000), (512, 32_000), (128, 128_256))
