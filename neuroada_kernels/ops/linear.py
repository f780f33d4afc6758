"""``neuroada::linear``: GEMM and bypass in one op, and its backward.

y[t, j]      = sum_c x[t, c] W[j, c] + b[j] + sum_s delta[j, s] x[t, index[j, s]]
dx[t, c]     = sum_j dy[t, j] W[j, c]
               + sum over (j, s) with index[j, s] = c of delta[j, s] dy[t, j]
ddelta[j, s] = sum_t dy[t, j] x[t, index[j, s]]

Only ddelta needs x, and of x only the chosen columns. If they are given in addition to x, as
``kept``, they are saved for the backward instead of x, with an index into them.
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
    fake_backward,
    is_plain_eager,
    plain_apply,
    refuse_double_backward,
    reverse_mode_only,
    run_backward,
    saved_of,
    unflattened,
)


def linear(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    plan: Tensor | None,
    kept: Tensor | None = None,
    kept_index: Tensor | None = None,
    *,
    plain: bool | None = None,
) -> Tensor:
    """Call the op, bypassing the dispatcher in plain eager mode.

    Shapes: ``x [..., d_in]``, ``weight [d_out, d_in]``, ``index`` and ``delta`` ``[d_out, k]``,
    ``bias [d_out]``, ``plan`` of :func:`neuroada_kernels.plan.make_plan`; ``kept [..., columns]``
    of the dtype of ``x``, ``kept_index [d_out, k]``. A weight of another dtype than ``x`` is cast
    for the duration of the call, as under autocast. ``plain`` is ``is_plain_eager(x)``, if the
    caller has computed it already.
    """
    if is_plain_eager(x) if plain is None else plain:
        if not torch.is_grad_enabled():
            return _forward(x, weight, index, delta, bias, plan)
        return _apply(x, weight, index, delta, bias, plan, kept, kept_index)  # type: ignore[no-any-return]
    op = torch.ops.neuroada.linear.default
    return op(x, weight, index, delta, bias, plan, kept, kept_index)  # type: ignore[no-any-return]


def _forward(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    plan: Tensor | None,
    kept: Tensor | None = None,
    kept_index: Tensor | None = None,
) -> Tensor:
    matrix = x if x.dim() == 2 and x.stride(1) == 1 else as_matrix(x)
    if weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    y: Tensor = _registry.run("linear", matrix, weight, index, delta, bias)
    return y if x.dim() == 2 else unflattened(y, *x.shape[:-1], y.shape[1])


def _backward(
    grad_output: Tensor,
    x: Tensor | None,
    weight: Tensor,
    index: Tensor,
    delta: Tensor,
    plan: Tensor | None,
    output_mask: list[bool],
    kept_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if weight.dtype != grad_output.dtype:
        weight = weight.to(grad_output.dtype)
    rest = (index, delta, plan, output_mask, kept_index, weight.shape[1])
    return run_backward("linear_backward", grad_output, x, (weight,), *rest)


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    plan: Tensor | None,
    kept: Tensor | None = None,
    kept_index: Tensor | None = None,
) -> Tensor:
    return x.new_empty([*x.shape[:-1], weight.shape[0]])


def _fake_backward(
    grad_output: Tensor,
    x: Tensor | None,
    weight: Tensor,
    index: Tensor,
    delta: Tensor,
    plan: Tensor | None,
    output_mask: list[bool],
    kept_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return fake_backward(grad_output, delta, output_mask, weight.shape[1])


define(
    "linear(Tensor x, Tensor weight, Tensor index, Tensor delta, Tensor? bias, "
    "Tensor? plan, Tensor? kept=None, Tensor? kept_index=None) -> Tensor",
    reverse_mode_only(_forward),
    _fake_forward,
)
define(
    "linear_backward(Tensor grad_output, Tensor? x, Tensor weight, Tensor index, Tensor delta, "
    "Tensor? plan, bool[2] output_mask, Tensor? kept_index=None) -> (Tensor, Tensor)",
    reverse_mode_only(_backward),
    _fake_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor | None) -> None:
    """Save what ddelta needs of x, and references to tensors that the module holds already.

    Never saves a new tensor of W's size, and nothing of x if delta does not require grad.
    """
    x, weight, index, delta, bias, plan, kept, kept_index = inputs
    saved = x if ctx.needs_input_grad[3] else None
    if kept is not None or kept_index is not None:
        saved, kept_index = saved_of(x, kept, kept_index, ctx.needs_input_grad[3])
    ctx.save_for_backward(saved, weight, index, delta, plan, kept_index)
    if bias is not None:
        ctx.bias_dtype = bias.dtype


def _differentiate(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, index, delta, plan, kept_index = ctx.saved_tensors
    need_x, need_weight, _, need_delta, need_bias = ctx.needs_input_grad[:5]
    if need_weight:
        raise RuntimeError("weight: requires grad, expected a frozen weight")
    grad_x = grad_delta = grad_bias = None
    if need_x or need_delta:
        args = (grad_output, x, weight, index, delta, plan, [need_x, need_delta], kept_index)
        # With grad mode on, a double backward may follow, which only the op can refuse.
        if is_plain_eager(grad_output) and not torch.is_grad_enabled():
            grad_x, grad_delta = _backward(*args)
        else:
            grad_x, grad_delta = torch.ops.neuroada.linear_backward.default(*args)
    if need_bias:
        grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0).to(ctx.bias_dtype)
    return (
        grad_x if need_x else None,
        None,
        None,
        grad_delta if need_delta else None,
        grad_bias,
        None,
        None,
        None,
    )


class _Linear(torch.autograd.Function):
    """The same autograd as the op's, at a third of its cost."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save(ctx, inputs, None)
        return _forward(*inputs)

    backward = staticmethod(_differentiate)


_apply = plain_apply(_Linear)

torch.library.register_autograd(
    "neuroada::linear", _differentiate, setup_context=_save, lib=LIBRARY
)
torch.library.register_autograd("neuroada::linear_backward", refuse_double_backward, lib=LIBRARY)
