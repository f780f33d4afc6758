"""The table of candidates: how each is built, what it must compute, and what work it needs.

Only :func:`prepare` makes something that can be timed, and it raises for a wrong candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from neuroada_kernels import (
    NeuroAdaLinear,
    ReferenceNeuroAdaLinear,
    available_backends,
    order_slots,
    use_backend,
)
from neuroada_kernels._registry import serving
from neuroada_kernels.benchmarks import work
from neuroada_kernels.benchmarks.baselines import (
    FrozenLinear,
    FullLinear,
    LoRALinear,
    MaskedDenseLinear,
    MaterialisedLinear,
)
from neuroada_kernels.benchmarks.exact import Exact, Expected
from neuroada_kernels.benchmarks.peft_linears import (
    PeftDoRALinear,
    PeftIA3Linear,
    PeftLoRALinear,
    PeftSHiRALinear,
    PeftSupertuningLinear,
)
from neuroada_kernels.benchmarks.work import Work
from neuroada_kernels.testing import Case, Inputs, make_inputs, rms_error, tolerance

LORA_RANK = 8
PEFT_LORA_RANK = 16
PEFT_LORA_RANKS = (8, PEFT_LORA_RANK, 64)
RESIDENT = "resident"

Needs = Callable[[Inputs], Work]


class WrongCandidateError(RuntimeError):
    """A candidate computes something else than it must, and so is not timed."""


@dataclass(frozen=True)
class Candidate:
    """One row of the table.

    ``roundings`` counts, on the longest path from an input to a result, how often a value is
    rounded to the inputs' dtype: that many tolerances are allowed against the float64 reference.
    ``backend``, if not None, serves forward and backward. A ``peer`` runs only on request.
    ``nested``: a parameter's gradient is a sum over tokens of sums over features.
    """

    name: str
    build: Callable[[Inputs], nn.Module]
    expect: Callable[[Exact, Any], Expected]
    work: Needs
    roundings: int = 1
    backend: str | None = None
    peer: bool = False
    nested: bool = False


class Run:
    """A candidate's layer and its inputs: one step is ``backward(forward())`` in ``serving()``.

    It has its own copy of the weight: one that another candidate has just read would still be in a
    cache, which made the frozen linear 2 % faster.
    """

    def __init__(self, candidate: Candidate, inputs: Inputs) -> None:
        self.candidate = candidate
        self.layer = candidate.build(replace(inputs, weight=inputs.weight.clone()))
        self.x = inputs.x.detach().requires_grad_()
        self.grad_output = inputs.grad_output
        trains = [p for p in self.layer.parameters() if p.requires_grad]
        self.wanted = (self.x, *trains)

    def serving(self) -> AbstractContextManager[None]:
        backend = self.candidate.backend
        return nullcontext() if backend is None else use_backend(backend)

    def forward(self) -> Tensor:
        y: Tensor = self.layer(self.x)
        return y

    def backward(self, y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, self.wanted, self.grad_output)


def table() -> dict[str, Candidate]:
    """The candidates by name; one of NeuroAda for every backend that can run here."""
    rows = [
        Candidate("frozen", FrozenLinear, lambda exact, _: exact.frozen, work.frozen),
        *(
            Candidate(
                f"neuroada-{name}",
                _neuroada,
                lambda exact, _: exact.bypass,
                work.bypass,
                backend=name,
            )
            for name, unavailable in available_backends().items()
            if unavailable is None
        ),
        # W + delta is rounded, then the GEMM's result.
        Candidate(RESIDENT, _resident, lambda exact, _: exact.bypass, work.bypass, 2),
        # The two parts of dx are rounded before they are added.
        Candidate("reference", _reference, lambda exact, _: exact.bypass, work.bypass, 2),
        # delta is rounded, then W + delta, then the GEMM's result.
        Candidate(
            "materialised", MaterialisedLinear, lambda exact, _: exact.bypass, work.bypass, 3
        ),
        # W + delta is rounded, then the GEMM's result.
        Candidate("masked-dense", MaskedDenseLinear, lambda exact, _: exact.masked, work.bypass, 2),
        # A(x), then B of it, then the sum.
        Candidate(
            f"lora-r{LORA_RANK}",
            lambda inputs: LoRALinear(inputs, LORA_RANK),
            lambda exact, layer: layer.expected(exact),
            lambda inputs: work.lora(inputs, LORA_RANK),
            3,
            nested=True,
        ),
        Candidate("full", FullLinear, lambda exact, _: exact.full, work.full, peer=True),
        *(_peft() if find_spec("peft") is not None else ()),
    ]
    return {row.name: row for row in rows}


def _peft() -> Iterator[Candidate]:
    """The methods of PEFT; LoRA of one rank is always compared, the others are peers."""
    row = partial(Candidate, expect=lambda exact, layer: layer.expected(exact))
    for r in PEFT_LORA_RANKS:
        # A(x), then B of it, then the sum.
        yield row(
            f"peft-lora-r{r}",
            partial(PeftLoRALinear, r=r),
            work=partial(work.lora, rank=r),
            roundings=3,
            nested=True,
            peer=r != PEFT_LORA_RANK,
        )
    peer = partial(row, peer=True)
    # B A, W + B A, its norm, the factor, B(A(x)) twice, the factor times it, and two sums.
    r = PEFT_LORA_RANK
    dora, needs = partial(PeftDoRALinear, r=r), partial(work.dora, rank=r)
    yield peer(f"peft-dora-r{r}", dora, work=needs, roundings=8, nested=True)
    # The frozen GEMM's result, then its scaled form.
    yield peer("peft-ia3", PeftIA3Linear, work=work.ia3, roundings=2, nested=True)
    # W + delta is rounded, then the GEMM's result.
    yield peer("peft-shira", PeftSHiRALinear, work=work.shira, roundings=2)
    # delta is rounded, then W + delta, then the GEMM's result.
    yield peer("peft-supertuning", PeftSupertuningLinear, work=work.bypass, roundings=3)


def automatic(inputs: Inputs) -> str:
    """The name of the candidate that serves these inputs by default."""
    arguments = (inputs.x, inputs.weight, inputs.index, inputs.delta, inputs.bias)
    return f"neuroada-{serving('linear', *arguments).name}"


def bench_inputs(case: Case, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """The inputs of a case with a bypass as large as the GEMM's result.

    A trained bypass is so small that, in 16 bits, the check of a layer without one would pass.
    """
    inputs = make_inputs(case, dtype, device=device)
    if device == "cuda":  # as in a layer that selects its connections
        inputs = replace(inputs, index=order_slots(inputs.index))
    rms = inputs.delta.square().mean().sqrt()
    return replace(inputs, delta=inputs.delta / (rms * case.k**0.5))


def prepare(candidate: Candidate, inputs: Inputs, exact: Exact | None = None) -> Run:
    """Build the candidate, and check a step of it against the float64 reference.

    Parameters
    ----------
    candidate : Candidate
        A row of :func:`table`.
    inputs : Inputs
        From :func:`bench_inputs`.
    exact : Exact, optional
        Of the same inputs, where several candidates share it.

    Raises
    ------
    WrongCandidateError
        If a result is not as expected: in number, shape, dtype or value.
    BackendError
        If the candidate's backend does not serve these inputs.
    """
    run = Run(candidate, inputs)
    expected = candidate.expect(exact or Exact(inputs), run.layer)
    d_out, d_in = inputs.weight.shape
    tokens, k = inputs.x.shape[0], inputs.index.shape[1]
    dtype = inputs.x.dtype
    with run.serving():
        y = run.forward()
        _check(candidate, "y", y, expected.y, dtype, d_in + k, dtype)
        grad_x, *grads = run.backward(y)
    _check(candidate, "grad_x", grad_x, expected.grad_x, dtype, d_out + k, dtype)
    if len(grads) != len(expected.grads):
        raise WrongCandidateError(
            f"{candidate.name}: {len(grads)} parameters train, expected {len(expected.grads)}"
        )
    for trained, grad, value in zip(run.wanted[1:], grads, expected.grads, strict=True):
        name = f"gradient {list(grad.shape)}"
        summed = tokens + (d_in + d_out if candidate.nested else 0)
        _check(candidate, name, grad, value, trained.dtype, summed, dtype)
    return run


def _check(
    candidate: Candidate,
    name: str,
    value: Tensor,
    expected: Tensor,
    output: torch.dtype,
    reduction: int,
    dtype: torch.dtype,
) -> None:
    if value.shape != expected.shape or value.dtype != output:
        raise WrongCandidateError(
            f"{candidate.name}: {name} is {value.dtype} {list(value.shape)}, "
            f"expected {output} {list(expected.shape)}"
        )
    allowed = candidate.roundings * tolerance(dtype, reduction, output)
    error = rms_error(value.detach(), expected)
    if not error <= allowed:  # so that NaN is refused too
        raise WrongCandidateError(
            f"{candidate.name}: the relative RMS error of {name} is {error:.2e}, "
            f"expected at most {allowed:.2e}"
        )


def _linear(inputs: Inputs) -> nn.Linear:
    d_out, d_in = inputs.weight.shape
    linear = nn.Linear(d_in, d_out, inputs.bias is not None, "meta")
    linear.weight = nn.Parameter(inputs.weight)
    linear.bias = None if inputs.bias is None else nn.Parameter(inputs.bias)  # type: ignore[assignment]
    return linear


def _neuroada(inputs: Inputs) -> nn.Module:
    delta = inputs.delta
    layer = NeuroAdaLinear.from_linear(_linear(inputs), index=inputs.index, delta_dtype=delta.dtype)
    layer.delta.data.copy_(delta)
    return layer


def _resident(inputs: Inputs) -> nn.Module:
    delta = inputs.delta
    layer = SteppedResident.from_linear(
        _linear(inputs), index=inputs.index, delta_dtype=delta.dtype, strategy=RESIDENT
    )
    layer.delta.data.copy_(delta)
    return layer


class SteppedResident(NeuroAdaLinear):
    """Its ``delta`` counts as changed before every forward, as after a step of an optimiser."""

    def forward(self, x: Tensor) -> Tensor:
        torch.autograd.graph.increment_version(self.delta)
        return super().forward(x)


def _reference(inputs: Inputs) -> nn.Module:
    delta = inputs.delta
    layer = ReferenceNeuroAdaLinear.from_linear(
        _linear(inputs), index=inputs.index, delta_dtype=delta.dtype
    )
    layer.delta.data.copy_(delta)
    return layer
