"""The KL divergence as a metric you can trust."""

from klmetric._version import __version__
from klmetric.functional import kl_divergence
from klmetric.metric import KLDivergence

__all__ = ["KLDivergence", "__version__", "kl_divergence"]
