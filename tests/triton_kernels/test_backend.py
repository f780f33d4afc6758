"""The backend around the kernels: layouts that callers bring, empty matrices, and the workspace."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

import neuroada_kernels as nk
from neuroada_kernels.testing import Case, Inputs, make_inputs, rms_error, tolerance

pytestmark = pytest.mark.on_backend
unavailable = nk.available_backends()["triton"]
if unavailable is not None:
    pytest.skip(unavailable, allow_module_level=True)

from neuroada_kernels.backends.triton import _kernels  # noqa: E402
from neuroada_kernels.triton_kernels import configs  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
both_forms = pytest.mark.parametrize("fused", ["0", "1"], ids=["two_kernels", "one_kernel"])


@pytest.fixture(autouse=True)
def served_by_triton():
    with nk.use_backend("triton"):
        yield


def results(inputs: Inputs, plan: Tensor | None) -> tuple[Tensor, ...]:
    """y, dx and ddelta of the linear, the same of the bypass, and W with its kept values."""
    x, delta, grad = inputs.x, inputs.delta, inputs.grad_output
    x, delta = (t.detach().requires_grad_() for t in (x, delta))
    linear, bypass = nk.functional.neuroada_linear, nk.functional.neuroada_bypass
    y = linear(x, inputs.weight, inputs.index, delta, inputs.bias, plan=plan)
    out = bypass(inputs.grad_output, x, inputs.index, delta, plan=plan)
    merged = inputs.weight.clone()
    original = torch.ops.neuroada.merge_(merged, inputs.index, inputs.delta)
    restored = merged.clone()
    torch.ops.neuroada.unmerge_(restored, inputs.index, original)
    grads = [torch.autograd.grad(made, (x, delta), grad) for made in (y, out)]
    return y, out, *grads[0], *grads[1], merged, original, restored


@both_forms
@pytest.mark.parametrize("name", ["index", "delta", "bias", "plan"])
def test_what_belongs_to_a_layer_may_be_a_view(name, fused, monkeypatch):
    monkeypatch.setenv("NEUROADA_TRITON_FUSED", fused)
    inputs = make_inputs(Case(17, 40, 24, 3, bias=True), torch.float32, device=DEVICE)
    arguments = {**vars(inputs), "plan": nk.make_plan(inputs.index, 40)}
    tensor = arguments[name]
    view = torch.stack([tensor, torch.zeros_like(tensor)], -1)[..., 0]
    assert view.equal(tensor)
    assert not view.is_contiguous()
    viewed = arguments | {name: view}
    expected = results(inputs, arguments["plan"])
    found = results(Inputs(**{n: viewed[n] for n in vars(inputs)}), viewed["plan"])
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


@both_forms
@pytest.mark.parametrize("tokens", [0, 3])
def test_a_layer_may_have_no_neurons(tokens, fused, monkeypatch):
    monkeypatch.setenv("NEUROADA_TRITON_FUSED", fused)
    x, weight = torch.randn(tokens, 6, device=DEVICE), torch.empty(0, 6, device=DEVICE)
    index = torch.empty(0, 2, dtype=torch.int32, device=DEVICE)
    inputs = Inputs(x, weight, index, torch.empty(0, 2, device=DEVICE), None, x[:, :0])
    y, _, grad_x, grad_delta, *_ = results(inputs, None)
    assert y.shape == (tokens, 0)
    assert grad_x.equal(torch.zeros_like(x))
    assert grad_delta.shape == (0, 2)


@both_forms
@pytest.mark.parametrize("planned", [True, False], ids=["plan", "no_plan"])
def test_no_slot_may_have_a_connection(planned, fused, dtype, monkeypatch):
    monkeypatch.setenv("NEUROADA_TRITON_FUSED", fused)
    inputs = make_inputs(Case(17, 40, 24, 3, bias=True), dtype, device=DEVICE)
    inputs.index.fill_(-1)
    inputs.delta.fill_(float("nan"))
    plan = nk.make_plan(inputs.index, 40) if planned else None
    y, out, grad_x, grad_delta, bypass_grad_x, bypass_grad_delta, merged, *_ = results(inputs, plan)
    frozen = inputs.x.double() @ inputs.weight.double().t() + inputs.bias.double()
    assert rms_error(y, frozen) <= 2 * tolerance(dtype, 40)
    assert rms_error(grad_x, inputs.grad_output.double() @ inputs.weight.double()) <= 2 * tolerance(
        dtype, 24
    )
    assert out.equal(inputs.grad_output)
    assert not any(gradient.any() for gradient in (grad_delta, bypass_grad_x, bypass_grad_delta))
    assert merged.equal(inputs.weight)


@pytest.mark.parametrize("delta_dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_gradient_of_delta_has_its_dtype(delta_dtype):
    """The op's own result, on which a compiled graph relies; autograd would cast it."""
    inputs = make_inputs(Case(17, 40, 24, 3), torch.float32, device=DEVICE)
    rest = (inputs.index, inputs.delta.to(delta_dtype), None, [False, True])
    op, grad = torch.ops.neuroada, inputs.grad_output
    assert op.linear_backward(grad, inputs.x, inputs.weight, *rest)[1].dtype == delta_dtype
    assert op.bypass_backward(grad, inputs.x, *rest)[1].dtype == delta_dtype


@both_forms
def test_a_chunk_is_dropped_before_the_next_is_transposed(fused, monkeypatch):
    monkeypatch.setenv("NEUROADA_TRITON_FUSED", fused)
    monkeypatch.setattr(configs, "WORKSPACE_BYTES", 1)  # so a chunk has 128 tokens
    kernels = _kernels()
    transpose, made, held = kernels.transpose, [], []

    def watched(x: Tensor) -> Tensor:
        gc.collect()  # the interpreter's own rings
        held.append(sum(reference() is not None for reference in made))
        x_t = transpose(x)
        made.append(weakref.ref(x_t))
        return x_t

    inputs = make_inputs(Case(384, 16, 8, 1), torch.float32, device=DEVICE)
    rest, plan = (inputs.index, inputs.delta), nk.make_plan(inputs.index, 16)
    monkeypatch.setattr(kernels, "transpose", watched)
    torch.ops.neuroada.linear(inputs.x, inputs.weight, *rest, None, plan)
    torch.ops.neuroada.bypass_add(inputs.grad_output, inputs.x, *rest, plan)
    assert held == [0] * 6
    held.clear()
    torch.ops.neuroada.linear_backward(
        inputs.grad_output, inputs.x, inputs.weight, *rest, plan, [True, True]
    )
    assert held == [0, 1] * 3  # dy's is needed again where x's is
