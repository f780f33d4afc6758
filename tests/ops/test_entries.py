"""The ops on the chosen entries of W: what each writes, however often, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import neuroada_kernels as nk
from neuroada_kernels import ops
from neuroada_kernels.testing import CASES, Case, Inputs, make_inputs

#: One for every kind of index.
KINDS = list({case.index: case for case in CASES if case.tokens}.values())
every_kind = pytest.mark.parametrize("case", KINDS, ids=lambda case: case.name)


def entry_by_entry(inputs: Inputs) -> Tensor:
    """The entries of W that the index names, written down without the package."""
    original = torch.zeros(inputs.index.shape, dtype=inputs.weight.dtype)
    for j, columns in enumerate(inputs.index.tolist()):
        for s, column in enumerate(columns):
            if column >= 0:
                original[j, s] = inputs.weight[j, column]
    return original.to(inputs.weight.device)


def laid_out(weight: Tensor, layout: str) -> Tensor:
    """The same values in rows, in columns, or in rows that lie apart."""
    if layout == "columns":
        return weight.t().clone(memory_format=torch.contiguous_format).t()
    if layout == "apart":
        return torch.nn.functional.pad(weight, (0, 3))[:, :-3]
    return weight.clone()


@every_kind
@pytest.mark.parametrize("layout", ["rows", "columns", "apart"])
def test_patching_writes_original_plus_delta_however_often(case, layout, dtype, backend, device):
    inputs = make_inputs(case, dtype, device=device)
    index, delta, weight = inputs.index, inputs.delta, laid_out(inputs.weight, layout)
    if backend in ("cpu", "cuda") and weight.stride(1) != 1 and weight.shape[1] != 1:
        with pytest.raises(nk.BackendError, match="along a row, expected 1"):
            ops.gather(weight, index)
        return
    original = ops.gather(weight, index)
    assert original.equal(entry_by_entry(inputs))
    assert weight.equal(inputs.weight)
    for scale in (1, 1, -3, 1000):
        ops.patch_(weight, index, delta * scale, original)
        assert weight.equal(nk.reference.merged_weight(inputs.weight, index, delta * scale))
    ops.unmerge_(weight, index, original)
    assert weight.equal(inputs.weight)


def test_patching_is_what_merging_writes(dtype, backend, device):
    inputs = make_inputs(Case(1, 30, 20, 4, index="ragged"), dtype, device=device)
    merged, patched = inputs.weight.clone(), inputs.weight.clone()
    original = ops.merge_(merged, inputs.index, inputs.delta)
    assert original.equal(ops.gather(patched, inputs.index))
    ops.patch_(patched, inputs.index, inputs.delta, original)
    assert patched.equal(merged)


def test_every_bit_comes_back(backend, device):
    """NaN, infinities, subnormal numbers and the negative zero among them."""
    bits = torch.arange(2**16, dtype=torch.int32, device=device).to(torch.int16).view(1024, 64)
    index = torch.arange(64, dtype=torch.int32, device=device).repeat(1024, 1)
    index[::3, 5] = -1
    for dtype in (torch.bfloat16, torch.float16):
        weight = bits.clone().view(dtype)
        original = ops.gather(weight, index)
        ops.patch_(weight, index, torch.ones(1024, 64, device=device), original)
        assert not weight.view(torch.int16).equal(bits)
        ops.unmerge_(weight, index, original)
        assert weight.view(torch.int16).equal(bits)


def test_slots_without_a_connection_write_nothing(backend, device):
    """Whatever their delta and original; column 0 is chosen in some rows, and infinite in all."""
    weight = torch.randn(6, 5, device=device)
    weight[:, 0] = float("inf")
    index = torch.tensor([[-1, -1], [0, -1], [-1, 3], [2, 0], [-1, 0], [4, 1]], dtype=torch.int32)
    index = index.to(device)
    delta = torch.where(index < 0, float("nan"), 1.0)
    original = ops.gather(weight, index).masked_fill(index < 0, float("nan"))
    expected = nk.reference.merged_weight(weight, index, delta)
    patched = weight.clone()
    ops.patch_(patched, index, delta, original)
    assert patched.equal(expected)
    ops.unmerge_(patched, index, original)
    assert patched.equal(weight)


@pytest.mark.parametrize("write", ["merge_", "patch_", "unmerge_"])
def test_a_backward_that_saved_the_weight_notices(write, backend, device):
    inputs = make_inputs(Case(3, 8, 6, 2), torch.float32, device=device)
    original = ops.gather(inputs.weight, inputs.index)
    x = inputs.x.clone().requires_grad_()
    y = torch.nn.functional.linear(x, inputs.weight)
    arguments = {
        "merge_": (inputs.delta,),
        "patch_": (inputs.delta, original),
        "unmerge_": (original,),
    }
    getattr(ops, write)(inputs.weight, inputs.index, *arguments[write])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


WRONG = {
    "index": (lambda t: t + 5, "index: column 9 is out of range for a weight with 8 inputs"),
    "delta": (lambda t: t[:, :1], "delta: shape [6, 1], expected [6, 2]"),
    "original": (lambda t: t.double(), "original: dtype differs from that of weight"),
    "weight": (lambda t: t[:5], "index: shape [6, 2], expected [5, 2]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named_and_nothing_is_written(name):
    if (reason := nk.available_backends()["cpu"]) is not None:
        pytest.skip(reason)
    given = {
        "weight": torch.full((6, 8), 7.0),
        "index": torch.tensor([[0, 4]] * 6, dtype=torch.int32),
        "delta": torch.ones(6, 2),
        "original": torch.ones(6, 2),
    }
    spoil, message = WRONG[name]
    given[name] = spoil(given[name])
    takes = {
        ops.patch_: ("weight", "index", "delta", "original"),
        ops.unmerge_: ("weight", "index", "original"),
        ops.gather: ("weight", "index"),
    }
    with nk.use_backend("cpu"):
        for op, names in takes.items():
            if name in names:
                with pytest.raises(RuntimeError) as raised:
                    op(*(given[n] for n in names))
                assert message in str(raised.value)
    assert (given["weight"] == 7).all()
