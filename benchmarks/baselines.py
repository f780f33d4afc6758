"""Linears that NeuroAda's is compared to: the frozen one, and those of other methods.

All take their tensors from :class:`neuroada_kernels.testing.Inputs`, so that they do the same work.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuroada_kernels import reference
from neuroada_kernels.benchmarks.exact import Exact, Expected
from neuroada_kernels.testing import Inputs


class FrozenLinear(nn.Module):
    """``y = x W^T + b``, nothing trains: forward and dx, the minimum of any method."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.weight = nn.Parameter(inputs.weight, requires_grad=False)
        bias = inputs.bias
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class MaterialisedLinear(FrozenLinear):
    """``W + delta`` built in every forward, as the method's authors and PEFT's sparse tuners do.

    ``delta`` has the weight's dtype, because ``scatter_add`` requires it.
    """

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        self.register_buffer("index", _columns(inputs.index))
        self.delta = nn.Parameter(inputs.delta.to(inputs.weight.dtype))

    index: Tensor  # int64, [d_out, k]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.scatter_add(1, self.index, self.delta), self.bias)


class MaskedDenseLinear(nn.Module):
    """Mask-based selective tuning: a dense trainable weight, its gradient masked to the chosen.

    The weight holds ``W + delta``, so that the layer computes what the others do.
    """

    mask: Tensor  # [d_out, d_in], 1 where chosen

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        mask = torch.zeros_like(inputs.weight).scatter_(1, _columns(inputs.index), 1)
        # In the weight's dtype: multiplying by a bool mask is slower.
        self.register_buffer("mask", mask)
        merged = reference.merged_weight(inputs.weight, inputs.index, inputs.delta)
        self.weight = nn.Parameter(merged)
        self.weight.register_hook(lambda grad: grad * mask)
        bias = inputs.bias
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class LoRALinear(FrozenLinear):
    """``y = x W^T + b + scaling * B(A(x))`` of rank ``r``, in the order in which PEFT computes it.

    A and B have the weight's dtype. PEFT's own default for a 16-bit model, float32 adapters, costs
    more. B is nonzero, as after training.
    """

    def __init__(self, inputs: Inputs, r: int = 8, scaling: float = 2.0) -> None:
        super().__init__(inputs)
        d_out, d_in = inputs.weight.shape
        self.scaling = scaling
        generator = torch.Generator().manual_seed(0)

        def normal(rows: int, columns: int, scale: float) -> nn.Parameter:
            values = torch.randn(rows, columns, generator=generator) * scale
            return nn.Parameter(values.to(inputs.weight))

        # The branch is as large as the GEMM's result, so that an error in it is seen.
        self.lora_A = normal(r, d_in, d_in**-0.5)
        self.lora_B = normal(d_out, r, r**-0.5 / scaling)

    def expected(self, exact: Exact) -> Expected:
        return exact.lora(
            self.lora_A.detach().double(), self.lora_B.detach().double(), self.scaling
        )

    def forward(self, x: Tensor) -> Tensor:
        result = F.linear(x, self.weight, self.bias)
        return result + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scaling


class FullLinear(nn.Module):
    """Full fine-tuning: W trains, and the bias if there is one."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.weight = nn.Parameter(inputs.weight)
        self.bias = None if inputs.bias is None else nn.Parameter(inputs.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def _columns(index: Tensor) -> Tensor:
    if bool((index < 0).any()):
        raise ValueError("index: has slots without a connection, expected k columns in every row")
    return index.long()
