"""What `p`, `q`, `weight` and `targets` stand for in a batch."""

from collections.abc import Mapping
from typing import Any

from klmetric.lightning.framework import STEPS, Source, Stage


def take(key: str, source: Source, outputs: Any, batch: Any, stage: Stage) -> Any:
    """What `p`, `q`, `weight` or `targets` stands for in this batch; None for a key where the step returned nothing."""
    if not isinstance(source, str):
        return source(outputs, batch)
    if outputs is None:
        return None
    step = STEPS[stage]
    if not isinstance(outputs, Mapping):
        raise TypeError(
            f"`{key}={source!r}` is a key into the dict that `{step}` returns. Got {type(outputs).__name__}."
            f" Return a dict with {source!r} from the step, or give `{key}` as a callable (outputs, batch)."
        )
    if source not in outputs:
        raise ValueError(
            f"`{key}={source!r}` must be a key of what `{step}` returns. Got the keys {list(outputs)}."
            f" Return {source!r} from the step as well, or name another key."
        )
    return outputs[source]
