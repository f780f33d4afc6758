"""How exact the results are: beside the materialised scheme, for tiny updates, for NaN and Inf."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from gradients import bypass, differentiate, linear, linear_tensors
from torch import Tensor

import neuroada_kernels as nk
from neuroada_kernels import _extension, reference
from neuroada_kernels.functional import neuroada_bypass, neuroada_linear
from neuroada_kernels.testing import CASES, Case, Inputs, make_inputs

RAGGED = CASES[-1]  # 49 tokens, 90 to 72, k 8, single slots empty
INF, NAN = float("inf"), float("nan")


def squared_errors(inputs: Inputs) -> tuple[float, float]:
    """Of our output and of ``F.linear(x, round(W + delta))``, against float64."""
    x, weight, index, delta, bias = (
        inputs.x,
        inputs.weight,
        inputs.index,
        inputs.delta,
        inputs.bias,
    )
    wide_bias = None if bias is None else bias.double()
    exact = F.linear(x.double(), reference.merged_weight(weight.double(), index, delta), wide_bias)
    ours = neuroada_linear(x, weight, index, delta, bias)
    materialised = F.linear(x, reference.merged_weight(weight, index, delta), bias)
    return (
        (ours.double() - exact).square().sum().item(),
        (materialised.double() - exact).square().sum().item(),
    )


@functools.cache
def cached_inputs(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    return make_inputs(case, dtype, device=device)


# Where delta is far below W, both schemes round the same sum once and their errors are equal but
# for the draw. In float32 ours adds k + 1 terms more to d_in (the materialised sum has them inside
# W), each with a rounding of the accumulator: about 1 % at these shapes.
SLACK = {torch.float32: 1.02, torch.bfloat16: 1.01, torch.float16: 1.01}


def slack(dtype: torch.dtype, device: str, *, bias: bool) -> float:
    """On a GPU a sum with a float32 bias is rounded, and rounded again once the bypass is added.

    For a sum without a bias cuBLAS may take another kernel than F.linear does: on an H200 one that
    erred 1.58 times as much, as one chain of 64 products does beside four of 16.
    """
    return SLACK[dtype] * (2**0.5 if bias and device == "cuda" and dtype == torch.float32 else 1)


@pytest.mark.parametrize("dtype", SLACK, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("delta_to_weight", [0.001, 0.1, 1.0, 10.0])
def test_never_less_exact_than_the_materialised_weight(
    delta_to_weight, bias, dtype, backend, device
):
    ours = materialised = 0.0
    for tokens, d_in, d_out in ((64, 64, 512), (128, 256, 128), (64, 512, 64)):
        for k in (1, 8, 20):
            inputs = cached_inputs(Case(tokens, d_in, d_out, k, bias), dtype, device)
            delta = inputs.delta * (10 * delta_to_weight)  # a table's delta is a tenth of W
            errors = squared_errors(replace(inputs, delta=delta))
            ours, materialised = ours + errors[0], materialised + errors[1]
    assert (ours / materialised) ** 0.5 <= slack(dtype, device, bias=bias)


@pytest.mark.parametrize("d_in", [64, 256])
def test_a_bias_costs_a_float32_sum_no_more_than_one_rounding(d_in, backend, device):
    """A bias that is far larger than the bypass must not round each of its k products."""
    case = Case(tokens=128, d_in=d_in, d_out=256, k=20, bias=True)
    errors = [
        squared_errors(make_inputs(case, torch.float32, device=device, seed=seed))
        for seed in range(8)
    ]
    ours, materialised = (sum(column) for column in zip(*errors, strict=True))
    assert (ours / materialised) ** 0.5 <= slack(torch.float32, device, bias=True)


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_an_update_below_a_weights_last_place_acts(with_bias, backend, device):
    generator = torch.Generator().manual_seed(0)
    tokens, d_in, d_out = 8192, 64, 64
    sign = torch.randint(0, 2, (d_out, d_in), generator=generator) * 2.0 - 1
    weight = (sign * (0.0625 + 0.002 * torch.rand(d_out, d_in, generator=generator))).bfloat16()
    x = torch.randn(tokens, d_in, generator=generator).bfloat16()
    bias = torch.randn(d_out, generator=generator).bfloat16() if with_bias else None
    index = nk.select(weight, 1)
    delta = torch.full((d_out, 1), 1e-4)
    assert reference.merged_weight(weight, index, delta).equal(weight)

    x, weight, index, delta = (t.to(device) for t in (x, weight, index, delta))
    bias = None if bias is None else bias.to(device)
    still = neuroada_linear(x, weight, index, torch.zeros_like(delta), bias).double()
    moved = neuroada_linear(x, weight, index, delta, bias).double() - still
    expected = reference.bypass(x.double(), index, delta)
    # The share of the expected move that the output makes, by least squares over all tokens.
    share = (moved * expected).sum() / expected.square().sum()
    assert abs(share.item() - 1) < 0.05


def nonfinite(values: Tensor) -> Tensor:
    """Where NaN, +Inf and -Inf stand."""
    return torch.stack([values.isnan(), values.isposinf(), values.isneginf()])


def sprinkled(inputs: Inputs) -> Inputs:
    x, grad_output = inputs.x.clone(), inputs.grad_output.clone()
    for values in (x, grad_output):
        values[3, 0], values[5, 7], values[9, 2] = INF, -INF, NAN
        values[20, 30], values[21, 31] = INF, NAN
        values[-1, -1] = -INF
    return replace(inputs, x=x, grad_output=grad_output.flip(0, 1))


def exact_grad_delta(inputs: Inputs) -> Tensor:
    """``sum_t dy[t, j] x[t, index[j, s]]``, zero in a slot without a connection."""
    chosen = inputs.x.double()[:, inputs.index.clamp(min=0).long()]  # [tokens, d_out, k]
    sums = (inputs.grad_output.double()[..., None] * chosen).sum(0)
    return sums.masked_fill(inputs.index < 0, 0)


def test_nan_and_inf_come_out_of_the_linear_where_the_formula_has_them(dtype, backend, device):
    inputs = sprinkled(make_inputs(RAGGED, dtype, device=device))
    y, grad_x, grad_delta = differentiate(
        linear(inputs), linear_tensors(inputs), inputs.grad_output
    )
    x, weight, delta = inputs.x.double(), inputs.weight.double(), inputs.delta.double()
    exact = reference.neuroada_linear(x, weight, inputs.index, delta)
    transposed = torch.zeros_like(weight)
    row, slot = (inputs.index >= 0).nonzero(as_tuple=True)
    transposed[row, inputs.index[row, slot].long()] = delta[row, slot]
    grad = inputs.grad_output.double()
    # A neuron that did not choose a column contributes no product to it, not zero times Inf.
    exact_grad_x = grad @ weight + torch.stack(
        [grad[:, on] @ transposed[on, c] for c, on in enumerate((transposed != 0).unbind(1))], 1
    )
    assert nonfinite(y).equal(nonfinite(exact))
    assert nonfinite(grad_x).equal(nonfinite(exact_grad_x))
    assert nonfinite(grad_delta).equal(nonfinite(exact_grad_delta(inputs)))


def test_nan_and_inf_reach_only_the_bypasses_that_chose_them(dtype, backend, device):
    inputs = sprinkled(make_inputs(RAGGED, dtype, device=device))
    y = torch.zeros_like(inputs.grad_output)
    out, _, grad_x, grad_delta = differentiate(
        bypass(inputs), [y, inputs.x, inputs.delta], inputs.grad_output
    )
    spoiled_x, spoiled_grad = ~inputs.x.isfinite(), ~inputs.grad_output.isfinite()
    chosen = torch.zeros_like(inputs.weight, dtype=torch.bool)
    row, slot = (inputs.index >= 0).nonzero(as_tuple=True)
    chosen[row, inputs.index[row, slot].long()] = True
    spoiled_out = (spoiled_x.float() @ chosen.float().t()) > 0
    assert (~out.isfinite()).equal(spoiled_out)
    assert (~grad_x.isfinite()).equal((spoiled_grad.float() @ chosen.float()) > 0)
    assert nonfinite(grad_delta).equal(nonfinite(exact_grad_delta(inputs)))
    exact = reference.neuroada_bypass(y.double(), inputs.x.double(), inputs.index, inputs.delta)
    assert nonfinite(out).equal(nonfinite(exact))


def test_an_infinite_first_column_does_not_leak_through_empty_slots(dtype, backend, device):
    inputs = make_inputs(RAGGED, dtype, device=device)
    index = inputs.index.where(inputs.index != 0, -1)  # nobody chooses column 0
    index[3] = -1
    index[0] = -1
    delta = inputs.delta.masked_fill(index < 0, NAN)
    x, grad_output = inputs.x.clone(), inputs.grad_output.clone()
    y = grad_output.flip(0)
    plain = replace(inputs, index=index, delta=inputs.delta)
    expected = differentiate(bypass(plain), [y, x, plain.delta], grad_output)
    x[:, 0] = INF
    out, _, grad_x, grad_delta = differentiate(
        bypass(replace(plain, delta=delta)), [y, x, delta], grad_output
    )
    assert out.equal(expected[0])
    assert grad_x.equal(expected[2])
    assert grad_delta.equal(expected[3])


def test_an_unchosen_neurons_infinite_gradient_does_not_reach_x(dtype, backend, device):
    inputs = make_inputs(RAGGED, dtype, device=device)
    index = inputs.index.clone()
    index[0] = -1
    grad_output = inputs.grad_output.clone()
    grad_output[:, 0] = INF
    _, _, grad_x, grad_delta = differentiate(
        bypass(replace(inputs, index=index)),
        [torch.zeros_like(grad_output), inputs.x, inputs.delta],
        grad_output,
    )
    assert grad_x.isfinite().all()
    assert grad_delta.isfinite().all()


def test_zero_times_infinity_is_nan_while_delta_is_still_zero(backend, device):
    x = torch.tensor([[INF, 1.0]], device=device)
    index = torch.tensor([[0], [1]], dtype=torch.int32, device=device)
    out = neuroada_bypass(x.new_zeros(1, 2), x, index, x.new_zeros(2, 1))
    assert out.isnan().tolist() == [[True, False]]


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_autocast_computes_as_on_tensors_cast_by_hand(autocast, bias, backend, device):
    inputs = make_inputs(Case(33, 64, 48, 8, bias), torch.float32, device=device)
    low = replace(
        inputs,
        x=inputs.x.to(autocast),
        weight=inputs.weight.to(autocast),
        bias=None if inputs.bias is None else inputs.bias.to(autocast),
    )
    by_hand = linear(low)(*linear_tensors(low))
    with torch.autocast(device, dtype=autocast):
        y = linear(inputs)(*linear_tensors(inputs))
    assert y.dtype == autocast
    assert y.equal(by_hand)


LOWER_ISAS = (
    []
    if _extension.module is None or nk.available_backends()["cpu"] is not None
    else ["generic", *_extension.module.cpu_features()][:-1]
)


@pytest.mark.parametrize("isa", LOWER_ISAS)
def test_every_instruction_set_meets_the_tolerances(isa):
    """The widest one runs in this process; the lower ones go through the table in their own."""
    table = Path(__file__).parent / "test_functional.py"
    chosen = "cpu and formula and not no_plan"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, str(table)],
        env=os.environ | {"NEUROADA_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout


@pytest.mark.parametrize("isa", LOWER_ISAS)
def test_the_named_instruction_set_runs(isa):
    assert _cpu_isa(isa).stdout.strip() == isa


@pytest.mark.skipif(_extension.module is None, reason="the extension is not built")
def test_no_name_at_all_is_no_choice():
    assert _cpu_isa("").stdout.strip() in _extension.module.build_facts()["instruction_sets"]


@pytest.mark.skipif(_extension.module is None, reason="the extension is not built")
def test_an_instruction_set_that_cannot_run_is_refused():
    assert "NEUROADA_CPU_ISA: 'mmx' was not built" in _cpu_isa("mmx").stderr


def _cpu_isa(named: str) -> subprocess.CompletedProcess[str]:
    code = "from neuroada_kernels import _extension; print(_extension.module.cpu_isa())"
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"NEUROADA_CPU_ISA": named},
        capture_output=True,
        text=True,
        check=False,
    )
