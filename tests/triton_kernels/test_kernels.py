"""Each Triton kernel against its formula in float64: on a GPU, or in Triton's interpreter.

Run as ``TRITON_INTERPRET=1 python -m pytest tests/triton_kernels/test_kernels.py``; without a GPU
or the interpreter there is nothing to run the kernels on.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import neuroada_kernels as nk
from neuroada_kernels.plan import plan_parts
from neuroada_kernels.testing import CASES, Case, Inputs, make_inputs, rms_error, tolerance

pytestmark = pytest.mark.on_backend
unavailable = nk.available_backends()["triton"]
if unavailable is not None:
    pytest.skip(unavailable, allow_module_level=True)

from neuroada_kernels.backends import triton as backend  # noqa: E402
from neuroada_kernels.backends.triton import _kernels  # noqa: E402
from neuroada_kernels.triton_kernels import configs  # noqa: E402

kernels = _kernels()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NARROW = [torch.float32, torch.bfloat16, torch.float16]  # that the one-kernel product serves
every_case = pytest.mark.parametrize(
    "case", [c for c in CASES if c.tokens], ids=lambda case: case.name
)
narrow = pytest.mark.parametrize("dtype", NARROW, ids=str)


def inputs_of(case: Case, dtype: torch.dtype) -> Inputs:
    return make_inputs(case, dtype, device=DEVICE)


def poisoned(*shape: int, like: Tensor) -> Tensor:
    """What a kernel has to overwrite wholly: a place left out is found as NaN."""
    return torch.full(shape, float("nan"), dtype=like.dtype, device=like.device)


def bypass(x: Tensor, index: Tensor, delta: Tensor) -> Tensor:
    return nk.reference.bypass(x.double(), index, delta.double())


def bypass_gradients(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """dx of the bypass alone, and ddelta, in float64."""
    x, delta = (t.double().requires_grad_() for t in (inputs.x, inputs.delta))
    out = nk.reference.bypass(x, inputs.index, delta)
    grad_x, grad_delta = torch.autograd.grad(out, (x, delta), inputs.grad_output.double())
    return grad_x, grad_delta


def linear_fwd(inputs: Inputs, **options: object) -> Tensor:
    y = poisoned(inputs.x.shape[0], inputs.weight.shape[0], like=inputs.x)
    x_t = kernels.transpose(inputs.x)
    index, delta = inputs.index, inputs.delta
    kernels.linear_fwd(inputs.x, inputs.weight, x_t, index, delta, inputs.bias, y, **options)
    return y


def linear_bwd_input(inputs: Inputs, **options: object) -> Tensor:
    grad_x = poisoned(*inputs.x.shape, like=inputs.x)
    grad_t = kernels.transpose(inputs.grad_output)
    plan = plan_of(inputs)
    rest = (plan.column_start, plan.entry, inputs.delta, grad_x)
    kernels.linear_bwd_input(inputs.grad_output, inputs.weight, grad_t, *rest, **options)
    return grad_x


def bypass_bwd_input(inputs: Inputs, **options: object) -> Tensor:
    grad_x = poisoned(*inputs.x.shape, like=inputs.x)
    grad_t = kernels.transpose(inputs.grad_output)
    kernels.bypass_bwd_input(grad_t, *plan_of(inputs), inputs.delta, grad_x, **options)
    return grad_x


def sddmm(inputs: Inputs, **options: object) -> Tensor:
    partial = kernels.sddmm_partial(inputs.index, inputs.x.shape[0], inputs.x.dtype)
    x_t, grad_t = kernels.transpose(inputs.x), kernels.transpose(inputs.grad_output)
    kernels.sddmm(x_t, grad_t, inputs.index, partial, **options)
    return partial.sum(0).view(inputs.index.shape)


def plan_of(inputs: Inputs) -> nk.plan.PlanParts:
    d_in = inputs.weight.shape[1]
    return plan_parts(nk.make_plan(inputs.index, d_in), d_in)


@pytest.mark.parametrize("layout", ["rows", "columns", "every_second", "expanded", "offset"])
@pytest.mark.parametrize("shape", [(1, 1), (17, 67), (128, 64), (130, 5)], ids=str)
def test_transpose_pads_with_zeros_whatever_the_strides(layout, shape, dtype):
    base = torch.randn(2 * shape[0], 2 * shape[1], device=DEVICE).to(dtype)
    x = {
        "rows": base[: shape[0], : shape[1]],
        "columns": base.t()[: shape[1], : shape[0]].t(),
        "every_second": base[::2, ::2],
        "expanded": base[:1, : shape[1]].expand(shape),
        "offset": base[shape[0] :, 1 : shape[1] + 1],
    }[layout]
    x_t = kernels.transpose(x)
    assert x_t.shape[1] % configs.padding(shape[0]) == 0
    assert x_t[:, : shape[0]].equal(x.t())
    assert not x_t[:, shape[0] :].any()


@every_case
def test_bypass_fwd(case, dtype):
    inputs = inputs_of(case, dtype)
    truth = bypass(inputs.x, inputs.index, inputs.delta)
    x_t, onto = kernels.transpose(inputs.x), inputs.grad_output
    y = poisoned(*onto.shape, like=onto)
    kernels.bypass_fwd(x_t, inputs.index, inputs.delta, y)
    assert rms_error(y, truth) <= tolerance(dtype, case.k)
    kernels.bypass_fwd(x_t, inputs.index, inputs.delta, y, onto=onto, bias=inputs.bias)
    bias = 0 if inputs.bias is None else inputs.bias.double()
    assert rms_error(y, truth + onto.double() + bias) <= tolerance(dtype, case.k + 2)


def test_the_bypass_is_added_onto_rows_of_any_stride():
    inputs = inputs_of(Case(tokens=70, d_in=40, d_out=50, k=3), torch.float32)
    truth = bypass(inputs.x, inputs.index, inputs.delta)
    x_t, base = kernels.transpose(inputs.x), torch.randn(140, 60, device=DEVICE)
    target = torch.full((70, 64), float("nan"), device=DEVICE)
    for onto in (base[::2, 3:53], base[:1, :50].expand(70, 50)):
        y = target[:, 7:57]
        kernels.bypass_fwd(x_t, inputs.index, inputs.delta, y, onto=onto)
        assert rms_error(y, truth + onto.double()) <= tolerance(torch.float32, 4)
    assert target[:, :7].isnan().all()
    assert target[:, 57:].isnan().all()


@every_case
def test_bypass_bwd_input(case, dtype):
    inputs = inputs_of(case, dtype)
    truth, _ = bypass_gradients(inputs)
    assert rms_error(bypass_bwd_input(inputs), truth) <= tolerance(dtype, case.d_out * case.k)


@pytest.mark.parametrize("onto_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bypass_of_dx_is_added_onto_rows_of_any_stride(onto_dtype):
    inputs = inputs_of(Case(tokens=70, d_in=40, d_out=50, k=3), torch.float32)
    truth, _ = bypass_gradients(inputs)
    base = torch.randn(140, 60, device=DEVICE).to(onto_dtype)
    for onto in (base[::2, 3:43], base[:1, :40].expand(70, 40)):
        grad_x = bypass_bwd_input(inputs, onto=onto)
        assert rms_error(grad_x, truth + onto.double()) <= tolerance(torch.float32, 151)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_wide_sum_is_rounded_once(bias_dtype, dtype):
    """A bypass below the last place of what it is added to: rounded before, it would be lost."""
    inputs = inputs_of(Case(tokens=70, d_in=40, d_out=50, k=3), dtype)
    inputs.delta.mul_(0.01)
    bias = torch.randn(50, device=DEVICE).to(bias_dtype)
    wide_y, wide_x = (torch.randn(t.shape, device=DEVICE) for t in (inputs.grad_output, inputs.x))
    y = poisoned(70, 50, like=inputs.x)
    x_t = kernels.transpose(inputs.x)
    kernels.bypass_fwd(x_t, inputs.index, inputs.delta, y, onto=wide_y, bias=bias)
    sums = {
        "y": (y, bypass(inputs.x, inputs.index, inputs.delta) + wide_y + bias.double()),
        "dx": (bypass_bwd_input(inputs, onto=wide_x), bypass_gradients(inputs)[0] + wide_x),
    }
    for name, (found, exact) in sums.items():
        half_a_place = exact.abs() * torch.finfo(dtype).eps / 2
        assert ((found.double() - exact).abs() <= half_a_place + 1e-6).all(), name


@every_case
def test_sddmm(case, dtype):
    inputs = inputs_of(case, dtype)
    _, truth = bypass_gradients(inputs)
    assert rms_error(sddmm(inputs), truth) <= tolerance(dtype, case.tokens, inputs.delta.dtype)


@every_case
@narrow
def test_linear_fwd(case, dtype):
    inputs = inputs_of(case, dtype)
    bias = 0 if inputs.bias is None else inputs.bias.double()
    truth = inputs.x.double() @ inputs.weight.double().t() + bias
    truth += bypass(inputs.x, inputs.index, inputs.delta)
    assert rms_error(linear_fwd(inputs), truth) <= tolerance(dtype, case.d_in + case.k)


@every_case
@narrow
def test_linear_bwd_input(case, dtype):
    inputs = inputs_of(case, dtype)
    truth = inputs.grad_output.double() @ inputs.weight.double() + bypass_gradients(inputs)[0]
    allowed = tolerance(dtype, case.d_out * (1 + case.k))
    assert rms_error(linear_bwd_input(inputs), truth) <= allowed


@pytest.mark.parametrize("strides", ["columns", "every_second", "offset"])
def test_the_products_take_any_strides(strides):
    case = Case(tokens=33, d_in=48, d_out=80, k=2)
    plain = inputs_of(case, torch.float32)

    def view(matrix: Tensor) -> Tensor:
        if strides == "columns":
            return matrix.t().contiguous().t()
        if strides == "every_second":
            return torch.stack([matrix, torch.zeros_like(matrix)], 2).flatten(1)[:, ::2]
        return torch.cat([torch.zeros_like(matrix[:, :1]), matrix], 1)[:, 1:]

    viewed = replace(
        plain, x=view(plain.x), weight=view(plain.weight), grad_output=view(plain.grad_output)
    )
    assert viewed.x.stride() != plain.x.stride()
    # Close, not equal: on a GPU other strides may make other code, which sums in another order.
    torch.testing.assert_close(linear_fwd(viewed), linear_fwd(plain))
    torch.testing.assert_close(linear_bwd_input(viewed), linear_bwd_input(plain))


@pytest.mark.parametrize("count", [0, 1, 5, 6, 7, 31, 32, 33, 70])
@pytest.mark.parametrize("call", [bypass_bwd_input, linear_bwd_input])
def test_light_and_heavy_columns_are_summed_alike(count, call):
    """A column chosen by ``count`` neurons, on either side of the 6 that a light one may have."""
    inputs = inputs_of(Case(tokens=17, d_in=32, d_out=70, k=1), torch.float32)
    inputs.index[:] = torch.arange(70, device=DEVICE)[:, None] % 31
    inputs.index[:count] = 31
    if call is linear_bwd_input:
        inputs.weight.zero_()
        (config,) = configs.gemm_configs(17, torch.float32, configs.H200)[:1]
    else:
        (config,) = configs.transposed_configs(17, torch.float32)[:1]
    config = replace(config, rounds=4, block_e=16)
    assert config.most_light(70, 32) == 6
    truth, _ = bypass_gradients(inputs)
    result = call(inputs, config=config)
    assert rms_error(result, truth) <= tolerance(torch.float32, 70)


@pytest.mark.parametrize("tokens", [5, 40, 130])
def test_every_config_gives_the_same_result(tokens):
    case = Case(tokens=tokens, d_in=80, d_out=72, k=3, bias=True, index="random")
    inputs = inputs_of(case, torch.float32)
    x_t = kernels.transpose(inputs.x)
    tables = {
        bypass_bwd_input: configs.transposed_configs(tokens, torch.float32),
        sddmm: configs.sddmm_configs(tokens, torch.float32),
        linear_fwd: configs.gemm_configs(tokens, torch.float32, configs.H200),
        linear_bwd_input: configs.gemm_configs(tokens, torch.float32, configs.H200),
    }
    for call, candidates in tables.items():
        assert len(candidates) > 1
        first, *others = (call(inputs, config=config) for config in candidates)
        for other in others:
            torch.testing.assert_close(other, first)
    first = None
    for config in configs.bypass_configs(tokens, torch.float32):
        y = poisoned(tokens, case.d_out, like=inputs.x)
        kernels.bypass_fwd(x_t, inputs.index, inputs.delta, y, config=config)
        first = y if first is None else first
        assert y.equal(first)


def test_few_programs_share_all_tiles():
    inputs = inputs_of(Case(tokens=130, d_in=48, d_out=300, k=2), torch.float32)
    gpu = replace(configs.H200, multiprocessors=2)
    (config,) = configs.gemm_configs(130, torch.float32, gpu)[:1]
    assert config.programs(130, 300) == 2
    assert linear_fwd(inputs, config=config).equal(linear_fwd(inputs))
    assert linear_bwd_input(inputs, config=config).equal(linear_bwd_input(inputs))


@pytest.mark.parametrize("group_m", [1, 2, 3])
def test_groups_of_rows_cover_every_tile_once(group_m):
    """Three rows of tiles in groups of two leave a last group that is lower."""
    inputs = inputs_of(Case(tokens=300, d_in=140, d_out=150, k=2), torch.float32)
    (config,) = configs.gemm_configs(300, torch.float32, configs.H200)[:1]
    assert (config.block_m, config.block_n) == (128, 128)
    grouped = replace(config, group_m=group_m)
    assert linear_fwd(inputs, config=grouped).equal(linear_fwd(inputs))
    assert linear_bwd_input(inputs, config=grouped).equal(linear_bwd_input(inputs))


@pytest.mark.parametrize("fused", ["0", "1"])
def test_chunks_of_tokens_change_nothing(fused, monkeypatch):
    case = Case(tokens=300, d_in=48, d_out=40, k=2)
    inputs = inputs_of(case, torch.float32)
    monkeypatch.setenv("NEUROADA_TRITON_FUSED", fused)
    whole = gradients(inputs)
    monkeypatch.setattr(configs, "WORKSPACE_BYTES", 1)
    assert configs.tokens_per_chunk(case.d_in * 4) == 128
    chunked = gradients(inputs)
    torch.testing.assert_close(chunked, whole)


def test_parts_of_the_wide_product_change_nothing(monkeypatch):
    """A kernel adds to each part; ddelta's sums follow the chunks, which are the same."""
    case = Case(tokens=300, d_in=48, d_out=40, k=2, bias=True)
    inputs = inputs_of(case, torch.bfloat16)
    monkeypatch.setenv("NEUROADA_TRITON_FUSED", "0")
    made, product = [], backend.wide_product

    def watched(x: Tensor, weight: Tensor) -> Tensor:
        made.append(x.shape[0])
        return product(x, weight)

    monkeypatch.setattr(backend, "wide_product", watched)
    whole = gradients(inputs)
    assert made == [300, 300]
    monkeypatch.setattr(configs, "WIDE_BYTES", 1)
    parts = gradients(inputs)
    assert made[2:] == [128, 128, 44] * 2
    assert parts[2].equal(whole[2])
    for part, one in zip(parts, whole, strict=True):
        # Close, not equal: torch may sum a product of other sizes in another order.
        assert rms_error(part, one.double()) <= tolerance(torch.bfloat16, 48)


