"""The op library of namespace ``neuroada``, and what its ops share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from neuroada_kernels import _registry
from neuroada_kernels._tracing import dispatch_modes, is_pre_dispatched, jit_state

LIBRARY = torch.library.Library("neuroada", "DEF")

_Result = TypeVar("_Result")
PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_transforms: Callable[[], bool] = torch._C._are_functorch_transforms_active
_is_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define ``neuroada::<schema>`` with one implementation for every device."""
    name = LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"neuroada::{name}", fake, lib=LIBRARY)


def reverse_mode_only(implementation: Callable[..., _Result]) -> Callable[..., _Result]:
    """``implementation``, refused in forward mode: torch would leave the tangent out in silence.

    It asks an op for its formula only where something requires grad, and under ``torch.func.jvp``
    what arrives here has lost its tangent already. So any call is refused.
    """

    @functools.wraps(implementation)
    def run(*args: Any, **options: Any) -> _Result:
        if forward_ad._current_level >= 0:
            raise NotImplementedError(
                "neuroada: the ops have no forward mode; neuroada_kernels.functional computes the "
                "formula in plain PyTorch there"
            )
        return implementation(*args, **options)

    return run


def is_plain_eager(x: Tensor) -> bool:
    """Whether a call can skip torch's dispatcher: nobody is tracing or intercepting.

    The dispatcher's way through a Python op with autograd costs 20 microseconds more than an
    ``autograd.Function``, which at one token is more than the kernel.
    """
    return (
        not torch.compiler.is_dynamo_compiling()  # other tracers' tensors have types of their own
        and type(x) in PLAIN_TYPES
        and dispatch_modes() == 0
        and not is_pre_dispatched()
        and not x.is_meta
        and jit_state() is None
        and not _transforms()
        and not _is_wrapped(x)  # by a transform that it has outlived
        and forward_ad._current_level < 0
    )


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` where :func:`is_plain_eager` holds.

    Without torch's search of every argument, in Python, for one that has outlived its transform: a
    tenth of what a call costs the host.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc,no-any-return]


def as_matrix(x: Tensor) -> Tensor:
    """``x [..., d]`` as ``[tokens, d]`` with unit stride along a row, a view where one can be.

    Who runs between two products of the CPU asks first, in place, whether x is one already: from
    cold caches a call takes microseconds.
    """
    matrix = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def saved_of(
    x: Tensor, kept: Tensor | None, kept_index: Tensor | None, needed: bool
) -> tuple[Tensor | None, Tensor | None]:
    """What is saved of x for ddelta, and the index into it where that is not x's own.

    Raises
    ------
    ValueError
        If ``kept`` and ``kept_index`` are not given together, or ``kept`` is not of this x.
    """
    if kept is None and kept_index is None:
        return x if needed else None, None
    if kept is None or kept_index is None:
        name = "kept_index" if kept_index is None else "kept"
        raise ValueError(f"{name}: missing, expected kept and kept_index together")
    if kept.shape[:-1] != x.shape[:-1] or kept.dtype != x.dtype:
        raise ValueError(
            f"kept: {kept.dtype} of shape {list(kept.shape)}, expected {x.dtype} of shape "
            f"{[*x.shape[:-1], 'columns']}, as x"
        )
    return (kept, kept_index) if needed else (None, None)


def delta_gradient(grad: Tensor, kept: Tensor, index: Tensor, delta: Tensor, d_in: int) -> Tensor:
    """ddelta from the columns of x that were kept: the same bits as from x, which had ``d_in``.

    ``grad [tokens, d_out]`` and ``kept [tokens, columns]`` as :func:`as_matrix` gives them, and an
    ``index [d_out, k]`` into the columns that were kept.
    """
    return _registry.run("sddmm", grad, kept, index, delta, d_in)  # type: ignore[no-any-return]


def _x_or_shape(x: Tensor | None, grad: Tensor, d_in: int, need_delta: bool) -> Tensor:
    """x as :func:`as_matrix`; where ddelta is not wanted, what has x's shape and no values.

    Raises
    ------
    ValueError
        If ddelta is wanted, and ``x`` is None.
    """
    if not need_delta:
        return torch.empty(grad.shape[0], d_in, dtype=grad.dtype, device="meta")
    if x is None:
        raise ValueError("x: missing, expected it where the gradient of delta is wanted")
    return as_matrix(x)


def run_backward(
    op: str,
    grad_output: Tensor,
    x: Tensor | None,
    weight: tuple[Tensor, ...],
    index: Tensor,
    delta: Tensor,
    plan: Tensor | None,
    output_mask: list[bool],
    kept_index: Tensor | None,
    d_in: int,
) -> tuple[Tensor, Tensor]:
    """dx and ddelta by the backward ``op``, which has a ``weight`` or none; empty if not wanted.

    With a ``kept_index``, ``x`` has the columns that were kept.
    """
    is_matrix = grad_output.dim() == 2 and grad_output.stride(1) == 1
    grad = grad_output if is_matrix else as_matrix(grad_output)
    need_x, need_delta = output_mask
    grad_x = grad_delta = None
    if kept_index is not None and need_delta:
        kept = _x_or_shape(x, grad, d_in, need_delta)
        grad_delta = delta_gradient(grad, kept, kept_index, delta, d_in)
        need_delta = False
    if need_x or need_delta:
        is_matrix = x is not None and need_delta and x.dim() == 2 and x.stride(1) == 1
        matrix = x if is_matrix else _x_or_shape(x, grad, d_in, need_delta)
        args = (grad, matrix, *weight, index, delta, plan, [need_x, need_delta])
        grad_x, from_whole = _registry.run(op, *args)
        grad_delta = from_whole if need_delta else grad_delta
    if grad_x is not None and grad_output.dim() != 2:
        grad_x = grad_x.view(*grad_output.shape[:-1], d_in)
    return (
        grad.new_empty(0) if grad_x is None else grad_x,
        delta.new_empty(0) if grad_delta is None else grad_delta,
    )


def fake_backward(
    grad_output: Tensor, delta: Tensor, output_mask: list[bool], d_in: int
) -> tuple[Tensor, Tensor]:
    """The fake of :func:`run_backward`."""
    shape = [*grad_output.shape[:-1], d_in]
    return (
        grad_output.new_empty(shape if output_mask[0] else [0]),
        delta.new_empty(delta.shape if output_mask[1] else [0]),
    )


def unflattened(y: Tensor, *shape: int) -> Tensor:
    """``y``, which nobody else has yet, in another shape, and no view.

    Autograd refuses to write into a view that an ``autograd.Function`` made, as in
    ``layer(x).add_(residual)``, and FSDP2 loses its hook there.
    """
    return y.view(shape).data


def refuse_double_backward(ctx: Any, *grads: Tensor) -> None:
    """The backward of a backward op."""
    raise RuntimeError(
        "neuroada: double backward is not supported; neuroada_kernels.reference holds a form that "
        "autograd differentiates to any order"
    )
