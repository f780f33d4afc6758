"""``neuroada::bypass_add``: the bypass added to a given y, for a base layer that is not ours.

out[t, j]    = y[t, j] + sum_s delta[j, s] x[t, index[j, s]]
dx[t, c]     = sum over (j, s) with index[j, s] = c of delta[j, s] dout[t, j]
ddelta[j, s] = sum_t dout[t, j] x[t, index[j, s]]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neuroada_kernels import _registry
from neuroada_kernels.ops._library import (
    LIBRARY,
    as_matrix,
    define,
    is_plain_eager,
    refuse_double_backward,
    unflattened,
)


def bypass_add(y: Tensor, x: Tensor, index: Tensor, delta: Tensor, plan: Tensor | None) -> Tensor:
    """Call the op, without the dispatcher where nobody would see the difference.

    Shapes: ``y [..., d_out]``, ``x [..., d_in]``, ``index`` and ``delta`` ``[d_out, k]``.
    """
    if is_plain_eager(x) and is_plain_eager(y):
        if not torch.is_grad_enabled():
            return _forward(y, x, index, delta, plan)
        return _BypassAdd.apply(y, x, index, delta, plan)  # type: ignore[no-any-return,no-untyped-call]
    return torch.ops.neuroada.bypass_add.default(y, x, index, delta, plan)  # type: ignore[no-any-return]


def _forward(y: Tensor, x: Tensor, index: Tensor, delta: Tensor, plan: Tensor | None) -> Tensor:
    base, matrix = as_matrix(y), as_matrix(x)
    run = _registry.resolve("bypass_add", matrix, base, index, delta)
    out: Tensor = run(matrix, base, index, delta)
    return unflattened(out, *y.shape)


def _backward(
    grad_output: Tensor,
    x: Tensor,
    index: Tensor,
    delta: Tensor,
    plan: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    grad, matrix = as_matrix(grad_output), as_matrix(x)
    run = _registry.resolve("bypass_backward", grad, matrix, index, delta, plan, output_mask)
    grad_x, grad_delta = run(grad, matrix, index, delta, plan, output_mask)
    return (
        grad.new_empty(0) if grad_x is None else grad_x.view(x.shape),
        delta.new_empty(0) if grad_delta is None else grad_delta,
    )


def _fake_forward(
    y: Tensor, x: Tensor, index: Tensor, delta: Tensor, plan: Tensor | None
) -> Tensor:
    return y.new_empty(y.shape)


def _fake_backward(
    grad_output: Tensor,
    x: Tensor,
    index: Tensor,
    delta: Tensor,
    plan: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    return (
        grad_output.new_empty(x.shape if output_mask[0] else [0]),
        delta.new_empty(delta.shape if output_mask[1] else [0]),
    )


define(
    "bypass_add(Tensor y, Tensor x, Tensor index, Tensor delta, Tensor? plan) -> Tensor",
    _forward,
    _fake_forward,
)
define(
    "bypass_backward(Tensor grad_output, Tensor x, Tensor index, Tensor delta, Tensor? plan, "
    "bool[2] output_mask) -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor | None) -> None:
    ctx.save_for_backward(*inputs[1:])


def _differentiate(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    x, index, delta, plan = ctx.saved_tensors
    need_y, need_x, _, need_delta, _ = ctx.needs_input_grad
    grad_x = grad_delta = None
    if need_x or need_delta:
        args = (grad_output, x, index, delta, plan, [need_x, need_delta])
        if is_plain_eager(grad_output) and not torch.is_grad_enabled():
            grad_x, grad_delta = _backward(*args)
        else:
            grad_x, grad_delta = torch.ops.neuroada.bypass_backward.default(*args)
    return (
        grad_output if need_y else None,
        grad_x if need_x else None,
        None,
        grad_delta if need_delta else None,
        None,
    )


class _BypassAdd(torch.autograd.Function):
    """The same autograd as the op's, a third of its cost."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save(ctx, inputs, None)
        return _forward(*inputs)

    backward = staticmethod(_differentiate)


torch.library.register_autograd(
    "neuroada::bypass_add", _differentiate, setup_context=_save, lib=LIBRARY
)
torch.library.register_autograd("neuroada::bypass_backward", refuse_double_backward, lib=LIBRARY)
