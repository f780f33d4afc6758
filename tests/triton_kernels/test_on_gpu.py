"""What shows on a GPU alone: graphs, streams, synchronisation, memory, far addresses, inductor.

Each runs on Triton and on CUDA C++, through all forms that give the same: two kernels for product
and bypass and, in Triton, one, since a GPU's dispatch may take either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import neuroada_kernels as nk
from neuroada_kernels import _extension
from neuroada_kernels.testing import Case, Inputs, make_inputs, rms_error, tolerance

pytestmark = pytest.mark.on_backend
unavailable = nk.available_backends()["triton"]
if unavailable is not None:
    pytest.skip(unavailable, allow_module_level=True)
if not torch.cuda.is_available():
    pytest.skip("no GPU is visible", allow_module_level=True)

from neuroada_kernels.backends.triton import _kernels  # noqa: E402
from neuroada_kernels.plan import plan_parts  # noqa: E402

kernels = _kernels()
MIB = 2**20
CASE = Case(tokens=1000, d_in=1024, d_out=768, k=8, bias=True)
TRAINING = Case(tokens=8192, d_in=4096, d_out=4096, k=8)
Results = tuple[Tensor, ...]


@pytest.fixture(params=["triton", "cuda"], autouse=True)
def named(request: pytest.FixtureRequest) -> Iterator[str]:
    reason = nk.available_backends()[request.param]
    if reason is not None:
        pytest.skip(reason)
    with nk.use_backend(request.param):
        yield request.param


@pytest.fixture(params=["two_kernels", "one_kernel"], autouse=True)
def form(named: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "one_kernel" and named == "cuda":
        pytest.skip("CUDA C++ has no such kernel")
    monkeypatch.setenv("NEUROADA_TRITON_FUSED", str(int(request.param == "one_kernel")))


class Problem:
    """A step that allocates its results alone; its leaves can be written between two steps."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.bfloat16, **options: object) -> None:
        self.case, self.dtype = case, dtype
        self.inputs = inputs = make_inputs(case, dtype, **{"device": "cuda", **options})
        self.plan = nk.make_plan(inputs.index, case.d_in)
        self.x, self.delta = (t.clone().requires_grad_() for t in (inputs.x, inputs.delta))

    def step(self) -> Results:
        """y, dx and ddelta."""
        i = self.inputs
        y = nk.functional.neuroada_linear(
            self.x, i.weight, i.index, self.delta, i.bias, plan=self.plan
        )
        return y.detach(), *torch.autograd.grad(y, (self.x, self.delta), i.grad_output)

    def truth(self) -> Results:
        i = self.inputs
        x, delta = (t.detach().double().requires_grad_() for t in (self.x, self.delta))
        bias = None if i.bias is None else i.bias.double()
        y = nk.reference.neuroada_linear(x, i.weight.double(), i.index, delta, bias)
        return y.detach(), *torch.autograd.grad(y, (x, delta), i.grad_output.double())

    def check(self, results: Results, truth: Results) -> None:
        case = self.case
        lengths = (case.d_in + case.k, case.d_out * (1 + case.k), case.tokens)
        for result, exact, length in zip(results, truth, lengths, strict=True):
            # One rounding for the bypass, one for the sum, where the bypass goes first.
            assert rms_error(result, exact) <= 2 * tolerance(self.dtype, length, result.dtype)


