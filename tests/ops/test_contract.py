"""What torch asks of an op: schema, fake, autograd, and one result whichever way it is called."""

from __future__ import annotations

import pytest
import torch
from gradients import bypass, differentiate, linear, linear_tensors
from torch import Tensor

import neuroada_kernels as nk
from neuroada_kernels.testing import CASES, Case, make_inputs

NEUROADA = torch.ops.neuroada
RAGGED_BIAS = Case(tokens=12, d_in=10, d_out=7, k=3, bias=True, index="ragged")
LEADING = [(), (12,), (3, 4)]
MASKS = [[True, True], [True, False], [False, True], [False, False]]

every_leading = pytest.mark.parametrize("leading", LEADING, ids=str)
grad_or_not = pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no_grad"])
planned_or_not = pytest.mark.parametrize("planned", [True, False], ids=["plan", "no_plan"])


def samples(
    leading: tuple[int, ...], requires_grad: bool, planned: bool, dtype: torch.dtype, device: str
) -> dict[str, Tensor | None]:
    """Arguments of all ops, by name, with the given leading dimensions."""
    tokens = torch.Size(leading).numel()
    inputs = make_inputs(Case(tokens, 10, 7, 3, bias=True, index="ragged"), dtype, device=device)

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.clone().requires_grad_(requires_grad)

    return {
        "x": leaf(inputs.x.view(*leading, 10)),
        "y": leaf(inputs.grad_output.flip(-1).view(*leading, 7)),
        "grad_output": leaf(inputs.grad_output.view(*leading, 7)),
        "weight": inputs.weight,
        "index": inputs.index,
        "delta": leaf(inputs.delta),
        "bias": leaf(inputs.bias),
        "plan": nk.make_plan(inputs.index, 10) if planned else None,
    }


def opcheck(op: torch._ops.OpOverload, *args: object) -> None:
    torch.library.opcheck(op, args)


@every_leading
@grad_or_not
@planned_or_not
@pytest.mark.parametrize("biased", [True, False], ids=["bias", ""])
def test_linear(leading, requires_grad, planned, biased, backend, device):
    a = samples(leading, requires_grad, planned, torch.float32, device)
    bias = a["bias"] if biased else None
    opcheck(NEUROADA.linear.default, a["x"], a["weight"], a["index"], a["delta"], bias, a["plan"])


@every_leading
@grad_or_not
@planned_or_not
def test_bypass_add(leading, requires_grad, planned, backend, device):
    a = samples(leading, requires_grad, planned, torch.float32, device)
    opcheck(NEUROADA.bypass_add.default, a["y"], a["x"], a["index"], a["delta"], a["plan"])


@every_leading
@pytest.mark.parametrize("mask", MASKS, ids=str)
@planned_or_not
def test_the_backward_ops(leading, mask, planned, backend, device):
    # Nothing requires grad: differentiating these ops is refused, which is tested elsewhere.
    a = samples(leading, False, planned, torch.float32, device)
    shared = (a["index"], a["delta"], a["plan"], mask)
    opcheck(NEUROADA.linear_backward.default, a["grad_output"], a["x"], a["weight"], *shared)
    opcheck(NEUROADA.bypass_backward.default, a["grad_output"], a["x"], *shared)


def test_sixteen_bits(backend, device):
    a = samples((3, 4), True, True, torch.bfloat16, device)
    assert a["delta"].dtype == torch.float32
    shared = (a["index"], a["delta"])
    opcheck(NEUROADA.linear.default, a["x"], a["weight"], *shared, a["bias"], a["plan"])
    opcheck(NEUROADA.bypass_add.default, a["y"], a["x"], *shared, a["plan"])


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_layouts(layout, backend, device):
    a = samples((12,), False, True, torch.float32, device)
    x = {
        "transposed": a["x"].t().contiguous().t(),
        "strided": torch.stack([a["x"]] * 2, -1)[..., 0],
        "expanded": a["x"][:1].expand(12, 10),
    }[layout]
    rest = (a["index"], a["delta"])
    opcheck(NEUROADA.linear.default, x, a["weight"], *rest, None, a["plan"])
    opcheck(NEUROADA.bypass_add.default, a["y"], x, *rest, a["plan"])
    mask = [True, True]
    opcheck(NEUROADA.linear_backward.default, a["y"], x, a["weight"], *rest, a["plan"], mask)


def test_merging_and_unmerging(dtype, backend, device):
    a = samples((12,), False, False, dtype, device)
    opcheck(NEUROADA.merge_.default, a["weight"].clone(), a["index"], a["delta"])
    original = NEUROADA.merge_(a["weight"].clone(), a["index"], a["delta"])
    opcheck(NEUROADA.unmerge_.default, a["weight"].clone(), a["index"], original)
    opcheck(NEUROADA.gather.default, a["weight"], a["index"])
    opcheck(NEUROADA.patch_.default, a["weight"].clone(), a["index"], a["delta"], original)


def test_a_fake_says_what_the_real_ops_return(dtype, backend, device):
    a = samples((3, 4), False, True, dtype, device)
    shared = (a["index"], a["delta"])
    calls = {
        NEUROADA.linear: (a["x"], a["weight"], *shared, a["bias"], a["plan"]),
        NEUROADA.bypass_add: (a["y"], a["x"], *shared, a["plan"]),
        NEUROADA.merge_: (a["weight"].clone(), *shared),
        NEUROADA.gather: (a["weight"], a["index"]),
    } | {
        op: (*first, *shared, a["plan"], mask)
        for mask in MASKS[:1]
        for op, first in (
            (NEUROADA.linear_backward, (a["grad_output"], a["x"], a["weight"])),
            (NEUROADA.bypass_backward, (a["grad_output"], a["x"])),
        )
    }
    for op, arguments in calls.items():
        real = op(*arguments)
        meta = op(*(t.to("meta") if isinstance(t, Tensor) else t for t in arguments))
        for r, m in zip(
            *((out if isinstance(out, tuple) else (out,)) for out in (real, meta)), strict=True
        ):
            assert (r.shape, r.dtype, r.stride()) == (m.shape, m.dtype, m.stride())


@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[4], CASES[-1]], ids=lambda c: c.name)
@planned_or_not
def test_the_short_way_and_the_dispatcher_give_the_same_bits(case, planned, dtype, backend, device):
    inputs = make_inputs(case, dtype, device=device)
    plan = nk.make_plan(inputs.index, case.d_in) if planned else None
    y = inputs.grad_output.flip(0)

    def linear_op(x: Tensor, delta: Tensor, bias: Tensor | None = None) -> Tensor:
        return NEUROADA.linear.default(x, inputs.weight, inputs.index, delta, bias, plan)

    def bypass_op(y: Tensor, x: Tensor, delta: Tensor) -> Tensor:
        return NEUROADA.bypass_add.default(y, x, inputs.index, delta, plan)

    for short, op, tensors in (
        (linear(inputs, plan), linear_op, linear_tensors(inputs)),
        (bypass(inputs, plan), bypass_op, [y, inputs.x, inputs.delta]),
    ):
        results = differentiate(short, tensors, inputs.grad_output)
        expected = differentiate(op, tensors, inputs.grad_output)
        assert all(r.equal(e) for r, e in zip(results, expected, strict=True))
        with torch.no_grad():
            assert short(*tensors).equal(results[0])
