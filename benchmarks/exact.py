"""The expected results of a step of a method, in float64, to check candidates against."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from neuroada_kernels.reference import merged_weight
from neuroada_kernels.testing import Inputs


@dataclass(frozen=True)
class Expected:
    """Expected results of a step in float64; ``grads`` in the order of the layer's parameters."""

    y: Tensor  # [tokens, d_out]
    grad_x: Tensor  # [tokens, d_in]
    grads: tuple[Tensor, ...] = ()


class Exact:
    """The float64 results of a case; each is computed once and shared by the candidates."""

    def __init__(self, inputs: Inputs) -> None:
        self.index = inputs.index.long()
        self.x, self.grad_output = inputs.x.double(), inputs.grad_output.double()
        self.frozen_weight = inputs.weight.double()
        self.has_bias = inputs.bias is not None
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

    @cached_property
    def full(self) -> Expected:
        """W and the bias train."""
        grads = (self.grad_weight, self.grad_output.sum(0))
        return replace(self.frozen, grads=grads[: 1 + self.has_bias])

    def lora(self, a: Tensor, b: Tensor, scaling: float) -> Expected:
        """``y = x W^T + b + scaling * x A^T B^T``; A [r, d_in], B [d_out, r]."""
        hidden, grad_hidden = self.x @ a.t(), self.grad_output @ b * scaling
        grad_b = self.grad_output.t() @ hidden * scaling
        return Expected(
            self.frozen.y + hidden @ b.t() * scaling,
            self.frozen.grad_x + grad_hidden @ a,
            (grad_hidden.t() @ self.x, grad_b),
        )

    def dora(self, a: Tensor, b: Tensor, magnitude: Tensor, scaling: float) -> Expected:
        """``W + scaling * B A``, each row scaled to its magnitude; its norm has no gradient."""
        weight = self.frozen_weight + scaling * b @ a
        norm = weight.norm(dim=1)
        scaled = self.grad_output * (magnitude / norm)
        product = self.x @ weight.t()
        return Expected(
            product * (magnitude / norm) + self.bias,
            scaled @ weight,
            (
                scaling * (scaled @ b).t() @ self.x,
                scaling * scaled.t() @ (self.x @ a.t()),
                (self.grad_output * product).sum(0) / norm,
            ),
        )

    def ia3(self, scale: Tensor) -> Expected:
        """``y = scale * (x W^T + b)``; scale [d_out, 1]."""
        scaled = self.grad_output * scale.t()
        grad = (self.grad_output * self.frozen.y).sum(0)[:, None]
        return Expected(self.frozen.y * scale.t(), scaled @ self.frozen_weight, (grad,))

    def sparse(self, positions: Tensor, values: Tensor) -> Expected:
        """A bypass at any ``positions`` of the flat weight, any number in a row."""
        weight = self.frozen_weight.flatten().scatter_add(0, positions, values)
        weight = weight.view_as(self.frozen_weight)
        y = self.x @ weight.t() + self.bias
        return Expected(y, self.grad_output @ weight, (self.grad_weight.flatten()[positions],))
