"""Under ``torch.compile``: one graph, eager's results, and no second compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from gradients import bypass, differentiate, linear, linear_tensors
from torch import Tensor, nn

import neuroada_kernels as nk
from neuroada_kernels.testing import CASES, Case, make_inputs

CASE = CASES[1]  # 17 tokens, 64 to 48, k 8, bias


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function: Callable[..., Tensor], **options: object) -> Callable[..., Tensor]:
    """The whole function as one graph, differentiated ahead of time."""
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("planned", [True, False], ids=["plan", "no_plan"])
def test_functions_compile_to_eagers_results(planned, dtype, backend, device):
    inputs = make_inputs(CASE, dtype, device=device)
    plan = nk.make_plan(inputs.index, CASE.d_in) if planned else None
    y = inputs.grad_output.flip(0)
    for function, tensors in (
        (linear(inputs, plan), linear_tensors(inputs)),
        (bypass(inputs, plan), [y, inputs.x, inputs.delta]),
    ):
        results = differentiate(compiled(function), tensors, inputs.grad_output)
        expected = differentiate(function, tensors, inputs.grad_output)
        assert all(r.equal(e) for r, e in zip(results, expected, strict=True))


def test_the_second_call_does_not_compile_again(backend, device):
    inputs = make_inputs(CASE, torch.float32, device=device)
    function = compiled(linear(inputs))
    first = differentiate(function, linear_tensors(inputs), inputs.grad_output)
    with torch.compiler.set_stance("fail_on_recompile"):
        second = differentiate(function, linear_tensors(inputs), inputs.grad_output)
    assert all(f.equal(s) for f, s in zip(first, second, strict=True))


@pytest.mark.parametrize("how", ["mark_dynamic", "dynamic"])
def test_one_graph_serves_any_number_of_tokens(how, backend, device):
    inputs = make_inputs(CASE, torch.float32, device=device)
    plan = nk.make_plan(inputs.index, CASE.d_in)
    eager = linear(inputs, plan)
    function = compiled(eager, dynamic=True if how == "dynamic" else None)

    def run(tokens: int, call: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        x = inputs.x[:tokens].clone().requires_grad_()
        if how == "mark_dynamic":
            torch._dynamo.mark_dynamic(x, 0)
        delta = inputs.delta.clone().requires_grad_()
        y = call(x, delta, inputs.bias)
        return y.detach(), *torch.autograd.grad(y, (x, delta), inputs.grad_output[:tokens])

    run(17, function)
    with torch.compiler.set_stance("fail_on_recompile"):
        for tokens in (16, 5, 2):
            for result, expected in zip(run(tokens, function), run(tokens, eager), strict=True):
                assert result.equal(expected)


def small_model(dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    """Two adapted layers whose deltas are not zero, one of them with a trained bias."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 12, bias=False)).to(dtype)
    nk.adapt(model, k=3, **options)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.delta.normal_(std=0.1)
    model[0].bias.requires_grad_()
    return model


def step(
    call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor
) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    y = call(x)
    y.square().sum().backward()
    return y.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("leading", [(6,), (2, 3)], ids=str)
def test_a_model_compiles_to_eagers_results(leading, backend, device):
    model = small_model().to(device)
    x = torch.randn(*leading, 24, device=device)
    function = compiled(model)
    y, gradients = step(function, model, x)
    expected_y, expected = step(model, model, x)
    assert len(gradients) == 3  # two deltas and a bias
    torch.testing.assert_close((y, gradients), (expected_y, expected))

    with torch.compiler.set_stance("fail_on_recompile"):
        again, _ = step(function, model, x)
        with torch.no_grad():  # an optimiser writes in place
            model[0].delta.mul_(2)
        moved, _ = step(function, model, x)
    assert again.equal(y)
    torch.testing.assert_close(moved, step(model, model, x)[0])


def test_another_number_of_kept_columns_compiles_once_more_and_no_further(backend, device):
    model = nn.Sequential(nn.Linear(64, 16)).to(device)
    nk.adapt(model, save_activations="compact")
    x = torch.randn(6, 64, device=device)
    function = compiled(model)
    for number, columns in enumerate((7, 12, 3, 16)):
        rows = torch.arange(16, dtype=torch.int32, device=device)[:, None]
        model[0].index = rows % columns
        assert len(model[0].columns) == columns
        stance = "default" if number < 2 else "fail_on_recompile"
        with torch.compiler.set_stance(stance):
            results = step(function, model, x)
        torch.testing.assert_close(results, step(model, model, x))


def test_a_compiled_layer_follows_an_index_that_is_loaded(backend, device):
    """It cannot plan by itself, and by the old plan dx would be another's."""
    layer = nk.NeuroAdaLinear(24, 16, 3, device=device)
    x = torch.randn(9, 24, device=device, requires_grad=True)
    grad_output = torch.randn(9, 16, device=device)
    function = compiled(layer)
    function(x).sum().backward()
    state = layer.state_dict()
    other = {"index": (state["index"] + 7) % 24, "delta": torch.randn(16, 3)}
    layer.load_state_dict({**state, **other})
    results = torch.autograd.grad(function(x), [x, layer.delta], grad_output)
    expected = torch.autograd.grad(layer(x), [x, layer.delta], grad_output)
    assert all(r.equal(e) for r, e in zip(results, expected, strict=True))


def test_a_compiled_model_follows_merging(backend, device):
    model = small_model().to(device)
    x = torch.randn(6, 24, device=device)
    function = compiled(model)
    y = function(x).detach()
    nk.merge(model)
    torch.testing.assert_close(function(x), model(x))
    nk.unmerge(model)
    assert function(x).detach().equal(y)


def test_autocast_compiles(backend, device):
    inputs = make_inputs(CASE, torch.float32, device=device)
    function = compiled(linear(inputs))
    with torch.autocast(device, dtype=torch.bfloat16):
        y = function(*linear_tensors(inputs))
        expected = linear(inputs)(*linear_tensors(inputs))
    assert y.dtype == torch.bfloat16
    assert y.equal(expected)


def test_without_gradients(backend, device):
    inputs = make_inputs(Case(5, 12, 9, 2), torch.float32, device=device)
    tensors = linear_tensors(inputs)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert compiled(linear(inputs))(*tensors).equal(linear(inputs)(*tensors))


def test_a_second_derivative_through_a_compiled_function_is_refused(backend, device):
    inputs = make_inputs(CASE, torch.float32, device=device)
    x, delta, bias = (t.clone().requires_grad_() for t in linear_tensors(inputs))
    y = compiled(linear(inputs))(x, delta, bias)
    loss = y.square().sum()
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        torch.autograd.grad(loss, delta, create_graph=True)[0].sum().backward()


# Importing inductor runs torch's own scripted modules, which say so.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_the_default_compiler():
    """Inductor's own code around our ops, forward and backward, columns of x copied by it too."""
    model = small_model(save_activations="compact")
    assert model[2].columns is not None
    x = torch.randn(6, 24)
    results = step(torch.compile(model, fullgraph=True), model, x)
    torch.testing.assert_close(results, step(model, model, x))
