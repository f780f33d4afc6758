"""Models written down to run without their layers: torch.export, traces, fakes."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx.experimental.proxy_tensor import make_fx
from two_layers import move_deltas, two_layers

import neuroada_kernels as nk

pytestmark = [
    # Torch's own code: what it deserialises, scripts and asks of its pytrees.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]
every_strategy = pytest.mark.parametrize("strategy", ["bypass", "resident"])


def small_model(strategy: str, dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    model = two_layers(strategy, dtype=dtype, **options)
    model(torch.zeros(1, 24, dtype=dtype))  # patches what is resident
    return model


def exported(model: nn.Module, strict: bool = False) -> ExportedProgram:
    x = torch.randn(2, 5, 24, dtype=model[0].weight.dtype)
    sizes = {0: Dim("batch", min=1, max=64), 1: Dim("tokens", min=1, max=64)}
    return torch.export.export(model, (x,), dynamic_shapes=(sizes,), strict=strict)


def step(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    y = call(x)
    y.float().square().sum().backward()
    trained = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    assert len(trained) == 3  # two deltas and a bias
    return [y.detach(), *trained]


def assert_close(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    """Within what is usual for ``dtype``, the float32 gradients of its products too."""
    rtol, atol = torch.testing._comparison.default_tolerances(dtype)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=10 * atol)


@every_strategy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("strict", "save_activations"), [(False, "compact"), (True, "compact"), (False, "auto")]
)
def test_a_program_trains_as_the_model_does(strategy, strict, dtype, save_activations):
    model = small_model(strategy, dtype, save_activations=save_activations)
    program = exported(model, strict)
    run, x = program.module(), torch.randn(3, 7, 24, dtype=dtype)
    # Both hold the same parameters, so that one may be moved and the other asked.
    for _ in range(2):
        weights = [model[place].weight.clone() for place in (0, 2)]
        found = step(run, model, x)
        assert all(model[place].weight.equal(w) for place, w in zip((0, 2), weights, strict=True))
        assert_close(found, step(model, model, x), dtype)
        move_deltas(model)


@every_strategy
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_programs_gradient_of_delta_is_rounded_to_no_16_bits(strategy, dtype):
    model = small_model(strategy, dtype)[0]
    run, x = exported(nn.Sequential(model)).module(), torch.randn(4, 16, 24, dtype=dtype)
    found, expected = (
        torch.autograd.grad((1e4 * y.float()).sum(), model.delta)[0] for y in (run(x), model(x))
    )
    assert expected.abs().max() > torch.finfo(torch.float16).max
    assert found.equal(expected)


@every_strategy
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_what_is_made_of_a_program_computes_the_same(strategy, strict):
    model, x = small_model(strategy), torch.randn(3, 7, 24)
    program, expected = exported(model, strict), model(x)
    for made in (program.run_decompositions().module(), torch.export.unflatten(program)):
        torch.testing.assert_close(made(x), expected)


def test_a_saved_program_needs_the_package_until_it_is_merged(tmp_path):
    x = torch.randn(3, 7, 24)
    for strategy in ("bypass", "resident"):
        model = small_model(strategy)
        torch.export.save(exported(model), tmp_path / f"{strategy}.pt2")
        nk.merge(model)
        torch.export.save(exported(model), tmp_path / f"merged-{strategy}.pt2")
    torch.save((x, model(x).detach()), tmp_path / "x_y")
    code = """
import sys, torch
x, y = torch.load("x_y")
def check(name):
    torch.testing.assert_close(torch.export.load(name + ".pt2").module()(x).detach(), y)
for name in ("merged-bypass", "merged-resident"):
    check(name)
assert "neuroada_kernels" not in sys.modules
import neuroada_kernels
for name in ("bypass", "resident"):
    check(name)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr


@every_strategy
def test_a_program_writes_nothing(strategy):
    """As AOTInductor wants it, which takes no program that writes a parameter."""
    outputs = exported(small_model(strategy)).run_decompositions().graph_signature.output_specs
    assert [output.kind for output in outputs] == [OutputKind.USER_OUTPUT]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@every_strategy
@pytest.mark.parametrize("how", ["torch.jit.trace", "make_fx"])
def test_a_trace_follows_delta_and_passes_its_gradient(how, strategy):
    model, x = small_model(strategy, save_activations="compact"), torch.randn(6, 24)
    step(model, model, x)  # after which a layer could know these columns of x
    if how == "make_fx":
        traced = make_fx(lambda x: model(x))(x)
    else:
        traced = torch.jit.trace(model, (x,), check_trace=False)
    for other in (x, torch.randn(6, 24)):
        torch.testing.assert_close(step(traced, model, other), step(model, model, other))
        move_deltas(model)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@every_strategy
@pytest.mark.parametrize("how", ["torch.jit.trace", "make_fx"])
def test_a_copy_is_traced_before_its_first_forward(how, strategy):
    """Its plan is made while the trace records, which must not record that."""
    model, x = copy.deepcopy(small_model(strategy)), torch.randn(6, 24)
    if how == "make_fx":
        traced = make_fx(lambda x: model(x))(x)
        graph = traced.graph
    else:
        traced = torch.jit.trace(model, (x,))  # and again, to check the trace
        graph = traced.inlined_graph
    assert "empty" not in str(graph)
    for _ in range(2):
        torch.testing.assert_close(step(traced, model, x), step(model, model, x))
        move_deltas(model)


@every_strategy
def test_fake_tensors_take_the_place_of_all_values(strategy):
    model, mode = small_model(strategy), FakeTensorMode()
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    fakes = {name: mode.from_tensor(value) for name, value in values.items()}
    with mode:
        x = torch.randn(2, 5, 24, requires_grad=True)
        y = torch.func.functional_call(model, fakes, (x,))
        (grad,) = torch.autograd.grad(y.sum(), x)
    assert y.shape == (2, 5, 12)
    assert grad.shape == x.shape
    # The real ones are as they were.
    assert model(torch.randn(2, 24)).isfinite().all()


def test_a_fake_weight_has_no_largest_entries():
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(24, 12))
        with pytest.raises(ValueError, match="weight: is a fake tensor, expected values"):
            nk.adapt(model, k=3)
