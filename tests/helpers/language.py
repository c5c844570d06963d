"""The statistics of language models in plain float64 numpy, from log-probabilities and targets."""

from typing import NamedTuple

import numpy as np

QUANTILES = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)


class Value(NamedTuple):
    value: float
    stderr: float


def clustered(influence: np.ndarray, weight: np.ndarray) -> float:
    """The standard error of something that moves by so much for each row, of independent samples."""
    of_samples = (influence * weight).sum(-1)
    samples = (weight.sum(-1) > 0).sum()
    return float(np.sqrt((of_samples**2).sum() * samples / (samples - 1)) / weight.sum())


def normalised(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def of_mean(x: np.ndarray, weight: np.ndarray) -> Value:
    mean = (x * weight).sum() / weight.sum()
    return Value(mean, clustered(x - mean, weight))


def quantiles(x: np.ndarray, weight: np.ndarray) -> dict[str, float]:
    rows = x[weight > 0]
    names = (f"p{100 * q:g}".replace(".", "_") for q in QUANTILES)
    return {
        "min": rows.min(),
        "max": rows.max(),
        **dict(zip(names, np.quantile(rows, QUANTILES), strict=True)),
    }


def of_classes(p: np.ndarray, q: np.ndarray, weight: np.ndarray) -> dict[str, Value]:
    """From normalised log-probabilities, shape (samples, positions, classes)."""
    middle = np.log((np.exp(p) + np.exp(q)) / 2)
    js = ((np.exp(p) * (p - middle)).sum(-1) + (np.exp(q) * (q - middle)).sum(-1)) / 2
    order_p, order_q = (np.argsort(-x, -1, kind="stable") for x in (p, q))
    return {
        "reverse": of_mean((np.exp(q) * (q - p)).sum(-1), weight),
        "jensen_shannon": of_mean(js, weight),
        "total_variation": of_mean(np.abs(np.exp(p) - np.exp(q)).sum(-1) / 2, weight),
        **{
            f"agreement_{k}": of_mean((order_p[..., :k] == order_q[..., :k]).all(-1).astype(float), weight)
            for k in (1, 5, 10)
        },
    }


def of_targets(log_p: np.ndarray, log_q: np.ndarray, weight: np.ndarray) -> dict[str, dict[str, Value | float]]:
    """From the log-probabilities of the targets, shape (samples, positions)."""
    a, b = -log_p, -log_q
    mean_a, mean_b = of_mean(a, weight), of_mean(b, weight)
    ppl_a, ppl_b = np.exp(mean_a.value), np.exp(mean_b.value)
    ln_ratio, delta = of_mean(b - a, weight), np.exp(log_q) - np.exp(log_p)
    ratio, square = np.exp(ln_ratio.value), of_mean(delta**2, weight)

    def spread(x: np.ndarray) -> float:
        return np.sqrt(of_mean((x - of_mean(x, weight).value) ** 2, weight).value)

    z_a, z_b = (a - mean_a.value) / spread(a), (b - mean_b.value) / spread(b)
    rho = of_mean(z_a * z_b, weight).value
    return {
        "perplexity": {
            "reference": Value(ppl_a, ppl_a * mean_a.stderr),
            "model": Value(ppl_b, ppl_b * mean_b.stderr),
            "ln_ratio": ln_ratio,
            "ratio": Value(ratio, ratio * ln_ratio.stderr),
            "difference": Value(
                ppl_b - ppl_a, clustered(ppl_b * (b - mean_b.value) - ppl_a * (a - mean_a.value), weight)
            ),
            # The influence of a row on a correlation: Devlin, Gnanadesikan, Kettenring, Biometrika 62, 1975.
            "correlation": Value(rho, clustered(z_a * z_b - rho * (z_a**2 + z_b**2) / 2, weight)),
        },
        "delta_p": {
            "mean": of_mean(delta, weight),
            "rms": Value(np.sqrt(square.value), square.stderr / 2 / np.sqrt(square.value)),
            **quantiles(delta, weight),
        },
    }