def gradients(inputs: Inputs) -> tuple[Tensor, ...]:
    x, delta = (t.clone().requires_grad_() for t in (inputs.x, inputs.delta))
    with nk.use_backend("triton"):
        y = nk.functional.neuroada_linear(x, inputs.weight, inputs.index, delta, inputs.bias)
        return y, *torch.autograd.grad(y, (x, delta), inputs.grad_output)


def test_parts_of_tokens_add_up_and_accumulate():
    inputs = inputs_of(Case(tokens=300, d_in=40, d_out=24, k=2), torch.float32)
    _, truth = bypass_gradients(inputs)
    x_t, grad_t = kernels.transpose(inputs.x), kernels.transpose(inputs.grad_output)
    for parts in (1, 2, 3, 7):
        partial = torch.zeros(parts, 48, device=DEVICE)
        kernels.sddmm(x_t, grad_t, inputs.index, partial)
        kernels.sddmm(x_t, grad_t, inputs.index, partial)
        total = partial.sum(0).view(24, 2)
        assert rms_error(total, 2 * truth) <= tolerance(torch.float32, 300)


def test_each_part_of_the_tokens_has_its_own_sums():
    """Programs that shared a place would be right one after the other, and race on a GPU."""
    inputs = inputs_of(Case(tokens=300, d_in=40, d_out=24, k=2), torch.float32)
    x_t, grad_t = kernels.transpose(inputs.x), kernels.transpose(inputs.grad_output)
    partial = torch.zeros(3, 48, device=DEVICE)
    kernels.sddmm(x_t, grad_t, inputs.index, partial)
    for part, tokens in enumerate((slice(0, 128), slice(128, 256), slice(256, 300))):
        chosen = inputs.x[tokens][:, inputs.index.long()].double()  # [tokens, d_out, k]
        truth = (inputs.grad_output[tokens].double()[..., None] * chosen).sum(0)
        assert rms_error(partial[part].view(24, 2), truth) <= tolerance(torch.float32, 128)


