"""Every candidate computes what its row of the table says, and one that does not is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import neuroada_kernels as nk
from neuroada_kernels import reference
from neuroada_kernels.benchmarks import linear
from neuroada_kernels.benchmarks.baselines import (
    FrozenLinear,
    LoRALinear,
    MaskedDenseLinear,
    MaterialisedLinear,
)
from neuroada_kernels.benchmarks.candidates import (
    Candidate,
    Run,
    WrongCandidateError,
    automatic,
    bench_inputs,
    prepare,
    table,
)
from neuroada_kernels.benchmarks.exact import Exact
from neuroada_kernels.benchmarks.linear_results import Skipped
from neuroada_kernels.testing import Case, rms_error, tolerance

CASE = Case(tokens=33, d_in=64, d_out=48, k=8, bias=True)
CASES = (
    CASE,
    Case(tokens=1, d_in=64, d_out=48, k=1),
    Case(tokens=65, d_in=96, d_out=200, k=20, bias=True),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Altered(nn.Module):
    """A right layer whose output passes through something wrong."""

    def __init__(self, layer: nn.Module, alter) -> None:
        super().__init__()
        self.layer, self.alter = layer, alter

    def forward(self, x: Tensor) -> Tensor:
        return self.alter(self.layer(x))


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.05


def altered(name: str, alter) -> Candidate:
    right = table()[name]
    return replace(right, build=lambda inputs: Altered(right.build(inputs), alter))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name, row in table().items() for case in (CASES[:1] if row.peer else CASES)],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_candidate_of_the_table_is_right(name: str, case: Case, dtype: torch.dtype) -> None:
    prepare(table()[name], bench_inputs(case, dtype))


@pytest.mark.parametrize("name", [n for n, row in table().items() if n.startswith("peft")])
def test_an_adapter_of_peft_that_does_nothing_is_refused(name: str) -> None:
    inputs = bench_inputs(CASE, torch.bfloat16)
    peft = table()[name]
    idle = replace(peft, build=lambda inputs: FrozenLinear(inputs))
    truth = peft.build(inputs).expected(Exact(inputs))
    with pytest.raises(WrongCandidateError, match="RMS error of y"):
        prepare(replace(idle, expect=lambda exact, layer: truth), inputs)


def test_sparse_peers_train_as_many_numbers_as_neuroada() -> None:
    inputs = bench_inputs(replace(CASE, d_out=64), torch.float32)
    peers = (table()[name] for name in ("peft-shira", "peft-supertuning"))
    assert [Run(peer, inputs).wanted[1].numel() for peer in peers] == [64 * 8, 64 * 8]


def test_the_table_has_a_row_for_every_backend_that_can_run_here() -> None:
    usable = {name for name, unavailable in nk.available_backends().items() if not unavailable}
    assert {c.backend for c in table().values()} == usable | {None}


def test_the_expected_results_are_those_of_the_reference_differentiated_by_autograd() -> None:
    inputs = bench_inputs(replace(CASE, index="random"), torch.float64)
    x, delta = inputs.x.clone().requires_grad_(), inputs.delta.clone().requires_grad_()
    y = reference.neuroada_linear(x, inputs.weight, inputs.index, delta, inputs.bias)
    grad_x, grad_delta = torch.autograd.grad(y, (x, delta), inputs.grad_output)
    expected = Exact(inputs).bypass
    for value, other in (
        (y, expected.y),
        (grad_x, expected.grad_x),
        (grad_delta, expected.grads[0]),
    ):
        assert rms_error(value.detach(), other) <= tolerance(torch.float64, CASE.d_in)


def test_the_bypass_is_as_large_as_the_dense_product() -> None:
    inputs = bench_inputs(CASE, torch.float64)
    exact = Exact(inputs)
    dense = exact.frozen.y - exact.bias
    bypass = exact.bypass.y - exact.frozen.y
    assert 0.5 < (bypass.norm() / dense.norm()).item() < 2


def test_frozen_asks_for_the_gradient_of_x_alone() -> None:
    run = Run(table()["frozen"], bench_inputs(CASE, torch.float32))
    assert [tensor.shape for tensor in run.wanted] == [(33, 64)]


def test_the_gradient_of_masked_dense_is_zero_outside_of_the_chosen() -> None:
    inputs = bench_inputs(CASE, torch.float32)
    run = Run(table()["masked-dense"], inputs)
    assert isinstance(run.layer, MaskedDenseLinear)
    _, grad_weight = run.backward(run.forward())
    rest = grad_weight.scatter(1, inputs.index.long(), 0)
    assert grad_weight.count_nonzero() == inputs.index.numel()
    assert rest.count_nonzero() == 0


@pytest.mark.parametrize("layer", [MaterialisedLinear, MaskedDenseLinear])
def test_baselines_refuse_an_index_with_empty_slots(layer: type[nn.Module]) -> None:
    inputs = bench_inputs(replace(CASE, index="ragged"), torch.float32)
    with pytest.raises(ValueError, match="slots without a connection"):
        layer(inputs)


def test_lora_is_what_peft_computes() -> None:
    peft_lora = pytest.importorskip("peft.tuners.lora")
    inputs = bench_inputs(CASE, torch.float32)
    ours = LoRALinear(inputs)
    base = nn.Linear(CASE.d_in, CASE.d_out)
    base.weight, base.bias = nn.Parameter(inputs.weight), nn.Parameter(inputs.bias)
    config = peft_lora.LoraConfig(r=8, lora_alpha=16)
    theirs = peft_lora.Linear(base, "default", config, r=8, lora_alpha=16)
    theirs.lora_A["default"].weight = ours.lora_A
    theirs.lora_B["default"].weight = ours.lora_B
    torch.testing.assert_close(ours(inputs.x), theirs(inputs.x), rtol=0, atol=0)


def test_a_named_backend_serves_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    from neuroada_kernels import _registry

    eager = _registry._backends["eager"]
    calls = []

    def spy(op: str, implementation: _registry.Implementation) -> _registry.Implementation:
        def run(*args):
            calls.append(op)
            return implementation.run(*args)

        return replace(implementation, run=run)

    watched = {op: spy(op, what) for op, what in eager.implementations.items()}
    monkeypatch.setitem(_registry._backends, "eager", replace(eager, implementations=watched))
    run = Run(table()["neuroada-eager"], bench_inputs(CASE, torch.float32))
    with run.serving():
        run.backward(run.forward())
    assert calls == ["linear", "linear_backward"]


def test_resident_pays_for_patching_in_every_step_and_leaves_the_inputs_alone(monkeypatch) -> None:
    patched, plain = [], nk.ops.patch_
    monkeypatch.setattr(nk.ops, "patch_", lambda *given: patched.append(plain(*given)))
    inputs = bench_inputs(CASE, torch.float32)
    weight = inputs.weight.clone()
    run = Run(table()["resident"], inputs)
    for steps in (1, 2, 3):
        patched.clear()
        for _ in range(steps):
            run.backward(run.forward())
        assert len(patched) == steps
    assert inputs.weight.equal(weight)


def test_automatic_is_the_backend_of_highest_priority() -> None:
    inputs = bench_inputs(CASE, torch.float32)
    best = "cpu" if nk.available_backends()["cpu"] is None else "eager"
    assert automatic(inputs) == f"neuroada-{best}"
    with nk.use_backend("eager"):
        assert automatic(inputs) == "neuroada-eager"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("alter", "what"),
    [
        (lambda y: y * 1.05, "RMS error of y"),
        (ScaledGradient.apply, "RMS error of grad_x"),
        (lambda y: y * float("nan"), "RMS error of y"),
        (lambda y: y.double(), "y is torch.float64"),
        (lambda y: y[:-1], "y is .*32, 48.*, expected .*33, 48"),
    ],
    ids=["output", "gradient", "nan", "dtype", "shape"],
)
def test_a_wrong_candidate_is_refused(alter, what: str, dtype: torch.dtype) -> None:
    inputs = bench_inputs(CASE, dtype)
    prepare(table()["reference"], inputs)
    with pytest.raises(WrongCandidateError, match=what):
        prepare(altered("reference", alter), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_without_its_bypass_is_refused(dtype: torch.dtype) -> None:
    frozen = table()["frozen"]
    impostor = replace(
        frozen, name="impostor", expect=lambda exact, _: replace(exact.bypass, grads=())
    )
    with pytest.raises(WrongCandidateError, match="impostor: the relative RMS error of y"):
        prepare(impostor, bench_inputs(CASE, dtype))


def test_a_layer_that_trains_nothing_is_refused_where_something_must() -> None:
    row = table()["frozen"]
    impostor = replace(row, expect=lambda exact, _: replace(exact.frozen, grads=exact.bypass.grads))
    with pytest.raises(WrongCandidateError, match="0 parameters train, expected 1"):
        prepare(impostor, bench_inputs(CASE, torch.float32))


def test_nothing_is_timed_once_a_candidate_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []
    monkeypatch.setattr(linear, "measure", lambda *args, **kwargs: timed.append(args))
    wrong = altered("reference", lambda y: y * 1.05)
    with pytest.raises(WrongCandidateError):
        linear.measure_case(CASE, "float32", [table()["frozen"], wrong], 1)
    assert not timed


def test_a_run_that_keeps_going_times_the_others_and_says_that_one_failed(
    monkeypatch, tmp_path: Path, capsys
) -> None:
    rows = {**table(), "full": altered("full", torch.zeros_like)}
    monkeypatch.setattr(linear, "table", lambda: rows)
    path = tmp_path / "a.json"
    case = ["--shapes", "16x8", "--tokens", "4", "--k", "1", "--dtypes", "float32"]
    names = ["--candidates", "full", "lora-r8"]
    arguments = [*case, *names, "--rounds", "2", "--json", str(path)]
    with pytest.raises(WrongCandidateError):
        linear.main(arguments)
    assert linear.main([*arguments, "--keep-going"]) == linear.FAILED
    assert "not timed: full, T4-16to8-k1 float32: WrongCandidateError" in capsys.readouterr().out
    _, measured, skipped = json.loads(path.read_text())["results"]
    assert measured["ratio_to_frozen"]
    assert skipped["failed"]
    assert linear.main(arguments) == linear.FAILED  # from the file


def test_a_backend_that_declines_is_reported_and_not_timed() -> None:
    def decline(inputs):
        raise nk.BackendError("no such instruction set")

    rows = [table()["frozen"], replace(table()["reference"], build=decline)]
    measured, skipped = linear.measure_case(CASE, "float32", rows, 1)
    assert measured.candidate == "frozen"
    assert skipped == Skipped(CASE, "float32", "reference", "no such instruction set")


def test_the_work_of_a_bypass_is_that_of_frozen_and_three_products_of_k_columns() -> None:
    inputs = bench_inputs(CASE, torch.bfloat16)
    work = {name: candidate.work(inputs) for name, candidate in table().items()}
    dense = 33 * 64 * 48
    assert work["frozen"].flops == 4 * dense
    assert work["reference"].flops == 4 * dense + 6 * 33 * 48 * 8
    assert work["lora-r8"].flops == 4 * dense + 6 * 33 * 8 * (64 + 48)
    # W twice, x, y, dy, dx; 2 bytes each.
    assert work["frozen"].bytes == 2 * (2 * 64 * 48 + 2 * 33 * (64 + 48))
    # x again; index and delta twice, ddelta once; 4 bytes each.
    assert work["reference"].bytes == work["frozen"].bytes + 2 * 33 * 64 + 5 * 4 * 48 * 8