class LayerProblem:
    """A step of a layer, and what it should give."""

    def __init__(self, strategy: str, save_activations: str, device: str = "cuda") -> None:
        torch.manual_seed(0)
        options = {"strategy": strategy, "save_activations": save_activations}
        dtype = torch.bfloat16
        self.layer = nk.NeuroAdaLinear(256, 128, 4, device=device, dtype=dtype, **options)
        self.x = torch.randn(65, 256, device=device, dtype=dtype, requires_grad=True)
        self.grad = torch.randn(65, 128, device=device, dtype=dtype)

    def renew(self, seed: int) -> None:
        """Other values in the same memory."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in (self.x, self.grad, self.layer.delta):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))

    def step(self) -> Results:
        """y, dx and ddelta."""
        y = self.layer(self.x)
        return y.detach(), *torch.autograd.grad(y, (self.x, self.layer.delta), self.grad)

    def truth(self, base: Tensor) -> Results:
        layer, is_resident = self.layer, self.layer.strategy == "resident"
        delta = layer.delta.detach()
        weight = nk.reference.merged_weight(base, layer.index, delta) if is_resident else base
        x, delta = (t.detach().double().requires_grad_() for t in (self.x, delta))
        bypass = nk.reference.bypass(x, layer.index, delta)
        dense = nn.functional.linear(x, weight.double(), layer.bias.double())
        y = dense if is_resident else dense + bypass
        grad = self.grad.double()
        (grad_delta,) = torch.autograd.grad(bypass, delta, grad, retain_graph=True)
        return y.detach(), *torch.autograd.grad(y, x, grad), grad_delta

    def check(self, results: Results, truth: Results) -> None:
        for result, exact, length in zip(results, truth, (256, 128 * 5, 65), strict=True):
            assert rms_error(result, exact) <= 2 * tolerance(torch.bfloat16, length, result.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_captured_step_replays_on_new_values(dtype):
    problem = Problem(CASE, dtype)
    graph, results = captured(problem.step)
    for seed in (1, 2):
        new = make_inputs(CASE, dtype, device="cuda", seed=seed)
        with torch.no_grad():
            problem.x.copy_(new.x)
            problem.delta.copy_(new.delta)
            problem.inputs.grad_output.copy_(new.grad_output)
        for result in results:
            result.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        problem.check(results, problem.truth())
        for replayed, eager in zip(results, problem.step(), strict=True):
            torch.testing.assert_close(replayed, eager)


def captured(step: Callable[[], Results]) -> tuple[torch.cuda.CUDAGraph, Results]:
    """A graph of one step, after some on a stream of their own, and what it writes into."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@pytest.mark.parametrize("save_activations", ["full", "compact"])
@pytest.mark.parametrize("strategy", ["bypass", "resident"])
def test_a_captured_step_of_a_layer_replays_on_new_values(strategy, save_activations):
    """Forward and backward; also W + delta is that of the replay, not of the capture."""
    problem = LayerProblem(strategy, save_activations)
    base = problem.layer.state_dict()["weight"].clone()
    graph, results = captured(problem.step)
    for seed in (1, 2):
        problem.renew(seed)
        for result in results:
            result.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        problem.check(results, problem.truth(base))
    problem.layer.strategy = "bypass"
    assert problem.layer.weight.equal(base)


