"""The public functions: the NeuroAda linear, and the bypass alone, with every argument checked."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from neuroada_kernels import ops, reference
from neuroada_kernels._dtypes import FLOATING, NAMES

_AUTOCAST = (torch.float32, torch.bfloat16, torch.float16)
#: The columns of x that are saved for the backward instead of x, ``[..., columns]`` in the dtype
#: that the layer computes in, and an index into these columns.
Kept: TypeAlias = tuple[Tensor, Tensor]
NOTHING_KEPT = (None, None)
_WRONG_X = "x: dtype {}, expected " + NAMES


def neuroada_linear(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    delta: Tensor,
    bias: Tensor | None = None,
    *,
    plan: Tensor | None = None,
) -> Tensor:
    """A frozen linear with k trainable bypass connections per neuron.

    ``y[t, j] = sum_c x[t, c] W[j, c] + b[j] + sum_s delta[j, s] x[t, index[j, s]]``
    (Zhang et al., NeuroAda, EMNLP 2025). Neither ``W + delta`` nor a gradient of W's shape is
    materialized. Differentiable in ``x``, ``delta`` and ``bias``, once; under ``torch.func``
    transforms and in forward mode the formula in plain PyTorch runs instead.

    Parameters
    ----------
    x : Tensor
        Shape ``[..., d_in]``; float32, float64, bfloat16 or float16. Under autocast it is cast.
    weight : Tensor
        Shape ``[d_out, d_in]``, the dtype of ``x``, frozen.
    index : Tensor
        int32, shape ``[d_out, k]``: distinct columns within a row; -1 marks a slot without a
        connection. The values are checked only as far as memory safety requires; see
        :func:`neuroada_kernels.check_index`.
    delta : Tensor
        Shape ``[d_out, k]``, any floating dtype; float32 is best.
    bias : Tensor, optional
        Shape ``[d_out]``, the dtype of ``x``.
    plan : Tensor, optional
        From :func:`neuroada_kernels.make_plan`; if None, every backward makes one.

    Returns
    -------
    Tensor
        Shape ``[..., d_out]``, the dtype of ``x``.

    Raises
    ------
    TypeError
        If a dtype is not the expected one.
    ValueError
        If a shape or a device is not the expected one, or if ``weight`` requires grad.
    """
    check_linear(x, weight, index, delta, bias, plan)
    return apply_linear(x, weight, index, delta, bias, plan)


def check_linear(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    plan: Tensor | None,
) -> None:
    """Raise if a shape, a device, or a dtype of the adapter's tensors does not fit."""
    _check_bypass(x, index, delta)
    _check_tensors(weight=weight, bias=x if bias is None else bias)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.shape[0] != index.shape[0]:
        raise ValueError(
            f"weight: shape {list(weight.shape)}, expected [d_out, d_in] = "
            f"[{index.shape[0]}, {x.shape[-1]}]"
        )
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias: shape {list(bias.shape)}, expected [{weight.shape[0]}]")
    if bias is not None and bias.device != x.device:
        raise ValueError(f"bias: on {bias.device}, expected {x.device}, as x")
    _check_plan(plan, x)


def apply_linear(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    plan: Tensor | None,
    kept: Kept | None = None,
    *,
    plain: bool | None = None,
) -> Tensor:
    """:func:`neuroada_linear` for tensors of a layer, whose shapes are known to fit.

    ``plain`` is ``ops.is_plain_eager(x)``, if the caller has computed it already.
    """
    x, bias = _checked_linear(x, weight, bias)
    if plain is None:
        plain = ops.is_plain_eager(x)
    if not plain and is_transformed():
        return reference.neuroada_linear(x, weight, index, delta, bias)
    columns, kept_index = kept or NOTHING_KEPT
    return ops.linear(x, weight, index, delta, bias, plan, columns, kept_index, plain=plain)


def apply_resident(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    kept: Kept | None,
    *,
    plain: bool,
) -> Tensor:
    """``F.linear(x, weight, bias)`` with a weight that holds ``W + delta``; computes ddelta too.

    For tensors of a layer, as :func:`apply_linear`; not for use under ``torch.func`` transforms.
    """
    x, bias = _checked_linear(x, weight, bias)
    return ops.resident_linear(x, weight, index, delta, bias, *(kept or NOTHING_KEPT), plain=plain)


