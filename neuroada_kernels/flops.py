"""FLOP formulas of the ops for ``torch.utils.flop_counter.FlopCounterMode``.

Importing this module registers them. Two operations per multiply-add, as torch counts: the GEMM,
and ``k`` connections per neuron. A slot without a connection counts as a connection. The formulas
are in a separate module since importing torch's counter takes a third of a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import neuroada_kernels.ops  # noqa: F401 - defines the ops

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


for _formula in (_linear, _linear_backward, _bypass_add, _bypass_backward):
    _op = getattr(torch.ops.neuroada, _formula.__name__.removeprefix("_"))
    register_flop_formula(_op)(_formula)