def test_two_streams_at_once_do_not_disturb_each_other():
    problems = [Problem(CASE), Problem(replace(CASE, tokens=1500, d_out=1280, k=3))]
    streams = [torch.cuda.Stream() for _ in problems]
    truths = [problem.truth() for problem in problems]
    for problem in problems:
        problem.step()  # compiles
    torch.cuda.synchronize()
    results: list[list[Results]] = [[], []]
    for _ in range(10):
        for problem, stream, found in zip(problems, streams, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(problem.step())
    torch.cuda.synchronize()
    for problem, found, truth in zip(problems, results, truths, strict=True):
        for result in found:
            problem.check(result, truth)


@pytest.mark.parametrize("index", ["magnitude", "one_column"])
def test_twenty_runs_give_the_same_bits(index):
    problem = Problem(replace(CASE, tokens=9000, d_in=2048, index=index))  # several chunks
    first = problem.step()
    for _ in range(20):
        assert all(a.equal(b) for a, b in zip(first, problem.step(), strict=True))


# What compiling warns of is not ours, and its importing runs torch's own scripted modules.
@pytest.mark.filterwarnings("default")
def test_inductor_compiles_a_model_whole():
    torch.compiler.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 128, bias=False)).cuda()
    nk.adapt(model, k=3)
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.delta, std=0.1)
    x = torch.randn(4, 50, 256, device="cuda", requires_grad=True)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]

    def step(call: Callable[[Tensor], Tensor]) -> Results:
        y = call(x)
        return y.detach(), *torch.autograd.grad(y.square().mean(), wanted)

    function = torch.compile(model, fullgraph=True)
    for result, expected in zip(step(function), step(model), strict=True):
        assert rms_error(result, expected) <= 1e-4
    with torch.compiler.set_stance("fail_on_recompile"):
        step(function)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_no_call_waits_for_the_gpu():
    problem = Problem(CASE)
    layer = nk.NeuroAdaLinear(256, 128, 4, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(33, 256, device="cuda", dtype=torch.bfloat16)
    inputs = problem.inputs
    weight = inputs.weight.clone()

    def calls() -> None:
        problem.step()
        layer(x).sum().backward()
        nk.functional.neuroada_bypass(
            inputs.grad_output, problem.x, inputs.index, problem.delta, plan=problem.plan
        ).sum().backward()
        original = torch.ops.neuroada.merge_(weight, inputs.index, inputs.delta)
        torch.ops.neuroada.unmerge_(weight, inputs.index, original)

    calls()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert weight.equal(inputs.weight)


def test_the_workspace_stays_within_96_mib():
    """32 for transposed inputs, and 64 for a product in float32."""
    problem = Problem(TRAINING)
    problem.step()  # torch's product allocates a workspace once
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    i = problem.inputs
    with torch.no_grad():  # alone first: dx, not made yet, would hide what the forward holds
        out = nk.functional.neuroada_linear(problem.x, i.weight, i.index, problem.delta)
    forward = torch.cuda.max_memory_allocated() - before - out.nbytes
    del out
    torch.cuda.reset_peak_memory_stats()
    y, grad_x, _ = problem.step()
    both = torch.cuda.max_memory_allocated() - before - y.nbytes - grad_x.nbytes
    assert max(forward, both) <= 96 * MIB


def test_weights_and_inputs_may_be_views():
    problem = Problem(replace(CASE, bias=False))
    inputs, expected = problem.inputs, problem.step()
    wide = torch.cat([torch.zeros_like(inputs.x[:, :1]), inputs.x], 1)
    views = {
        "x every second row": (inputs.x.repeat_interleave(2, 0)[::2], inputs.weight),
        "x transposed": (inputs.x.t().contiguous().t(), inputs.weight),
        "x off by two bytes": (wide[:, 1:], inputs.weight),
        "weight transposed": (inputs.x, inputs.weight.t().contiguous().t()),
        "weight off by two bytes": (
            inputs.x,
            torch.cat([inputs.weight[:, :1], inputs.weight], 1)[:, 1:],
        ),
    }
    for name, (x, weight) in views.items():
        leaf = x.detach().requires_grad_()
        y = nk.functional.neuroada_linear(
            leaf, weight, inputs.index, problem.delta, plan=problem.plan
        )
        grads = torch.autograd.grad(y, (leaf, problem.delta), inputs.grad_output)
        for result, known in zip((y, *grads), expected, strict=True):
            assert rms_error(result, known) <= 2 * tolerance(problem.dtype, CASE.d_in), name


def test_tokens_times_inputs_may_pass_31_bits():
    """Through the launchers too, which see all tokens at once where the backend goes by chunks."""
    tokens, d_in, d_out, k = 2**19 + 300, 4096, 64, 4
    needed = 4 * 2 * tokens * d_in  # x, its transpose, dx, and room
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"{free / 2**30:.0f} GiB free, {needed / 2**30:.0f} are needed")
    small = make_inputs(Case(128, d_in, d_out, k), torch.bfloat16, device="cuda")
    x = torch.randn(tokens, d_in, device="cuda", dtype=torch.bfloat16)
    grad = torch.zeros(tokens, d_out, device="cuda", dtype=torch.bfloat16)
    ends = torch.cat([torch.arange(100), torch.arange(tokens - 100, tokens)]).cuda()
    grad[ends] = torch.randn(200, d_out, device="cuda", dtype=torch.bfloat16)
    # Where dy is not zero at the ends alone, their rows have the whole of ddelta.
    at_ends = Problem(Case(200, d_in, d_out, k))
    at_ends.inputs = replace(small, grad_output=grad[ends])
    at_ends.plan = nk.make_plan(small.index, d_in)
    at_ends.x = x[ends].requires_grad_()
    at_ends.delta = small.delta.clone().requires_grad_()
    truth = at_ends.truth()

    large = _step(small, x, grad, at_ends.plan)
    at_ends.check((large[0][ends], large[1][ends], large[2]), truth)
    del large
    torch.cuda.empty_cache()
    _check_launchers(small, x, grad, ends, at_ends)


