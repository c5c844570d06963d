"""The KL divergence in Lightning, in one line."""

from klmetric.lightning.callback import KLDivergenceCallback

__all__ = ["KLDivergenceCallback"]
