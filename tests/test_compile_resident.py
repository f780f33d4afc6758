"""A resident layer under ``torch.compile``: patched in every forward, and eager's results."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from two_layers import move_deltas, two_layers

import neuroada_kernels as nk

COMPILERS = ["aot_eager", "inductor"]
pytestmark = [
    # Importing inductor runs torch's own scripted modules, which say so.
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    # The compiler makes an instance of an autograd function to trace it, and is told not to.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(params=COMPILERS)
def compiled(request: pytest.FixtureRequest) -> Callable[..., Callable[..., Tensor]]:
    """Compiles the whole function as one graph."""
    return lambda function: torch.compile(function, fullgraph=True, backend=request.param)


def small_model(device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    return two_layers("resident", device, dtype)


def assert_close(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    """Within what is usual for ``dtype``, also where a float32 gradient is made of its products:
    the compiler may round those elsewhere than eager does."""
    rtol, atol = torch.testing._comparison.default_tolerances(dtype)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def step(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    given = x.clone().requires_grad_()
    y = call(given)
    y.square().sum().backward()
    trained = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    assert len(trained) == 3  # two deltas and a bias
    return [y.detach(), given.grad, *trained]


@pytest.mark.parametrize("leading", [(6,), (2, 3)], ids=str)
def test_steps_are_eagers_and_follow_delta_without_compiling_again(
    leading, compiled, dtype, backend, device
):
    model = small_model(device, dtype)
    x = torch.randn(*leading, 24, device=device, dtype=dtype)
    function = compiled(model)
    first = step(function, model, x)
    assert_close(first, step(model, model, x), dtype)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert all(a.equal(b) for a, b in zip(step(function, model, x), first, strict=True))
        for _ in range(2):
            move_deltas(model)
            moved = step(function, model, x)
            assert not moved[0].equal(first[0])
            twin = nk.reference.merged_weight(
                model[0].state_dict()["weight"], model[0].index, model[0].delta.detach()
            )
            assert model[0].weight.equal(twin)
            assert_close(moved, step(model, model, x), dtype)


def test_several_forwards_before_a_backward(compiled):
    model, x = small_model(), torch.randn(6, 24)
    function = compiled(model)

    def both(x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.cat([call(x), call(2 * x)])

    expected = step(lambda x: both(x, model), model, x)
    torch.testing.assert_close(step(lambda x: both(x, function), model, x), expected)


def test_one_layer_called_twice_in_a_graph(compiled):
    model, x = small_model(), torch.randn(6, 24)

    def twice(x: Tensor) -> Tensor:
        return model(x) + model(2 * x)

    torch.testing.assert_close(step(compiled(twice), model, x), step(twice, model, x))


@pytest.mark.parametrize("forward_since", [True, False])
def test_a_backward_after_delta_has_changed_is_refused(compiled, forward_since):
    model, x = small_model(), torch.randn(6, 24, requires_grad=True)
    function = compiled(model)
    y = function(x)
    move_deltas(model)
    if forward_since:
        function(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_eager_and_compiled_calls_take_turns(compiled):
    model, x = small_model(), torch.randn(6, 24)
    function = compiled(model)
    base = model.state_dict()["0.weight"]
    for first, second in ((function, model), (model, function)):
        for _ in range(2):
            move_deltas(model)
            torch.testing.assert_close(first(x), second(x))
    nk.set_strategy(model, "bypass")
    assert model[0].weight.equal(base)
    torch.testing.assert_close(function(x), model(x))


def test_a_compiled_model_follows_merging_and_loading(compiled):
    model, x = small_model(), torch.randn(6, 24)
    function = compiled(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    y = function(x).detach()
    nk.merge(model)
    torch.testing.assert_close(function(x).detach(), y)
    nk.unmerge(model)
    torch.testing.assert_close(function(x).detach(), y)
    move_deltas(model)
    assert not function(x).detach().allclose(y)
    model.load_state_dict(state)
    torch.testing.assert_close(function(x).detach(), y)
    assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())


def test_without_gradients_and_under_autocast(compiled):
    model, x = small_model(), torch.randn(6, 24)
    function = compiled(model)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            torch.testing.assert_close(function(x), model(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = function(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, model(x))


def test_checkpointing_inside_a_graph(compiled):
    model, x = small_model(), torch.randn(6, 24)

    def recomputed(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False)

    torch.testing.assert_close(step(compiled(recomputed), model, x), step(model, model, x))


def test_a_library_sees_the_product():
    """The graph holds torch's own, and nothing of the bypass in the forward but the patch."""
    model, targets = small_model(), []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=keep)
    torch.compile(model, fullgraph=True, backend=backend)(torch.randn(6, 24))
    ours = {str(t) for t in targets if "neuroada" in str(t)}
    assert not ours
    assert torch.ops.aten.addmm.default in targets
    assert torch.ops.aten.mm.default in targets


def test_inductor_patches_in_place_and_copies_no_weight(tmp_path):
    from test_memory import allocations

    layer = nk.NeuroAdaLinear(1024, 1024, 8, strategy="resident")
    x = torch.randn(8, 1024, requires_grad=True)
    function, pointer = torch.compile(layer, fullgraph=True), layer.weight.data_ptr()

    def run() -> None:
        with torch.no_grad():
            layer.delta.add_(0.1)
        function(x).sum().backward()

    run()
    sizes = allocations(run, tmp_path)
    assert max(sizes) <= layer.weight.nbytes // 8
    assert layer.weight.data_ptr() == pointer
