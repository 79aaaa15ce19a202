"""What an operator of PyTorch costs a GPU: bytes and floating-point operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

WITHOUT_KERNEL = (
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("_unsafe_view", "detach", "lift_fresh", "set_", "resize_"),
)
# Positions of the arguments that an operator changes, where its schema does not mark them
CHANGED = {"native_batch_norm": (3, 4), "_fused_sgd_": (0, 2)}

READ = 0.5  # neither 0 nor 1: optimizers divide by values, and by one less them


class Operator(NamedTuple):
    """One call of an operator that launches kernels."""

    flop: float  # in convolutions and matrix products
    bytes: float  # each tensor read and written once


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record in `called` the operators called within, on fake tensors.

    `_fused_sgd_`, which has no fake kernel, is not run. A value that the host reads is `READ`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.called: list[Operator] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        match name_of(func):
            case "_fused_sgd_":
                out = None
            case "_local_scalar_dense":
                out = READ
            case _:
                out = func(*args, **kwargs)
        if launches_kernel(func):
            count = flop_registry.get(func._overloadpacket)
            flop = count(*args, **kwargs, out_val=out) if count else 0
            self.called.append(Operator(flop, bytes_moved(func, args, kwargs, out)))
        return out


def name_of(func: Any) -> str:
    """The name of an operator of ATen, for instance add."""
    name: str = func._schema.name
    return name.removeprefix("aten::")


def tensors_in(values: Any) -> list[Tensor]:
    """All tensors in nested arguments."""
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def launches_kernel(func: Any) -> bool:
    """Whether a call launches a kernel: views, allocations and queries do not."""
    returns = func._schema.returns
    is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return func.namespace == "aten" and not is_view and name_of(func) not in WITHOUT_KERNEL


def changed_by(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among its arguments that an operator changes."""
    arguments = func._schema.arguments
    written = [place for place, argument in enumerate(arguments) if argument.is_write]
    places = CHANGED.get(name_of(func), written)
    return tensors_in([args[i] if i < len(args) else kwargs.get(arguments[i].name) for i in places])


def bytes_moved(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> float:
    """The bytes of all tensors that an operator reads, and of those that it writes."""
    given = {id(tensor): tensor for tensor in tensors_in((args, kwargs))}
    made = [tensor for tensor in tensors_in(out) if id(tensor) not in given]
    moved = [*given.values(), *changed_by(func, args, kwargs), *made]
    return sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in moved)