def test_columns_out_of_range_and_empty_slots_read_nothing():
    inputs = inputs_of(Case(tokens=17, d_in=16, d_out=24, k=3), torch.float32)
    inputs.index[:, 1] = -1
    inputs.index[::2, 2] = 2**31 - 1
    inputs.delta[:, 1] = float("nan")
    kept = replace(inputs, delta=inputs.delta.clone(), index=inputs.index.clone())
    kept.index[::2, 2] = -1
    truth = bypass(inputs.x, kept.index, kept.delta.nan_to_num(0))
    y = poisoned(17, 24, like=inputs.x)
    kernels.bypass_fwd(kernels.transpose(inputs.x), inputs.index, inputs.delta, y)
    assert rms_error(y, truth) <= tolerance(torch.float32, 3)
    grad_delta = sddmm(inputs)
    assert not grad_delta[:, 1].any()
    assert not grad_delta[::2, 2].any()
    weight = torch.zeros(24, 16, device=DEVICE)
    original = kernels.merge(weight, inputs.index, inputs.delta)
    assert not original.any()
    kernels.patch(weight, inputs.index, inputs.delta, original)
    assert weight.isfinite().all()


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_merge_is_rounded_once_and_taken_back_bit_for_bit(layout, dtype):
    case = Case(tokens=1, d_in=67, d_out=301, k=5, index="ragged")
    inputs = inputs_of(case, dtype)
    weight = inputs.weight if layout == "rows" else inputs.weight.t().contiguous().t()
    before = weight.clone()
    original = kernels.merge(weight, inputs.index, inputs.delta)
    assert weight.equal(nk.reference.merged_weight(before, inputs.index, inputs.delta))
    for delta in (-inputs.delta, inputs.delta, inputs.delta):
        kernels.patch(weight, inputs.index, delta, original)
        assert weight.equal(nk.reference.merged_weight(before, inputs.index, delta))
    kernels.unmerge(weight, inputs.index, original)
    assert weight.equal(before)


