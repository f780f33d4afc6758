"""The fallback: plain PyTorch on any device, with neither a copy of W nor a dense gradient.

x is transposed in blocks of tokens, so that gathering a column copies one contiguous run.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from neuroada_kernels._dtypes import accumulated_in
from neuroada_kernels._registry import Backend, Implementation, register
from neuroada_kernels.backends._dense import add_dense, bias_for_bypass
from neuroada_kernels.backends._entries import assign_entries, chosen_entries, patch_entries

#: Bytes of transposed blocks held at a time.
_BLOCK_BYTES = 8 << 20


def _linear(x: Tensor, weight: Tensor, index: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
    early, late = bias_for_bypass(bias)
    y = x.new_empty(x.shape[0], weight.shape[0])
    _bypass_into(y, x, index, delta, early)
    return add_dense(y, x, weight.t(), late)


def _linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    delta: Tensor,
    plan: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    grad_x, grad_delta = _bypass_backward(grad, x, index, delta, plan, output_mask)
    if grad_x is not None:
        grad_x = add_dense(grad_x, grad, weight)
    return grad_x, grad_delta


def _bypass_add(x: Tensor, y: Tensor, index: Tensor, delta: Tensor) -> Tensor:
    out = y.clone(memory_format=torch.contiguous_format)
    _bypass_into(out, x, index, delta, out)
    return out


def _bypass_into(out: Tensor, x: Tensor, index: Tensor, delta: Tensor, onto: Tensor | None) -> None:
    """``out[t, j] = onto[t, j] + sum_s delta[j, s] x[t, index[j, s]]``; ``onto``: out or a bias."""
    slots = _Slots(index, delta, x.dtype)
    for part in _blocks(x.shape[0], x.shape[1] + 3 * index.shape[0]):
        x_t = x[part].t().to(slots.dtype).contiguous()  # [d_in, block]
        total = x_t.new_zeros(index.shape[0], x_t.shape[1])
        for s in range(index.shape[1]):
            total.addcmul_(slots.choose(x_t, s), slots.value[:, s, None])
        if onto is not None:
            total += onto[:, None] if onto.dim() == 1 else onto[part].t()
        out[part] = total.t()


def _bypass_backward(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    delta: Tensor,
    plan: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    return _backward(grad, x, index, delta, output_mask, x.shape[1])


def _sddmm(grad: Tensor, x: Tensor, index: Tensor, delta: Tensor, d_in: int) -> Tensor:
    _, grad_delta = _backward(grad, x, index, delta, [False, True], d_in)
    assert grad_delta is not None
    return grad_delta


def _backward(
    grad: Tensor, x: Tensor, index: Tensor, delta: Tensor, output_mask: list[bool], d_in: int
) -> tuple[Tensor | None, Tensor | None]:
    """``x`` may hold only saved columns; the token blocks of the sums depend only on ``d_in``."""
    need_x, need_delta = output_mask
    slots = _Slots(index, delta, grad.dtype)
    grad_x = grad.new_empty(x.shape) if need_x else None
    grad_delta = torch.zeros_like(slots.value) if need_delta else None
    for part in _blocks(x.shape[0], 2 * d_in + 3 * index.shape[0]):
        grad_t = grad[part].t().to(slots.dtype).contiguous()  # [d_out, block]
        if grad_delta is not None:
            x_t = x[part].t().to(slots.dtype).contiguous()  # [d_in, block]
            for s in range(index.shape[1]):
                products = slots.mask(grad_t * slots.choose(x_t, s), s)
                grad_delta[:, s] += products.sum(1)
        if grad_x is not None:
            total = grad_t.new_zeros(x.shape[1], grad_t.shape[1])
            for s in range(index.shape[1]):
                products = slots.mask(grad_t * slots.value[:, s, None], s)
                _add_rows(total, slots.column[:, s], products)
            grad_x[part] = total.t()
    return grad_x, None if grad_delta is None else grad_delta.to(delta.dtype)


def _add_rows(total: Tensor, rows: Tensor, products: Tensor) -> None:
    """``total[rows[i]] += products[i]``, in an order that does not change from run to run.

    Above some size ``index_put_`` uses atomics on a CPU; elsewhere ``index_add_`` does.
    """
    if total.is_cpu:
        total.index_add_(0, rows, products)
    else:
        total.index_put_((rows,), products, accumulate=True)


class _Slots:
    """The k connections per neuron: columns as int64, values in the dtype of the sums.

    A slot without a connection has column 0 and value 0, and its gathered values are masked: zero
    times an infinite x is not zero.
    """

    def __init__(self, index: Tensor, delta: Tensor, dtype: torch.dtype) -> None:
        self.dtype = accumulated_in(dtype)
        empty = index < 0
        # On an accelerator, testing for empty slots would synchronize with the device.
        self.empty = None if index.is_cpu and not bool(empty.any()) else empty
        self.column = index.clamp(min=0).long()
        self.value = delta.to(self.dtype).masked_fill(empty, 0)

    def choose(self, x_t: Tensor, s: int) -> Tensor:
        """``x_t[index[:, s]]`` of shape ``[d_out, block]``."""
        return self.mask(x_t.index_select(0, self.column[:, s]), s)

    def mask(self, values: Tensor, s: int) -> Tensor:
        return values if self.empty is None else values.masked_fill_(self.empty[:, s, None], 0)


def _merge(weight: Tensor, index: Tensor, delta: Tensor) -> Tensor:
    original = chosen_entries(weight, index)
    patch_entries(weight, index, delta, original)
    return original


def _blocks(tokens: int, values_a_token: int) -> Iterator[slice]:
    step = max(1, _BLOCK_BYTES // (4 * max(1, values_a_token)))
    for first in range(0, tokens, step):
        yield slice(first, min(first + step, tokens))


def _serves_all(*args: object) -> list[str]:
    return []


register(
    Backend(
        name="eager",
        priority={"*": 0},
        implementations={
            "linear": Implementation(_linear, _serves_all),
            "linear_backward": Implementation(_linear_backward, _serves_all),
            "bypass_add": Implementation(_bypass_add, _serves_all),
            "bypass_backward": Implementation(_bypass_backward, _serves_all),
            "sddmm": Implementation(_sddmm, _serves_all),
            "merge_": Implementation(_merge, _serves_all),
            "unmerge_": Implementation(assign_entries, _serves_all),
            "gather": Implementation(chosen_entries, _serves_all),
            "patch_": Implementation(patch_entries, _serves_all),
        },
    )
)
