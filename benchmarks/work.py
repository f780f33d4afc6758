"""Minimum FLOPs and bytes of a step of a method, whatever the implementation."""

from __future__ import annotations

from dataclasses import dataclass

from neuroada_kernels.benchmarks.peft_linears import shira_rank
from neuroada_kernels.testing import Inputs


@dataclass(frozen=True)
class Work:
    """Of forward and backward."""

    flops: int
    bytes: int


def frozen(inputs: Inputs) -> Work:
    """Two GEMMs; W read for each, and x, y, dy and dx read or written once."""
    tokens, (d_out, d_in) = inputs.x.shape[0], inputs.weight.shape
    values = 2 * d_out * d_in + 2 * tokens * (d_in + d_out)
    return Work(4 * tokens * d_out * d_in, values * inputs.x.element_size())


def full(inputs: Inputs) -> Work:
    """A third GEMM; x read once more, dW written."""
    least = frozen(inputs)
    return Work(least.flops * 3 // 2, least.bytes + inputs.x.nbytes + inputs.weight.nbytes)


def bypass(inputs: Inputs) -> Work:
    """Three sparse products of k columns; x once more, index and delta per direction, ddelta."""
    return _sparse(inputs, inputs.index.numel())


def shira(inputs: Inputs) -> Work:
    """As :func:`bypass`, with SHiRA's number of entries."""
    return _sparse(inputs, shira_rank(inputs) * sum(inputs.weight.shape))


def _sparse(inputs: Inputs, entries: int) -> Work:
    least = frozen(inputs)
    flops = least.flops + 6 * inputs.x.shape[0] * entries
    each = 2 * inputs.index.element_size() + 3 * inputs.delta.element_size()
    return Work(flops, least.bytes + inputs.x.nbytes + entries * each)


def lora(inputs: Inputs, rank: int) -> Work:
    """Three GEMMs with A and three with B; x once more, A and B per direction, dA and dB."""
    least = frozen(inputs)
    values = rank * sum(inputs.weight.shape)
    flops = least.flops + 6 * inputs.x.shape[0] * values
    return Work(flops, least.bytes + inputs.x.nbytes + 3 * values * inputs.x.element_size())


def dora(inputs: Inputs, rank: int) -> Work:
    """As :func:`lora`, and the norms of ``W + B A``: the GEMM B A, and W once more."""
    least = lora(inputs, rank)
    return Work(least.flops + 2 * rank * inputs.weight.numel(), least.bytes + inputs.weight.nbytes)


def ia3(inputs: Inputs) -> Work:
    """y and dy scaled, a sum of their products; the factors per direction, their gradient."""
    least = frozen(inputs)
    factors = 3 * inputs.weight.shape[0] * inputs.x.element_size()
    return Work(least.flops + 4 * inputs.grad_output.numel(), least.bytes + factors)
