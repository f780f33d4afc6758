"""What the CUDA ops are given is checked before a kernel writes anything."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from host_ops import C
from torch import Tensor

import neuroada_kernels as nk


def arguments() -> dict[str, Tensor]:
    return {
        "x": torch.randn(5, 6),
        "index": torch.tensor([[0, 1], [2, 3], [4, 5], [1, -1]], dtype=torch.int32),
        "delta": torch.randn(4, 2),
        "bias": torch.randn(4),
        "base": torch.randn(5, 4),
        "out": torch.full((5, 4), 7.0),
        "grad": torch.randn(5, 4),
        "plan": torch.zeros(6 + 1 + 64 + 1 + 7, dtype=torch.int32),
        "grad_x": torch.full((5, 6), 7.0),
        "weight": torch.full((4, 6), 7.0),
        "original": torch.full((4, 2), 7.0),
        **sixteen_bits(),
    }


def sixteen_bits() -> dict[str, Tensor]:
    """Arguments of the kernels with a product in them; the names say so where others have them."""
    dtype = torch.bfloat16
    return {
        "x16": torch.randn(5, 8, dtype=dtype),
        "weight16": torch.randn(4, 8, dtype=dtype),
        "bias16": torch.randn(4, dtype=dtype),
        "grad16": torch.randn(5, 8, dtype=dtype),
        "weight_back16": torch.randn(8, 8, dtype=dtype),
        "plan16": torch.zeros(8 + 1 + 64 + 1 + 7, dtype=torch.int32),
        "delta_back": torch.randn(8, 2),
        "index_back": torch.tensor([[0, 1], [2, 7], [4, 5], [1, -1]] * 2, dtype=torch.int32),
    }


CALLS: dict[str, Callable[..., object]] = {
    "bypass_fwd": lambda a: C.bypass_fwd(
        *(a[n] for n in ("x", "index", "delta", "bias", "base", "out"))
    ),
    "bypass_bwd_input": lambda a: C.bypass_bwd_input(
        *(a[n] for n in ("grad", "plan", "delta", "grad_x"))
    ),
    "sddmm": lambda a: C.sddmm(a["grad"], a["x"], a["index"]),
    "linear_fwd": lambda a: C.linear_fwd(
        *(a[n] for n in ("x16", "weight16", "index", "delta", "bias16"))
    ),
    "linear_bwd_input": lambda a: C.linear_bwd_input(
        *(a[n] for n in ("grad16", "weight_back16", "plan16", "delta_back"))
    ),
    "linear_bwd": lambda a: C.linear_bwd(
        *(a[n] for n in ("grad16", "x16", "weight_back16", "index_back", "plan16", "delta_back"))
    ),
    "linear_patched_fwd": lambda a: C.linear_patched_fwd(
        *(a[n] for n in ("x16", "weight16", "index", "delta", "bias16"))
    ),
    "linear_patched_bwd_input": lambda a: C.linear_patched_bwd_input(
        *(a[n] for n in ("grad16", "weight_back16", "index_back", "delta_back"))
    ),
    "merge": lambda a: C.merge(a["weight"], a["index"], a["delta"]),
    "gather": lambda a: C.gather(a["weight"], a["index"]),
    "patch": lambda a: C.patch(*(a[n] for n in ("weight", "index", "delta", "original"))),
    "restore": lambda a: C.restore(*(a[n] for n in ("weight", "index", "original"))),
}


def odd(tensor: Tensor) -> Tensor:
    """The same values in rows that are one element further apart."""
    return torch.cat([tensor, tensor[:, :1]], 1)[:, : tensor.shape[1]]


#: (op, argument, what it is instead, what the error says)
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
    ("bypass_bwd_input", "plan", lambda t: t[:71], "plan: shape [71], expected at least [72]"),
    ("bypass_bwd_input", "plan", lambda t: t.long(), "plan: dtype is not the expected int32"),
    ("bypass_bwd_input", "plan", lambda t: t.repeat(2)[::2], "plan: not contiguous"),
    ("bypass_bwd_input", "plan", lambda t: t.repeat(2), "plan: 86 connections, expected at most"),
    ("bypass_bwd_input", "grad_x", lambda t: t[:4], "out: shape [4, 6], expected [5, -1]"),
    ("bypass_bwd_input", "grad_x", lambda t: t.half(), "out: dtype differs"),
    ("sddmm", "grad", lambda t: t[:4], "grad: shape [4, 4], expected [5, 4]"),
    ("sddmm", "x", lambda t: t.half(), "x: dtype differs"),
    ("sddmm", "index", lambda t: t.short(), "index: dtype is not the expected int32"),
    ("linear_fwd", "x16", lambda t: t.float(), "x: dtype float32, expected bfloat16 or float16"),
    ("linear_fwd", "x16", lambda t: t[:, :4], "weight: shape [4, 8], expected [-1, 4]"),
    ("linear_fwd", "x16", lambda t: t.repeat(1, 2)[:, 4:12], "linear_fwd: x: not 16-byte aligned"),
    ("linear_fwd", "x16", lambda t: odd(t), "linear_fwd: x: stride 9, expected a multiple of 8"),
    (
        "linear_fwd",
        "x16",
        lambda t: t[:1].expand(5, -1),
        "linear_fwd: x: stride 0, expected no less",
    ),
    ("linear_fwd", "weight16", lambda t: odd(t), "linear_fwd: weight: stride 9, expected"),
    ("linear_fwd", "weight16", lambda t: t.half(), "weight: dtype differs from that of x"),
    ("linear_fwd", "weight16", lambda t: t[:3], "index: shape [4, 2], expected [3, -1]"),
    ("linear_fwd", "bias16", lambda t: t[:3], "bias: shape [3], expected [4]"),
    ("linear_fwd", "bias16", lambda t: t.float(), "bias: dtype differs"),
    ("linear_fwd", "delta", lambda t: t[:3], "delta: shape [3, 2], expected [4, 2]"),
    ("linear_bwd_input", "grad16", lambda t: t[:, :4], "weight: shape [8, 8], expected [4, -1]"),
    ("linear_bwd_input", "grad16", lambda t: odd(t), "linear_bwd_input: grad: stride 9"),
    ("linear_bwd_input", "weight_back16", lambda t: t[:, :4], "weight: 4 columns, expected a mul"),
    ("linear_bwd_input", "weight_back16", lambda t: t.half(), "weight: dtype differs"),
    ("linear_bwd_input", "plan16", lambda t: t[:73], "plan: shape [73], expected at least [74]"),
    ("linear_bwd_input", "plan16", lambda t: t.repeat(2), "plan: 88 connections, expected at most"),
    ("linear_bwd", "x16", lambda t: t[:4], "x: shape [4, 8], expected [5, 8]"),
    ("linear_bwd", "x16", lambda t: t.half(), "x: dtype differs from that of grad"),
    ("linear_bwd", "x16", lambda t: odd(t), "linear_bwd: x: stride 9, expected a multiple of 8"),
    ("linear_bwd", "grad16", lambda t: t.float(), "grad: dtype float32, expected bfloat16"),
    ("linear_bwd", "index_back", lambda t: t[:7], "index: shape [7, 2], expected [8, -1]"),
    ("linear_bwd", "delta_back", lambda t: t[:, :1], "delta: shape [8, 1], expected [8, 2]"),
    ("linear_bwd", "plan16", lambda t: t.repeat(2), "plan: 88 connections, expected at most"),
    ("linear_patched_fwd", "x16", lambda t: t.float(), "x: dtype float32, expected bfloat16"),
    ("linear_patched_fwd", "index", lambda t: t[:3], "index: shape [3, 2], expected [4, -1]"),
    ("linear_patched_fwd", "delta", lambda t: t[:3], "delta: shape [3, 2], expected [4, 2]"),
    ("linear_patched_fwd", "bias16", lambda t: t[:3], "bias: shape [3], expected [4]"),
    ("linear_patched_bwd_input", "grad16", lambda t: t[:, :4], "weight: shape [8, 8], expected [4"),
    (
        "linear_patched_bwd_input",
        "grad16",
        lambda t: odd(t),
        "_bwd_input: grad: stride 9, expected",
    ),
    ("merge", "weight", lambda t: t.double(), "weight: dtype float64"),
    ("merge", "weight", lambda t: t.t().contiguous().t(), "weight: stride 4 along a row"),
    ("merge", "delta", lambda t: t.double(), "delta: dtype is not the expected float32"),
    ("gather", "index", lambda t: t[0], "index: shape [2], expected a matrix"),
    ("gather", "index", lambda t: t[:3], "index: shape [3, 2], expected [4, -1]"),
    ("patch", "original", lambda t: t.half(), "original: dtype differs"),
    ("patch", "original", lambda t: t[:, :1], "original: shape [4, 1], expected [4, 2]"),
    ("restore", "original", lambda t: t.repeat(1, 2)[:, ::2], "original: stride 2"),
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
    for written in ("out", "grad_x", "weight", "original"):
        assert (given[written] == 7).all()


@pytest.mark.parametrize("op", ["linear_fwd", "linear_bwd_input", "linear_bwd"])
def test_a_product_over_nothing_is_refused(op):
    """Its chunks are cut by what a token takes, which is nothing here."""
    given = arguments()
    if op == "linear_fwd":
        given |= {"x16": given["x16"][:, :0], "weight16": given["weight16"][:, :0]}
        given["index"] = torch.full_like(given["index"], -1)
    else:
        given |= {"grad16": given["grad16"][:, :0], "weight_back16": given["weight_back16"][:0]}
        given["delta_back"], given["index_back"] = given["delta_back"][:0], given["index_back"][:0]
        given["plan16"] = nk.make_plan(
            torch.empty(0, given["delta_back"].shape[1], dtype=torch.int32),
            given["weight_back16"].shape[1],
        )
    with pytest.raises(RuntimeError, match=f"{op}: .*: (0 columns|no rows)"):
        CALLS[op](given)


@pytest.mark.parametrize("op", CALLS)
def test_right_arguments_are_served(op):
    CALLS[op](arguments())


@pytest.mark.parametrize("op", CALLS)
def test_a_freed_storage_is_refused(op):
    given = arguments()
    name = {
        "bypass_fwd": "x",
        "bypass_bwd_input": "grad",
        "sddmm": "grad",
        "linear_fwd": "weight16",
        "linear_bwd_input": "weight_back16",
        "linear_bwd": "weight_back16",
        "linear_patched_fwd": "weight16",
        "linear_patched_bwd_input": "weight_back16",
    }.get(op, "weight")
    given[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"{name.partition('_')[0].removesuffix('16')}: its"):
        CALLS[op](given)
