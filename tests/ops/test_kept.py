"""The columns of x that are saved in its stead: the same bits, and nothing else of x."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import neuroada_kernels as nk
from neuroada_kernels import ops
from neuroada_kernels.plan import chosen_columns, make_plan, renumber
from neuroada_kernels.testing import CASES, Case, Inputs, make_inputs

NEUROADA = torch.ops.neuroada
#: Of the shared table those that leave columns out and are small.
SOME = [CASES[i] for i in (0, 2, 5, 15, 16)]
#: Large enough that kernels stage the columns in other blocks than x, unless told how wide it was.
WIDE = Case(tokens=300, d_in=5000, d_out=40, k=2, bias=True, index="ragged")
#: So many bypasses that a kernel which chooses by the shape would choose otherwise for the columns:
#: with AMX, and without.
BETWEEN = [Case(tokens=40, d_in=100, d_out=40, k=k, index="ragged") for k in (6, 3)]


def kept_of(inputs: Inputs) -> tuple[Tensor, Tensor]:
    columns = chosen_columns([inputs.index], inputs.x.shape[1])
    assert len(columns) < inputs.x.shape[1]
    return inputs.x[:, columns], renumber(inputs.index, columns)


@pytest.mark.parametrize(
    ("d_in", "chosen", "kept"),
    [
        (1024, [3, 9, 40], [0, 1, 2, 3, 4, 5, 9, 40]),  # filled up to 8
        (1024, list(range(8, 24)), list(range(8, 24))),  # 16 already
        (1026, [3, 9, 40], [3, 9, 40]),  # rows of x are no multiple either
        (
            1024,
            list(range(1, 1018)),
            list(range(1, 1018)),
        ),  # all of x would be no copy of some of it
        (1024, [], list(range(8))),
        (1016, [3, 9, 40], [3, 9, 40]),  # few
    ],
)
def test_columns_fill_units_of_eight(d_in, chosen, kept):
    index = torch.tensor([[*chosen, -1]], dtype=torch.int32)
    columns = chosen_columns([index], d_in)
    assert columns.tolist() == kept
    assert columns[renumber(index, columns)[index >= 0].long()].tolist() == chosen


def linear(inputs: Inputs, plan: Tensor, op: Callable[..., Tensor], *kept: Tensor):
    return lambda x, delta: op(x, inputs.weight, inputs.index, delta, inputs.bias, plan, *kept)


def resident(inputs: Inputs, plan: Tensor, op: Callable[..., Tensor], *kept: Tensor):
    return lambda x, delta: op(x, inputs.weight, inputs.index, delta, inputs.bias, *kept)


def bypass(inputs: Inputs, plan: Tensor, op: Callable[..., Tensor], *kept: Tensor):
    y = inputs.grad_output.flip(0)
    return lambda x, delta: op(y, x, inputs.index, delta, plan, *kept)


OPS = {
    "linear": (linear, ops.linear),
    "linear dispatched": (linear, NEUROADA.linear.default),
    "resident": (resident, ops.resident_linear),
    "bypass_add": (bypass, ops.bypass_add),
    "bypass_add dispatched": (bypass, NEUROADA.bypass_add.default),
}


def differentiate(function, inputs: Inputs, need_x: bool) -> list[Tensor]:
    x = inputs.x.clone().requires_grad_(need_x)
    delta = inputs.delta.clone().requires_grad_()
    y = function(x, delta)
    leaves = [x, delta] if need_x else [delta]
    return [y.detach(), *torch.autograd.grad(y, leaves, inputs.grad_output)]


@pytest.mark.parametrize("case", [*SOME, WIDE, *BETWEEN], ids=lambda case: case.name)
@pytest.mark.parametrize("name", OPS)
def test_gradients_are_the_same_bits(name, case, dtype, backend, device):
    if backend == "triton" and device == "cpu" and (case is WIDE or "dispatched" in name):
        pytest.skip("Triton's interpreter would take minutes")
    inputs = make_inputs(case, dtype, device=device)
    plan = make_plan(inputs.index, case.d_in)
    make, op = OPS[name]
    for need_x in (True, False):
        expected = differentiate(make(inputs, plan, op), inputs, need_x)
        results = differentiate(make(inputs, plan, op, *kept_of(inputs)), inputs, need_x)
        assert all(r.equal(e) for r, e in zip(results, expected, strict=True))


@pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("leading", [(12,), (3, 4)], ids=str)
def test_the_ops_do_as_torch_asks(leading, requires_grad, backend, device):
    case = Case(12, 10, 7, 1, bias=True, index="ragged")
    inputs = make_inputs(case, torch.float32, device=device)
    kept, kept_index = kept_of(inputs)
    x, kept, y = (t.view(*leading, -1) for t in (inputs.x, kept, inputs.grad_output))
    x, delta = (t.clone().requires_grad_(requires_grad) for t in (x, inputs.delta))
    rest, plan = (inputs.index, delta), make_plan(inputs.index, case.d_in)
    opcheck = torch.library.opcheck
    opcheck(NEUROADA.linear.default, (x, inputs.weight, *rest, inputs.bias, plan, kept, kept_index))
    opcheck(NEUROADA.bypass_add.default, (y, x, *rest, plan, kept, kept_index))
    if requires_grad:  # differentiating the ops below is refused
        return
    for mask in ([True, True], [True, False], [False, True]):
        saved = kept if mask[1] else None
        opcheck(
            NEUROADA.linear_backward.default,
            (y, saved, inputs.weight, *rest, plan, mask, kept_index),
        )
        opcheck(
            NEUROADA.bypass_backward.default,
            (y, saved, *rest, plan, mask, kept_index, case.d_in),
        )


def saved_by(function: Callable[[], Tensor]) -> list[Tensor]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        assert function().requires_grad
    return saved


@pytest.mark.parametrize("name", OPS)
def test_of_x_the_columns_alone_are_saved_and_nothing_where_delta_is_frozen(name, backend, device):
    inputs = make_inputs(SOME[0], torch.float32, device=device)
    kept, kept_index = kept_of(inputs)
    make, op = OPS[name]
    function = make(inputs, make_plan(inputs.index, 64), op, kept, kept_index)
    x = inputs.x.clone().requires_grad_()
    pointers = [t.data_ptr() for t in saved_by(lambda: function(x, inputs.delta.requires_grad_()))]
    assert x.data_ptr() not in pointers
    assert pointers.count(kept.data_ptr()) == 1

    for some in ((), (kept, kept_index)):
        function = make(inputs, make_plan(inputs.index, 64), op, *some)
        saved = saved_by(lambda: function(x, inputs.delta.detach()))  # noqa: B023
        assert not {t.data_ptr() for t in saved} & {x.data_ptr(), kept.data_ptr()}


def test_what_does_not_fit_is_refused():
    inputs = make_inputs(SOME[0], torch.float32)
    kept, kept_index = kept_of(inputs)
    x, delta = inputs.x, inputs.delta.requires_grad_()
    for wrong, words in (
        ((kept, None), "kept_index: missing"),
        ((None, kept_index), "kept: missing"),
        ((kept[:3], kept_index), r"kept: .* shape \[3, .*expected .*\[17, 'columns'\]"),
        ((kept.double(), kept_index), "kept: torch.float64"),
    ):
        for op in (ops.linear, NEUROADA.linear.default):
            with pytest.raises(ValueError, match=words):
                op(x, inputs.weight, inputs.index, delta, None, None, *wrong)


def test_a_backward_without_what_it_needs_is_refused():
    inputs = make_inputs(SOME[0], torch.float32)
    grad, rest = inputs.grad_output, (inputs.index, inputs.delta, None)
    with pytest.raises(ValueError, match="x: missing, expected it where the gradient of delta"):
        NEUROADA.linear_backward(grad, None, inputs.weight, *rest, [True, True])
    with pytest.raises(ValueError, match="x: missing, expected it where the gradient of delta"):
        NEUROADA.bypass_backward(grad, None, *rest, [True, True], None, 64)
    with pytest.raises(ValueError, match="d_in: missing, expected the number of inputs"):
        NEUROADA.bypass_backward(grad, None, *rest, [True, False])


def test_the_compiled_kernel_refuses_a_width_below_that_of_x():
    if nk.available_backends()["cpu"] is not None:
        pytest.skip("the compiled kernels are missing")
    inputs = make_inputs(SOME[0], torch.float32)
    with pytest.raises(RuntimeError, match="d_in: 63, expected at least the 64 columns of x"):
        torch.ops.neuroada_C.sddmm(inputs.grad_output, inputs.x, inputs.index, 63)
    with pytest.raises(
        RuntimeError, match="d_in: 4611686018427387904, expected at most 2147483647"
    ):
        torch.ops.neuroada_C.sddmm(inputs.grad_output, inputs.x, inputs.index, 1 << 62)
