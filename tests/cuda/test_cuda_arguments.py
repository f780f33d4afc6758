"""Arguments of the CUDA ops are checked before a kernel writes anything."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from host_ops import C
from torch import Tensor

from neuroada_kernels.plan import plan_size


def arguments() -> dict[str, Tensor]:
    return {
        "x": torch.randn(5, 6),
        "index": torch.tensor([[0, 1], [2, 3], [4, 5], [1, -1]], dtype=torch.int32),
        "delta": torch.randn(4, 2),
        "bias": torch.randn(4),
        "base": torch.randn(5, 4),
        "out": torch.full((5, 4), 7.0),
        "grad": torch.randn(5, 4),
        "plan": torch.zeros(plan_size(6, 7), dtype=torch.int32),
        "ordered": torch.full((plan_size(6, 7),), 7, dtype=torch.int32),
        "grad_x": torch.full((5, 6), 7.0),
        "wide_base": torch.randn(5, 6),
        "weight": torch.full((4, 6), 7.0),
        "original": torch.full((4, 2), 7.0),
        "columns": torch.tensor([0, 2, 5], dtype=torch.int32),
        **sixteen_bits(),
    }


def sixteen_bits() -> dict[str, Tensor]:
    """Arguments of the GEMMs for sm_90a; suffixes distinguish names that other ops use."""
    dtype = torch.bfloat16
    return {
        "x16": torch.randn(5, 8, dtype=dtype),
        "weight16": torch.randn(4, 8, dtype=dtype),
        "bias16": torch.randn(4, dtype=dtype),
        "weight_onto16": torch.randn(8, 8, dtype=dtype),
        "bias_onto16": torch.randn(8, dtype=dtype),
        "onto16": torch.full((5, 8), 7.0, dtype=dtype),
        "grad16": torch.randn(5, 8, dtype=dtype),
        "weight_back16": torch.randn(8, 8, dtype=dtype),
        "delta_back": torch.randn(8, 2),
        "index_back": torch.tensor([[0, 1], [2, 7], [4, 5], [1, -1]] * 2, dtype=torch.int32),
    }


CALLS: dict[str, Callable[..., object]] = {
    "bypass_fwd": lambda a: C.bypass_fwd(
        *(a[n] for n in ("x", "index", "delta", "bias", "base", "out"))
    ),
    "bypass_bwd_input": lambda a: C.bypass_bwd_input(
        *(a[n] for n in ("grad", "plan", "delta", "wide_base", "grad_x"))
    ),
    "order_plan": lambda a: C.order_plan(a["plan"], 6, 4, 2, a["ordered"]),
    "sddmm": lambda a: C.sddmm(a["grad"], a["x"], a["index"]),
    "linear_patched_fwd": lambda a: C.linear_patched_fwd(
        *(a[n] for n in ("x16", "weight16", "index", "delta", "bias16"))
    ),
    "linear_patched_bwd_input": lambda a: C.linear_patched_bwd_input(
        *(a[n] for n in ("grad16", "weight_back16", "index_back", "delta_back"))
    ),
    "product_onto_fwd": lambda a: C.product_onto_fwd(
        *(a[n] for n in ("x16", "weight_onto16", "bias_onto16", "onto16"))
    ),
    "product_onto_bwd_input": lambda a: C.product_onto_bwd_input(
        *(a[n] for n in ("grad16", "weight_back16", "onto16"))
    ),
    "merge": lambda a: C.merge(a["weight"], a["index"], a["delta"]),
    "gather": lambda a: C.gather(a["weight"], a["index"]),
    "patch": lambda a: C.patch(*(a[n] for n in ("weight", "index", "delta", "original"))),
    "restore": lambda a: C.restore(*(a[n] for n in ("weight", "index", "original"))),
    "columns": lambda a: C.columns(a["x"], a["columns"]),
}


def odd(tensor: Tensor) -> Tensor:
    """The same values in rows that are one element further apart."""
    return torch.cat([tensor, tensor[:, :1]], 1)[:, : tensor.shape[1]]


#: (op, argument, what makes it wrong, expected error message)
WRONG = [
    ("bypass_fwd", "x", lambda t: t[0], "x: shape [6], expected a matrix"),
    ("bypass_fwd", "x", lambda t: t.double(), "x: dtype float64, expected float32"),
    ("bypass_fwd", "x", lambda t: t.int(), "x: dtype is not float32"),
    ("bypass_fwd", "x", lambda t: t.t().contiguous().t(), "x: stride 5 along a row"),
    ("bypass_fwd", "index", lambda t: t.long(), "index: dtype is not the expected int32"),
    ("bypass_fwd", "index", lambda t: t[:, :1], "index: not contiguous"),
    ("bypass_fwd", "delta", lambda t: t[:3], "delta: shape [3, 2], expected [4, 2]"),
    ("bypass_fwd", "delta", lambda t: t.half(), "delta: dtype is not the expected float32"),
    ("bypass_fwd", "delta", lambda t: t.t().contiguous().t(), "delta: stride 4 along a row"),
    ("bypass_fwd", "bias", lambda t: t[:3], "bias: shape [3], expected [4]"),
    ("bypass_fwd", "bias", lambda t: t.half(), "bias: dtype differs"),
    ("bypass_fwd", "bias", lambda t: t.repeat(2)[::2], "bias: not contiguous"),
    ("bypass_fwd", "base", lambda t: t[:4], "base: shape [4, 4], expected [5, 4]"),
    ("bypass_fwd", "base", lambda t: t.half(), "base: dtype differs"),
    ("bypass_fwd", "out", lambda t: t[:, :3], "out: shape [5, 3], expected [5, 4]"),
    ("bypass_fwd", "out", lambda t: t.half(), "out: dtype differs"),
    ("bypass_bwd_input", "grad", lambda t: t[:, :3], "grad: shape [5, 3], expected [-1, 4]"),
    ("bypass_bwd_input", "grad", lambda t: t.double(), "grad: dtype float64"),
    ("bypass_bwd_input", "wide_base", lambda t: t[:4], "base: shape [4, 6], expected [5, 6]"),
    (
        "bypass_bwd_input",
        "wide_base",
        lambda t: t.half(),
        "base: dtype is not the expected float32",
    ),
    ("bypass_bwd_input", "plan", lambda t: t[:139], "plan: shape [139], expected at least [140]"),
    ("bypass_bwd_input", "plan", lambda t: t.long(), "plan: dtype is not the expected int32"),
    ("bypass_bwd_input", "plan", lambda t: t.repeat(2)[::2], "plan: not contiguous"),
    ("bypass_bwd_input", "plan", lambda t: t.repeat(2), "plan: 154 connections, expected at most"),
    ("bypass_bwd_input", "grad_x", lambda t: t[:4], "out: shape [4, 6], expected [5, -1]"),
    ("bypass_bwd_input", "grad_x", lambda t: t.half(), "out: dtype differs"),
    ("order_plan", "plan", lambda t: t[:139], "plan: shape [139], expected at least [140]"),
    ("order_plan", "plan", lambda t: t.repeat(2), "plan: 154 connections, expected at most 8"),
    ("order_plan", "plan", lambda t: t.long(), "plan: dtype is not the expected int32"),
    ("order_plan", "ordered", lambda t: t[:-1], "out: shape [146], expected that of plan, [147]"),
    ("order_plan", "ordered", lambda t: t.repeat(2)[::2], "out: not contiguous"),
    ("sddmm", "grad", lambda t: t[:4], "grad: shape [4, 4], expected [5, 4]"),
    ("sddmm", "x", lambda t: t.half(), "x: dtype differs"),
    ("sddmm", "index", lambda t: t.short(), "index: dtype is not the expected int32"),
    ("linear_patched_fwd", "x16", lambda t: t.float(), "x: dtype float32, expected bfloat16"),
    ("linear_patched_fwd", "x16", lambda t: t[:, :4], "weight: shape [4, 8], expected [-1, 4]"),
    (
        "linear_patched_fwd",
        "x16",
        lambda t: t.repeat(1, 2)[:, 4:12],
        "linear_patched_fwd: x: not 16-byte aligned",
    ),
    ("linear_patched_fwd", "x16", lambda t: odd(t), "x: stride 9, expected a multiple of 8"),
    ("linear_patched_fwd", "x16", lambda t: t[:1].expand(5, -1), "x: stride 0, expected no less"),
    ("linear_patched_fwd", "weight16", lambda t: odd(t), "weight: stride 9, expected a multiple"),
    ("linear_patched_fwd", "weight16", lambda t: t.half(), "weight: dtype differs from that of x"),
    ("linear_patched_fwd", "weight16", lambda t: t[:3], "index: shape [4, 2], expected [3, -1]"),
    ("linear_patched_fwd", "index", lambda t: t[:3], "index: shape [3, 2], expected [4, -1]"),
    ("linear_patched_fwd", "delta", lambda t: t[:3], "delta: shape [3, 2], expected [4, 2]"),
    ("linear_patched_fwd", "bias16", lambda t: t[:3], "bias: shape [3], expected [4]"),
    ("linear_patched_fwd", "bias16", lambda t: t.float(), "bias: dtype differs"),
    ("linear_patched_bwd_input", "grad16", lambda t: t.float(), "grad: dtype float32, expected"),
    ("linear_patched_bwd_input", "grad16", lambda t: t[:, :4], "weight: shape [8, 8], expected [4"),
    ("linear_patched_bwd_input", "grad16", lambda t: odd(t), "grad: stride 9, expected"),
    ("linear_patched_bwd_input", "weight_back16", lambda t: t[:, :4], "weight: 4 columns, "),
    ("linear_patched_bwd_input", "weight_back16", lambda t: t.half(), "weight: dtype differs"),
    ("linear_patched_bwd_input", "index_back", lambda t: t[:7], "index: shape [7, 2], expected [8"),
    ("linear_patched_bwd_input", "delta_back", lambda t: t[:, :1], "delta: shape [8, 1], expected"),
    ("product_onto_fwd", "x16", lambda t: t.float(), "x: dtype float32, expected bfloat16"),
    ("product_onto_fwd", "x16", lambda t: t[0], "x: shape [8], expected a matrix"),
    ("product_onto_fwd", "x16", lambda t: t[:, :4], "weight: shape [8, 8], expected [-1, 4]"),
    ("product_onto_fwd", "x16", lambda t: t[:4], "onto: shape [5, 8], expected [4, 8]"),
    ("product_onto_fwd", "x16", lambda t: odd(t), "product_onto_fwd: x: stride 9, expected a mult"),
    ("product_onto_fwd", "weight_onto16", lambda t: odd(t), "weight: stride 9, expected a"),
    ("product_onto_fwd", "weight_onto16", lambda t: t.half(), "weight: dtype differs from"),
    ("product_onto_fwd", "weight_onto16", lambda t: t[:4], "onto: shape [5, 8], expected [5, 4]"),
    ("product_onto_fwd", "bias_onto16", lambda t: t[:4], "bias: shape [4], expected [8]"),
    ("product_onto_fwd", "bias_onto16", lambda t: t.float(), "bias: dtype differs"),
    ("product_onto_fwd", "bias_onto16", lambda t: t.repeat(2)[::2], "bias: not contiguous"),
    ("product_onto_fwd", "onto16", lambda t: t[:4], "onto: shape [4, 8], expected [5, 8]"),
    ("product_onto_fwd", "onto16", lambda t: t.float(), "onto: dtype differs from that of x"),
    ("product_onto_fwd", "onto16", lambda t: odd(t), "onto: stride 9, expected a multiple of 8"),
    (
        "product_onto_fwd",
        "onto16",
        lambda t: t[:1].expand(5, -1),
        "onto: stride 0 between rows of 8",
    ),
    (
        "product_onto_fwd",
        "onto16",
        lambda t: t.repeat(1, 2)[:, 4:12],
        "product_onto_fwd: onto: not 16-byte aligned",
    ),
    ("product_onto_bwd_input", "grad16", lambda t: t.float(), "grad: dtype float32, expected"),
    ("product_onto_bwd_input", "grad16", lambda t: t[:, :4], "weight: shape [8, 8], expected [4"),
    ("product_onto_bwd_input", "grad16", lambda t: odd(t), "grad: stride 9, expected"),
    ("product_onto_bwd_input", "weight_back16", lambda t: t[:, :4], "onto: shape [5, 8], "),
    ("product_onto_bwd_input", "weight_back16", lambda t: t.half(), "weight: dtype differs"),
    ("product_onto_bwd_input", "onto16", lambda t: t.half(), "onto: dtype differs from"),
    ("merge", "weight", lambda t: t.double(), "weight: dtype float64"),
    ("merge", "weight", lambda t: t.t().contiguous().t(), "weight: stride 4 along a row"),
    ("merge", "delta", lambda t: t.double(), "delta: dtype is not the expected float32"),
    ("gather", "index", lambda t: t[0], "index: shape [2], expected a matrix"),
    ("gather", "index", lambda t: t[:3], "index: shape [3, 2], expected [4, -1]"),
    ("patch", "original", lambda t: t.half(), "original: dtype differs"),
    ("patch", "original", lambda t: t[:, :1], "original: shape [4, 1], expected [4, 2]"),
    ("restore", "original", lambda t: t.repeat(1, 2)[:, ::2], "original: stride 2"),
    ("columns", "x", lambda t: t[0], "x: shape [6], expected a matrix"),
    ("columns", "x", lambda t: t.double(), "x: dtype float64, expected float32"),
    ("columns", "x", lambda t: t.t().contiguous().t(), "x: stride 5 along a row"),
    ("columns", "columns", lambda t: t[None], "columns: shape [1, 3], expected one dimension"),
    ("columns", "columns", lambda t: t.long(), "columns: dtype is not the expected int32"),
    ("columns", "columns", lambda t: t.repeat(2)[::2], "columns: not contiguous"),
]


@pytest.mark.parametrize(
    ("op", "name", "spoil", "message"), WRONG, ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_wrong_argument_is_named_and_nothing_is_written(op, name, spoil, message):
    given = arguments()
    given[name] = spoil(given[name])
    with pytest.raises(RuntimeError) as raised:
        CALLS[op](given)
    assert message in str(raised.value)
    for written in ("out", "grad_x", "weight", "original", "onto16", "ordered"):
        assert (given[written] == 7).all()


def test_a_product_over_nothing_is_refused():
    given = arguments()
    given |= {"x16": given["x16"][:, :0], "weight16": given["weight16"][:, :0]}
    with pytest.raises(RuntimeError, match="linear_patched_fwd: x: 0 columns"):
        CALLS["linear_patched_fwd"](given)
    given |= {"grad16": given["grad16"][:, :0], "weight_back16": given["weight_back16"][:0]}
    given |= {name: given[name][:0] for name in ("index_back", "delta_back")}
    with pytest.raises(RuntimeError, match="linear_patched_bwd_input: grad: 0 columns"):
        CALLS["linear_patched_bwd_input"](given)
    with pytest.raises(RuntimeError, match="product_onto_bwd_input: grad: 0 columns"):
        CALLS["product_onto_bwd_input"](given)
    given |= {"weight_onto16": given["weight_onto16"][:, :0]}
    with pytest.raises(RuntimeError, match="product_onto_fwd: x: 0 columns"):
        CALLS["product_onto_fwd"](given)


def test_sizes_of_which_no_rows_are_whole_vectors_are_refused():
    given = arguments()
    given |= {"weight_onto16": given["weight_onto16"][:4], "onto16": given["onto16"][:, :4]}
    given |= {"bias_onto16": given["bias_onto16"][:4]}
    with pytest.raises(RuntimeError, match="product_onto_fwd: onto: 4 columns, expected"):
        CALLS["product_onto_fwd"](given)
    assert (given["onto16"] == 7).all()


@pytest.mark.parametrize("op", CALLS)
def test_right_arguments_are_served(op):
    CALLS[op](arguments())


@pytest.mark.parametrize("op", CALLS)
def test_a_freed_storage_is_refused(op):
    given = arguments()
    name = {
        "bypass_fwd": "x",
        "bypass_bwd_input": "grad",
        "order_plan": "plan",
        "sddmm": "grad",
        "columns": "x",
        "linear_patched_fwd": "weight16",
        "linear_patched_bwd_input": "weight_back16",
        "product_onto_fwd": "onto16",
        "product_onto_bwd_input": "onto16",
    }.get(op, "weight")
    given[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"{name.partition('_')[0].removesuffix('16')}: its"):
        CALLS[op](given)
