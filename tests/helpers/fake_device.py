"""A device that is none: tensors that say they are on an accelerator and are computed on the CPU, call by call."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# What a real accelerator must be waited for: the data decide a number or a shape that Python has to know.
WAITING = {
    "_local_scalar_dense", "equal", "is_nonzero", "item", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "repeat_interleave", "bincount", "_linalg_check_errors",
}  # fmt: skip


class OnDevice(Tensor):
    """A tensor there."""

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> "OnDevice":
        x = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=device,
        )  # fmt: skip
        x.held = held
        return x

    __torch_dispatch__ = classmethod(lambda cls, func, types, args=(), kwargs=None: NotImplemented)


class Device(TorchDispatchMode):
    """While it is on, there is such a device.

    Args:
        name: its type: "mps", which has no float64, or another one.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.device = torch.device(name)
        self.waits: Counter[str] = Counter()

    def put(self, x: Tensor) -> Tensor:
        """The tensor there."""
        if x.dtype == torch.float64 and self.device.type == "mps":
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        return OnDevice(x, self.device)

    def __enter__(self) -> "Device":
        self.moves = _Moves(self)
        self.moves.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.moves.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        is_there = any(isinstance(x, OnDevice) for x in tensors)
        name = func.overloadpacket.__name__
        leaves = name == "_to_copy" and kwargs.get("device") == torch.device("cpu")
        leaves |= name == "copy_" and not isinstance(args[0], OnDevice)
        by_mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if is_there and (name in WAITING or by_mask or leaves):
            self.waits[name] += 1
        is_move = name in ("_to_copy", "copy_")
        if is_there and not is_move and any(x.ndim for x in tensors if not isinstance(x, OnDevice)):
            raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices")
        asked = kwargs.get("device")
        if asked is not None and asked.type == self.device.type:  # of `new_zeros` and the like
            kwargs["device"], is_there = torch.device("cpu"), True
        out = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if name.endswith("_") and not name.endswith("__"):
            return args[0]
        return tree_map(lambda x: self.put(x) if isinstance(x, Tensor) else x, out) if is_there and not leaves else out


class _Moves(TorchFunctionMode):
    """What is asked for on the device is made on the CPU and put there."""

    def __init__(self, on: Device) -> None:
        super().__init__()
        self.on = on

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.tolist and isinstance(args[0], OnDevice):
            self.on.waits["tolist"] += 1
            return args[0].held.tolist()
        if func is Tensor.__getitem__ and isinstance(args[0], OnDevice):
            index = tree_map(_held, args[1])
            if any(isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(index)):
                self.on.waits["index"] += 1
            return self.on.put(args[0].held[index])
        if func is Tensor.copy_ and isinstance(args[0], OnDevice):
            if not isinstance(args[1], OnDevice):
                self.on.waits["copy_"] += 1
            args[0].held.copy_(_held(args[1]))
            return args[0]
        if func in (Tensor.new_tensor, Tensor.__invert__, Tensor.contiguous) and isinstance(args[0], OnDevice):
            return self.on.put(
                func(args[0].held, *args[1:], **kwargs)
            )  # these ask for the device before they are called
        if func is Tensor.to and isinstance(args[1], OnDevice):
            args = (args[0], self.on.device, args[1].dtype)
        names_it = any(self._is_there(x) for x in (*args, *kwargs.values()))
        if not names_it or func in (torch.device, torch._C._nn._parse_to):
            return func(*args, **kwargs)
        if isinstance(args[0], OnDevice):  # it is there already
            args = [x for x in args if not self._is_there(x)]
            kwargs = {key: x for key, x in kwargs.items() if not self._is_there(x)}
            return func(*args, **kwargs) if len(args) + len(kwargs) > 1 else args[0]
        cpu = torch.device("cpu")
        args = [cpu if self._is_there(x) else x for x in args]
        out = func(*args, **{key: cpu if self._is_there(x) else x for key, x in kwargs.items()})
        return self.on.put(out) if isinstance(out, Tensor) else out

    def _is_there(self, x: Any) -> bool:
        return (isinstance(x, str) and x == self.on.device.type) or (
            isinstance(x, torch.device) and x.type == self.on.device.type
        )


def _held(x: Any) -> Any:
    return x.held if isinstance(x, OnDevice) else x