def _step(small: Inputs, x: Tensor, grad: Tensor, plan: Tensor) -> Results:
    leaf, delta = x.requires_grad_(), small.delta.clone().requires_grad_()
    y = nk.functional.neuroada_linear(leaf, small.weight, small.index, delta, plan=plan)
    return y.detach(), *torch.autograd.grad(y, (leaf, delta), grad)


def _check_launchers(small: Inputs, x: Tensor, grad: Tensor, ends: Tensor, at: Problem) -> None:
    x = x.detach()
    weight, index, delta = small.weight, small.index, small.delta
    plan = plan_parts(at.plan, x.shape[1])
    truth = at.truth()
    x_t, grad_t = kernels.transpose(x), kernels.transpose(grad)
    assert x_t[:, ends].equal(x[ends].t())
    y, grad_x = torch.full_like(grad, float("nan")), torch.full_like(x, float("nan"))
    kernels.linear_fwd(x, weight, x_t, index, delta, None, y)
    partial = kernels.sddmm_partial(index, x.shape[0], x.dtype)
    kernels.sddmm(x_t, grad_t, index, partial)
    kernels.linear_bwd_input(grad, weight, grad_t, plan.column_start, plan.entry, delta, grad_x)
    at.check((y[ends], grad_x[ends], partial.sum(0).view(delta.shape)), truth)

    kernels.bypass_fwd(x_t, index, delta, y)
    kernels.bypass_bwd_input(grad_t, *plan, delta, grad_x)
    at.inputs = replace(at.inputs, weight=torch.zeros_like(weight))
    truth = at.truth()
    at.check((y[ends], grad_x[ends], truth[2]), truth)


@pytest.mark.parametrize(
    "shape", [(1024, 768, 8), (4096, 4096, 8), (4096, 14336, 8), (14336, 4096, 1)]
)
def test_a_plan_in_order_has_the_same_entries(shape, named):
    if named != "cuda" or not _extension.serves_by_default(torch.cuda.current_device()):
        pytest.skip("the order is for the CUDA kernels, where they serve by default")
    problem = Problem(Case(257, *shape))
    columns, d_in = problem.inputs.index.flatten().long(), shape[0]

    def by_column(plan: Tensor) -> Tensor:
        entry = plan_parts(plan, d_in).entry.long()
        return (columns[entry] * len(columns) + entry).sort().values

    ordered, plain = problem.plan, nk.make_plan(problem.inputs.index, d_in, ordered=False)
    assert not ordered.equal(plain)
    assert by_column(ordered).equal(by_column(plain))
    truth = problem.truth()
    problem.check(problem.step(), truth)
    problem.plan = plain
    problem.check(problem.step(), truth)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU is visible")
def test_tensors_may_lie_on_another_gpu_than_the_current():
    problem = Problem(CASE, device="cuda:1")
    assert torch.cuda.current_device() == 0
    problem.check(problem.step(), problem.truth())