def test_infinities_come_out_where_the_mathematics_puts_them():
    inputs = inputs_of(Case(tokens=17, d_in=16, d_out=24, k=2, index="random"), torch.float32)
    inputs.x[3, int(inputs.index[5, 1])] = float("inf")
    y = poisoned(17, 24, like=inputs.x)
    kernels.bypass_fwd(kernels.transpose(inputs.x), inputs.index, inputs.delta, y)
    truth = bypass(inputs.x, inputs.index, inputs.delta)
    assert not y[3, 5].isfinite()
    assert y.isfinite().equal(truth.isfinite())


@pytest.mark.skipif(DEVICE == "cuda", reason="about the interpreter")
def test_the_interpreter_rounds_to_the_nearest_bfloat16():
    x = torch.tensor(
        [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3.14159, 1.99999, float("nan")]
    )
    weight, index = torch.zeros(6, 1, dtype=torch.bfloat16), torch.zeros(6, 1, dtype=torch.int32)
    kernels.merge(weight, index, x[:, None])
    torch.testing.assert_close(weight[:, 0], x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_nothing_differs_from_run_to_run():
    inputs = inputs_of(Case(tokens=70, d_in=40, d_out=50, k=8), torch.bfloat16)
    first = gradients(inputs)
    for _ in range(20 if DEVICE == "cuda" else 2):
        assert all(a.equal(b) for a, b in zip(first, gradients(inputs), strict=True))
