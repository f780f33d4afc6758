"""``neuroada::bypass_add``: the bypass added to a given y, for a base layer of another library.

out[t, j]    = y[t, j] + sum_s delta[j, s] x[t, index[j, s]]
dx[t, c]     = sum over (j, s) with index[j, s] = c of delta[j, s] dout[t, j]
ddelta[j, s] = sum_t dout[t, j] x[t, index[j, s]]

``kept`` holds the columns of x that are saved instead of x, as in ``neuroada::linear``.
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


def bypass_add(
    y: Tensor,
    x: Tensor,
    index: Tensor,
    delta: Tensor,
    plan: Tensor | None,
    kept: Tensor | None = None,
    kept_index: Tensor | None = None,
) -> Tensor:
    """Call the op, bypassing the dispatcher in plain eager mode.

    Shapes: ``y [..., d_out]``, ``x [..., d_in]``, ``index`` and ``delta`` ``[d_out, k]``;
    ``kept [..., columns]``, ``kept_index [d_out, k]``.
    """
    if is_plain_eager(x) and is_plain_eager(y):
        if not torch.is_grad_enabled():
            return _forward(y, x, index, delta, plan)
        return _apply(y, x, index, delta, plan, kept, kept_index)  # type: ignore[no-any-return]
    op = torch.ops.neuroada.bypass_add.default
    return op(y, x, index, delta, plan, kept, kept_index)  # type: ignore[no-any-return]


def _forward(
    y: Tensor,
    x: Tensor,
    index: Tensor,
    delta: Tensor,
    plan: Tensor | None,
    kept: Tensor | None = None,
    kept_index: Tensor | None = None,
) -> Tensor:
    base, matrix = as_matrix(y), as_matrix(x)
    out: Tensor = _registry.run("bypass_add", matrix, base, index, delta)
    return unflattened(out, *y.shape)


def _backward(
    grad_output: Tensor,
    x: Tensor | None,
    index: Tensor,
    delta: Tensor,
    plan: Tensor | None,
    output_mask: list[bool],
    kept_index: Tensor | None = None,
    d_in: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``d_in`` is required if x is None (ddelta not needed) or holds only the saved columns."""
    rest = (index, delta, plan, output_mask, kept_index, _width(x, d_in))
    return run_backward("bypass_backward", grad_output, x, (), *rest)


def _width(x: Tensor | None, d_in: int | None) -> int:
    if d_in is not None:
        return d_in
    if x is None:
        raise ValueError("d_in: missing, expected the number of inputs where x is not given")
    return x.shape[-1]


def _fake_forward(
    y: Tensor,
    x: Tensor,
    index: Tensor,
    delta: Tensor,
    plan: Tensor | None,
    kept: Tensor | None = None,
    kept_index: Tensor | None = None,
) -> Tensor:
    return y.new_empty(y.shape)


def _fake_backward(
    grad_output: Tensor,
    x: Tensor | None,
    index: Tensor,
    delta: Tensor,
    plan: Tensor | None,
    output_mask: list[bool],
    kept_index: Tensor | None = None,
    d_in: int | None = None,
) -> tuple[Tensor, Tensor]:
    return fake_backward(grad_output, delta, output_mask, _width(x, d_in))


define(
    "bypass_add(Tensor y, Tensor x, Tensor index, Tensor delta, Tensor? plan, "
    "Tensor? kept=None, Tensor? kept_index=None) -> Tensor",
    reverse_mode_only(_forward),
    _fake_forward,
)
define(
    "bypass_backward(Tensor grad_output, Tensor? x, Tensor index, Tensor delta, Tensor? plan, "
    "bool[2] output_mask, Tensor? kept_index=None, SymInt? d_in=None) -> (Tensor, Tensor)",
    reverse_mode_only(_backward),
    _fake_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor | None) -> None:
    _, x, index, delta, plan, kept, kept_index = inputs
    ctx.d_in = x.shape[-1]
    saved, kept_index = saved_of(x, kept, kept_index, ctx.needs_input_grad[3])
    ctx.save_for_backward(saved, index, delta, plan, kept_index)


def _differentiate(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    x, index, delta, plan, kept_index = ctx.saved_tensors
    need_y, need_x, _, need_delta = ctx.needs_input_grad[:4]
    grad_x = grad_delta = None
    if need_x or need_delta:
        mask = [need_x, need_delta]
        args = (grad_output, x, index, delta, plan, mask, kept_index, ctx.d_in)
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
        None,
        None,
    )


class _BypassAdd(torch.autograd.Function):
    """The same autograd as the op's, at a third of its cost."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save(ctx, inputs, None)
        return _forward(*inputs)

    backward = staticmethod(_differentiate)


_apply = plain_apply(_BypassAdd)

torch.library.register_autograd(
    "neuroada::bypass_add", _differentiate, setup_context=_save, lib=LIBRARY
)
torch.library.register_autograd("neuroada::bypass_backward", refuse_double_backward, lib=LIBRARY)