def _checked_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``x`` and ``bias``, cast as autocast requires, after checks of devices and dtypes."""
    if not (x.is_cpu and weight.is_cpu) and weight.device != x.device:
        raise ValueError(f"weight: on {weight.device}, expected {x.device}, as x")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight: requires grad, expected a frozen weight")
    autocast = autocast_dtype(x) if torch._C._is_any_autocast_enabled() else None
    if autocast is not None:
        x = x.to(autocast)
        bias = None if bias is None else bias.to(autocast)
    elif x.dtype not in FLOATING:
        raise TypeError(_WRONG_X.format(x.dtype))
    elif weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        name, tensor = ("weight", weight) if weight.dtype != x.dtype else ("bias", bias)
        raise TypeError(f"{name}: dtype {tensor.dtype}, expected {x.dtype}, as x")  # type: ignore[union-attr]
    return x, bias


def neuroada_bypass(
    y: Tensor, x: Tensor, index: Tensor, delta: Tensor, *, plan: Tensor | None = None
) -> Tensor:
    """``y`` plus the bypass, for a base layer that is quantised, sharded or from another library.

    ``out[t, j] = y[t, j] + sum_s delta[j, s] x[t, index[j, s]]``, summed in float32 (float64 for
    float64) and rounded once. Differentiable in ``y``, ``x`` and ``delta``, once.

    Parameters
    ----------
    y : Tensor
        Shape ``[..., d_out]``; not changed.
    x : Tensor
        Shape ``[..., d_in]``, the dtype of ``y`` and the same leading dimensions.
    index, delta, plan
        As in :func:`neuroada_linear`.

    Returns
    -------
    Tensor
        The shape and dtype of ``y``.

    Raises
    ------
    TypeError
        If a dtype is not the expected one.
    ValueError
        If a shape or a device is not the expected one.
    """
    return apply_bypass(y, x, index, delta, plan)


def apply_bypass(
    y: Tensor,
    x: Tensor,
    index: Tensor,
    delta: Tensor,
    plan: Tensor | None,
    kept: Kept | None = None,
) -> Tensor:
    """:func:`neuroada_bypass` for a layer, which may save columns of x instead of x."""
    _check_bypass(x, index, delta)
    _check_tensors(y=y)
    if y.shape != (*x.shape[:-1], index.shape[0]):
        raise ValueError(
            f"y: shape {list(y.shape)}, expected {[*x.shape[:-1], index.shape[0]]}, as x and index"
        )
    _check_plan(plan, x)
    if y.device != x.device:
        raise ValueError(f"y: on {y.device}, expected {x.device}, as x")
    if autocast_dtype(x) is not None:
        x = x.to(y.dtype)
    elif y.dtype != x.dtype:
        raise TypeError(f"y: dtype {y.dtype}, expected {x.dtype}, as x")
    if is_transformed():
        return reference.neuroada_bypass(y, x, index, delta)
    return ops.bypass_add(y, x, index, delta, plan, *(kept or NOTHING_KEPT))


def _check_tensors(**arguments: object) -> None:
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: {type(value).__name__}, expected a tensor")


def _check_bypass(x: Tensor, index: Tensor, delta: Tensor) -> None:
    _check_tensors(x=x, index=index, delta=delta)
    if x.dtype not in FLOATING:
        raise TypeError(_WRONG_X.format(x.dtype))
    if x.dim() == 0:
        raise ValueError("x: a scalar, expected shape [..., d_in]")
    if index.dtype != torch.int32:
        raise TypeError(f"index: dtype {index.dtype}, expected torch.int32")
    if index.dim() != 2 or not 1 <= index.shape[1] <= x.shape[-1]:
        raise ValueError(
            f"index: shape {list(index.shape)}, expected [d_out, k] with k from 1 to "
            f"{x.shape[-1]}, the inputs"
        )
    if delta.shape != index.shape:
        raise ValueError(
            f"delta: shape {list(delta.shape)}, expected {list(index.shape)}, as index"
        )
    if not delta.is_floating_point():
        raise TypeError(f"delta: dtype {delta.dtype}, expected a floating dtype")
    for name, tensor in (("index", index), ("delta", delta)):
        if tensor.device != x.device:
            raise ValueError(f"{name}: on {tensor.device}, expected {x.device}, as x")


def _check_plan(plan: Tensor | None, x: Tensor) -> None:
    if plan is None:
        return
    _check_tensors(plan=plan)
    if plan.dtype != torch.int32 or plan.device != x.device:
        raise ValueError(
            f"plan: {plan.dtype} on {plan.device}, expected torch.int32 on {x.device}, as x"
        )


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast casts a GEMM of ``x``, or None."""
    if not torch._C._is_any_autocast_enabled() or x.dtype not in _AUTOCAST:
        return None
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def is_transformed() -> bool:
    """Whether ``torch.func`` or forward-mode AD is active, which the ops do not support.

    Under ``no_grad`` torch does not call the ops' autograd formula, and would drop the tangent.
    """
    if forward_ad._current_level >= 0:
        return True
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
