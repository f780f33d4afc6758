"""Access to the weights of bases whose forward may differ from ``nn.Linear``'s.

A module's library is recognized by the names of its types, so that no optional library is imported
needlessly.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from neuroada_kernels._dtypes import FLOATING
from neuroada_kernels._sharding import is_sharded, whole
from neuroada_kernels.nn._bitsandbytes import bitsandbytes_weight
from neuroada_kernels.nn._offloaded import OffloadedWeight, is_dispatched, offloading_hook
from neuroada_kernels.nn._torchao import TorchaoWeight
from neuroada_kernels.nn._weight import BaseWeight, entries_of, is_of

#: The hooks that nn.Module runs around a forward.
_CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: Libraries with supported bases, and the pip extra that installs each.
EXTRAS = {
    "bitsandbytes": "quantized",
    "torchao": "quantized",
    "transformers": "peft",
    "peft": "peft",
}
#: The kind of GPT-2's layer in adapter files.
CONV1D = "transformers Conv1D"
#: The kind of a module of no known library, with a weight ``[d_out, d_in]``.
MODULE = "module"


class _PlainWeight(BaseWeight):
    """A plain matrix, ``[d_out, d_in]``, possibly a transposed view."""

    def __init__(self, module: nn.Module, kind: str | None, matrix: Tensor) -> None:
        d_out, d_in = matrix.shape
        super().__init__(module, kind, (d_out, d_in), matrix.dtype, matrix.device)
        self.matrix: Tensor = matrix

    def rows(self, rows: slice) -> Tensor:
        return self.matrix[rows].detach()

    def entries(self, index: Tensor) -> Tensor:
        return entries_of(self.matrix.detach(), index)


class _ShardedWeight(BaseWeight):
    """A weight sharded by FSDP2: all-gathered for reading, by all ranks together; not written."""

    def __init__(self, module: nn.Module, kind: str | None, matrix: Tensor) -> None:
        d_out, d_in = matrix.shape
        super().__init__(module, kind, (d_out, d_in), matrix.dtype, matrix.device)
        self._parts = matrix

    def rows(self, rows: slice) -> Tensor:
        return whole(self._parts.detach())[rows]

    def entries(self, index: Tensor) -> Tensor:
        return entries_of(whole(self._parts.detach()), index)


class _Weightless(BaseWeight):
    """A module without a readable weight, of which only the shape is known."""

    def __init__(self, module: nn.Module, shape: tuple[int, int]) -> None:
        tensor = next((t for t in (*module.parameters(), *module.buffers())), torch.empty(0))
        super().__init__(module, "module without a weight", shape, torch.float32, tensor.device)

    def rows(self, rows: slice) -> Tensor:
        raise ValueError(
            f"base: {type(self.module).__name__} has no plain weight [out_features, in_features] "
            "to read; selection 'random', 'scores' or 'gradient' does without"
        )

    def entries(self, index: Tensor) -> Tensor:
        return torch.zeros(index.shape, dtype=self.dtype, device=self.device)


def base_weight(module: nn.Module) -> BaseWeight:
    """The weight in ``module``, read and written in the format of its library.

    Raises
    ------
    TypeError
        If it is of no known library and has no ``in_features`` and ``out_features``.
    ValueError
        If its weight has no values yet, or is quantised again in every forward.
    """
    make = _library(module)
    if make is not None:
        return make(module)
    d_in, d_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not (isinstance(module, nn.Module) and isinstance(d_in, int) and isinstance(d_out, int)):
        raise TypeError(f"base: {type(module).__name__}, expected in_features and out_features")
    weight = module._parameters.get("weight")
    if weight is None or tuple(weight.shape) != (d_out, d_in) or not _is_numbers(weight):
        return _Weightless(module, (d_out, d_in))
    return _of_numbers(module, MODULE, weight)


def is_library(module: nn.Module) -> bool:
    """Whether it is a linear of a known library with a forward of its own."""
    return _library(module) is not None


def is_base(module: nn.Module) -> bool:
    """Whether it can be wrapped with a bypass."""
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return is_library(module) or all(isinstance(size, int) for size in sizes)


def has_own_forward(module: nn.Module) -> bool:
    """Whether its forward or call is not ``nn.Linear``'s, so that it may compute something else."""
    kind = type(module)
    own = kind.forward is not nn.Linear.forward or kind.__call__ is not nn.Linear.__call__
    # accelerate leaves the class's own forward there when it removes its hook.
    bound = vars(module).get("forward")
    return own or (bound is not None and getattr(bound, "__func__", None) is not kind.forward)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling it runs more than its forward."""
    return any(getattr(module, hooks) for hooks in _CALL_HOOKS)


def missing_library(kind: str) -> str | None:
    """If the library of a base of that kind is not installed, how to install it; else None."""
    library = kind.partition(" ")[0]
    if library not in EXTRAS or find_spec(library) is not None:
        return None
    return f"{library} is not installed: install the extra '{EXTRAS[library]}'"


def _library(module: nn.Module) -> Callable[[nn.Module], BaseWeight] | None:
    """The reader for the weight of a module of a known library, or None."""
    if is_of(module, "bitsandbytes", "Linear4bit") or is_of(module, "bitsandbytes", "Linear8bitLt"):
        return bitsandbytes_weight
    if is_of(module, "transformers", "Conv1D"):
        return _conv1d
    if isinstance(module, nn.Linear) and is_of(module._parameters.get("weight"), "torchao"):
        return TorchaoWeight
    if is_dispatched(module):
        return _dispatched
    return None


def _dispatched(module: nn.Module) -> BaseWeight:
    if offloading_hook(module) is not None:
        return OffloadedWeight(module)
    return _of_numbers(module, None, module.get_parameter("weight"))


def _conv1d(module: nn.Module) -> BaseWeight:
    """GPT-2's layer, which stores W transposed."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2 or not _is_numbers(weight):
        raise ValueError("base: Conv1D without a plain weight [d_in, d_out]")
    with torch.no_grad():
        return _of_numbers(module, CONV1D, weight.t())


def _of_numbers(module: nn.Module, kind: str | None, matrix: Tensor) -> BaseWeight:
    return (_ShardedWeight if is_sharded(matrix) else _PlainWeight)(module, kind, matrix)


def _is_numbers(weight: Tensor) -> bool:
    """Whether it is a plain or sharded tensor of a floating dtype."""
    plain = type(weight) in (Tensor, nn.Parameter) or is_sharded(weight)
    return plain and weight.dtype in FLOATING
