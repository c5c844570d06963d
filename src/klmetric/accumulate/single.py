"""Single values of a summary as metrics, and what wants one number refuses a whole summary when it is made.

`MinMaxMetric`, `BootStrapper` and arithmetic of metrics fail on a dict at the first `compute`, after the epoch, and
`ClasswiseWrapper` goes through its keys. None of them asks its metric anything before, but all of them register it as a
submodule, of which torch tells.
"""

from typing import Any

import torch
from torch.nn import Module, ModuleList
from torch.nn.modules.module import register_module_module_registration_hook
from torchmetrics import Metric
from torchmetrics.metric import CompositionalMetric
from torchmetrics.wrappers import BootStrapper, ClasswiseWrapper, MinMaxMetric, MultioutputWrapper, Running

_OF_ONE_NUMBER = (BootStrapper, ClasswiseWrapper, CompositionalMetric, MinMaxMetric, MultioutputWrapper)


class Take:
    """Takes one value out of a dict; unlike a lambda it can be pickled."""

    def __init__(self, name: str) -> None:
        self.name = self.__name__ = name

    def __call__(self, values: dict[str, Any]) -> Any:
        """The value."""
        return values[self.name]


def refuse(kind: type[Metric], instead: str) -> None:
    """Let what wants one number refuse metrics of this kind, whose `compute` gives a dict; `instead` names a value."""

    def gives_dict(child: Module | None) -> bool:
        if isinstance(child, (ModuleList, Running)):
            return any(map(gives_dict, child.children()))
        return isinstance(child, kind) and type(child).compute is kind.compute

    def check(parent: Module, _: str, child: Module | None) -> None:
        if not isinstance(parent, _OF_ONE_NUMBER) or not gives_dict(child):
            return
        if isinstance(parent, CompositionalMetric):
            # Also what compares metrics, as `in` does with a list of them.
            if isinstance(parent.op, Take) or parent.op in (torch.eq, torch.ne):
                return
            what = "Arithmetic"
        else:
            what = type(parent).__name__
        raise TypeError(
            f"{what} must have a metric that computes one number. Got {kind.__name__}, which computes a dict. Take one"
            f" of its values before: {instead}."
        )

    register_module_module_registration_hook(check)
