"""The KL divergence as a metric you can trust."""

from klmetric._version import __version__
from klmetric.functional import kl_divergence
from klmetric.metric import KLDivergence
from klmetric.summary import KLDivergenceSummary

__all__ = ["KLDivergence", "KLDivergenceSummary", "__version__", "kl_divergence"]
