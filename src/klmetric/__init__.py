"""The KL divergence as a metric you can trust."""

from klmetric._version import __version__

TYPE_CHECKING = False  # type checkers take it for True; that of typing costs an import

if TYPE_CHECKING:
    from klmetric.bounds import kl_divergence_bounds
    from klmetric.estimate import KLDivergenceEstimate
    from klmetric.functional import kl_divergence
    from klmetric.metric import KLDivergence
    from klmetric.rows.head import Head
    from klmetric.rows.topk import TopK
    from klmetric.summary import KLDivergenceSummary
else:
    # Imported when they are asked for: the command answers to its arguments without torch, which takes seconds. Hidden
    # from type checkers, which would take any name for one of these.
    _HOMES = {
        "Head": "rows.head",
        "KLDivergence": "metric",
        "KLDivergenceEstimate": "estimate",
        "KLDivergenceSummary": "summary",
        "TopK": "rows.topk",
        "kl_divergence": "functional",
        "kl_divergence_bounds": "bounds",
    }
    _MODULES = ("bounds", "distributed", "estimate", "functional", "metric", "summary")

    def __getattr__(name):
        from importlib import import_module

        if name in _MODULES:
            return import_module(f"{__name__}.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *_HOMES, *_MODULES})


__all__ = [
    "Head",
    "KLDivergence",
    "KLDivergenceEstimate",
    "KLDivergenceSummary",
    "TopK",
    "__version__",
    "kl_divergence",
    "kl_divergence_bounds",
]
