"""The table of candidates: how each is built, what it must compute, and what work it needs.

:func:`prepare` is the only way to something that can be timed, and it refuses a wrong candidate.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from neuroada_kernels import (
    NeuroAdaLinear,
    ReferenceNeuroAdaLinear,
    available_backends,
    use_backend,
)
from neuroada_kernels._registry import serving
from neuroada_kernels.benchmarks.baselines import (
    FrozenLinear,
    LoRALinear,
    MaskedDenseLinear,
    MaterialisedLinear,
    PeftLoRALinear,
)
from neuroada_kernels.reference import merged_weight
from neuroada_kernels.testing import Case, Inputs, make_inputs, rms_error, tolerance

LORA_RANK = 8
PEFT_LORA_RANK = 16
RESIDENT = "resident"


class WrongCandidateError(RuntimeError):
    """A candidate computes something else than it must, and so is not timed."""


@dataclass(frozen=True)
class Expected:
    """What a step must give, in float64; ``grads`` as the layer orders what trains."""

    y: Tensor  # [tokens, d_out]
    grad_x: Tensor  # [tokens, d_in]
    grads: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Work:
    """What forward and backward need at least, whatever an implementation does."""

    flops: int
    bytes: int


class Exact:
    """The float64 results of a case; each is computed once and shared by the candidates."""

    def __init__(self, inputs: Inputs) -> None:
        self.index = inputs.index.long()
        self.x, self.grad_output = inputs.x.double(), inputs.grad_output.double()
        self.frozen_weight = inputs.weight.double()
        self.bias = 0 if inputs.bias is None else inputs.bias.double()
        self.weight = merged_weight(self.frozen_weight, inputs.index, inputs.delta)

    @cached_property
    def frozen(self) -> Expected:
        y = self.x @ self.frozen_weight.t() + self.bias
        return Expected(y, self.grad_output @ self.frozen_weight)

    @cached_property
    def grad_weight(self) -> Tensor:
        return self.grad_output.t() @ self.x

    @cached_property
    def bypass(self) -> Expected:
        y = self.x @ self.weight.t() + self.bias
        grad_delta = self.grad_weight.gather(1, self.index)
        return Expected(y, self.grad_output @ self.weight, (grad_delta,))

    @cached_property
    def masked(self) -> Expected:
        (grad_delta,) = self.bypass.grads
        grad_weight = torch.zeros_like(self.weight).scatter_(1, self.index, grad_delta)
        return replace(self.bypass, grads=(grad_weight,))

    def lora(self, layer: nn.Module) -> Expected:
        assert isinstance(layer, LoRALinear | PeftLoRALinear)
        a, b = layer.lora_A.detach().double(), layer.lora_B.detach().double() * layer.scaling
        hidden, grad_hidden = self.x @ a.t(), self.grad_output @ b
        grad_b = self.grad_output.t() @ hidden * layer.scaling
        return Expected(
            self.frozen.y + hidden @ b.t(),
            self.frozen.grad_x + grad_hidden @ a,
            (grad_hidden.t() @ self.x, grad_b),
        )


@dataclass(frozen=True)
class Candidate:
    """One row of the table.

    ``roundings`` counts, on the longest way from an input to a result, how often a value is
    rounded to the inputs' dtype: the float64 reference is to be met within that many tolerances.
    ``backend``, where not None, serves forward and backward.
    """

    name: str
    build: Callable[[Inputs], nn.Module]
    expect: Callable[[Exact, nn.Module], Expected]
    work: Callable[[Inputs], Work]
    roundings: int = 1
    backend: str | None = None


class Run:
    """A candidate's layer and its inputs: one step is ``backward(forward())`` in ``serving()``."""

    def __init__(self, candidate: Candidate, inputs: Inputs) -> None:
        self.candidate = candidate
        self.layer = candidate.build(inputs)
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
        Candidate("frozen", FrozenLinear, lambda exact, _: exact.frozen, _frozen_work),
        *(
            Candidate(
                f"neuroada-{name}",
                _neuroada,
                lambda exact, _: exact.bypass,
                _bypass_work,
                backend=name,
            )
            for name, unavailable in available_backends().items()
            if unavailable is None
        ),
        # W + delta is rounded, then its product.
        Candidate(RESIDENT, _resident, lambda exact, _: exact.bypass, _bypass_work, 2),
        # The two parts of dx are rounded before they are added.
        Candidate("reference", _reference, lambda exact, _: exact.bypass, _bypass_work, 2),
        # delta is rounded, then W + delta, then their product.
        Candidate(
            "materialised", MaterialisedLinear, lambda exact, _: exact.bypass, _bypass_work, 3
        ),
        # W + delta is rounded, then its product.
        Candidate(
            "masked-dense", MaskedDenseLinear, lambda exact, _: exact.masked, _bypass_work, 2
        ),
        # A(x), then B of it, then the sum.
        Candidate(
            f"lora-r{LORA_RANK}",
            lambda inputs: LoRALinear(inputs, LORA_RANK),
            Exact.lora,
            lambda inputs: _lora_work(inputs, LORA_RANK),
            3,
        ),
    ]
    if find_spec("peft") is not None:
        rows.append(
            Candidate(
                f"peft-lora-r{PEFT_LORA_RANK}",
                lambda inputs: PeftLoRALinear(inputs, PEFT_LORA_RANK),
                Exact.lora,
                lambda inputs: _lora_work(inputs, PEFT_LORA_RANK),
                3,
            )
        )
    return {row.name: row for row in rows}


def automatic(inputs: Inputs) -> str:
    """The name of the candidate that serves these inputs where no backend is named."""
    arguments = (inputs.x, inputs.weight, inputs.index, inputs.delta, inputs.bias)
    return f"neuroada-{serving('linear', *arguments).name}"


def bench_inputs(case: Case, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """The inputs of a case with a bypass as large as the dense product.

    A trained bypass is so small that, in 16 bits, the check of a layer without one would pass.
    """
    inputs = make_inputs(case, dtype, device=device)
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
        _check(candidate, name, grad, value, trained.dtype, tokens, dtype)
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
    own = replace(inputs, weight=inputs.weight.clone())  # for it is the other candidates', too
    layer = SteppedResident.from_linear(
        _linear(own), index=inputs.index, delta_dtype=delta.dtype, strategy=RESIDENT
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


def _frozen_work(inputs: Inputs) -> Work:
    """Two products; W read for each, and x, y, dy and dx passed once."""
    tokens, (d_out, d_in) = inputs.x.shape[0], inputs.weight.shape
    values = 2 * d_out * d_in + 2 * tokens * (d_in + d_out)
    return Work(4 * tokens * d_out * d_in, values * inputs.x.element_size())


def _bypass_work(inputs: Inputs) -> Work:
    """Three products of k columns; x once more, index and delta for each direction, ddelta."""
    frozen = _frozen_work(inputs)
    index, delta = inputs.index, inputs.delta
    entries = 2 * index.nbytes + 3 * delta.nbytes
    flops = frozen.flops + 6 * inputs.x.shape[0] * index.numel()
    return Work(flops, frozen.bytes + inputs.x.nbytes + entries)


def _lora_work(inputs: Inputs, rank: int) -> Work:
    """Three products with A and with B; x once more, A and B for each direction, dA and dB."""
    frozen = _frozen_work(inputs)
    values = rank * sum(inputs.weight.shape)
    flops = frozen.flops + 6 * inputs.x.shape[0] * values
    return Work(flops, frozen.bytes + inputs.x.nbytes + 3 * values * inputs.x.element_size())
