"""What ``torch.utils.flop_counter`` counts of the ops: two operations for each multiply-add.

The dense product as torch counts its own, and beside it ``k`` connections a neuron. A slot without
a connection counts as one.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from math import prod
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"
_Shape = Sequence[int]


def _linear(x: _Shape, weight: _Shape, index: _Shape, *_: Any, **options: Any) -> int:
    return 2 * prod(x[:-1]) * (prod(weight) + prod(index))


def _linear_backward(
    grad_output: _Shape,
    x: _Shape | None,
    weight: _Shape,
    index: _Shape,
    delta: _Shape,
    plan: _Shape | None,
    output_mask: Sequence[bool],
    *_: Any,
    **options: Any,
) -> int:
    need_x, need_delta = output_mask
    connections = prod(index)
    products = need_x * (prod(weight) + connections) + need_delta * connections
    return 2 * prod(grad_output[:-1]) * products


def _bypass_add(y: _Shape, x: _Shape, index: _Shape, *_: Any, **options: Any) -> int:
    return 2 * prod(x[:-1]) * prod(index)


def _bypass_backward(
    grad_output: _Shape,
    x: _Shape | None,
    index: _Shape,
    delta: _Shape,
    plan: _Shape | None,
    output_mask: Sequence[bool],
    *_: Any,
    **options: Any,
) -> int:
    return 2 * prod(grad_output[:-1]) * prod(index) * sum(output_mask)


def _register(counter: ModuleType) -> None:
    for formula in (_linear, _linear_backward, _bypass_add, _bypass_backward):
        op = getattr(torch.ops.neuroada, formula.__name__.removeprefix("_"))
        counter.register_flop_formula(op)(formula)


class _AfterImport(MetaPathFinder):
    """Registers once somebody imports the counter, which itself imports Triton where that is."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            run = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _register(module)

            loader.exec_module = exec_module
        return spec


def register_flop_formulas() -> None:
    """Have the ops counted from now on, or from when torch's counter is imported."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _AfterImport())
