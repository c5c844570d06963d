"""What torch does with the code at the moment: whether it runs it on the data, or takes it apart."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def may_look(*xs: Tensor) -> bool:
    """Whether the code may depend on the data: not where it is compiled, nor under `torch.vmap`, nor without any."""
    return not (
        torch.compiler.is_compiling()
        or any(x.is_meta for x in xs)
        or any(transform.key() == torch._C._functorch.TransformType.Vmap for transform in transforms())
    )


def transforms() -> list[Any]:
    """The transforms of `torch.func` that are at work, such as `vmap` and `grad`."""
    return _interpreters() or []


def is_recorded() -> bool:
    """Whether it is the operations that count, and not this one result."""
    return bool(torch.compiler.is_compiling() or _interpreters() or torch._C._is_tracing() or _modes())


_interpreters, _modes = torch._C._functorch.get_interpreter_stack, torch._C._len_torch_dispatch_stack


def has_gradient(*xs: Tensor) -> bool:
    """Whether derivatives may be wanted of what is made of these tensors."""
    # Forward mode marks no tensor, but has a level while it is on.
    if torch.is_grad_enabled():
        for x in xs:  # `any` takes twice as long
            if x.requires_grad:
                return True
    return forward_ad._current_level >= 0


def is_batched(x: Tensor) -> bool:
    """Whether it stands for a batch of tensors, as `is_grads_batched` makes them, and `torch.func`."""
    functorch = torch._C._functorch
    return bool(functorch.is_legacy_batchedtensor(x) or functorch.is_batchedtensor(x))
