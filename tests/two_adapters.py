"""A model with two adapters in different modules, and models with one of them each."""

from __future__ import annotations

import torch
from adapted import TARGETS, Model, adapted, trained
from foreign import Conv1D
from torch import Tensor, nn

import neuroada_kernels as nk

FIRST = {"k": 2, "target_modules": TARGETS}
SECOND = {"k": 3, "target_modules": ["up", "head"], "selection": "smallest"}
STRATEGIES = ["bypass", "resident"]
ROWS = ["second", "default", "__base__", "second", "default"]


class Transposed(nn.Module):
    """Linears, and a ``Conv1D`` that a layer wraps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(6, 12), Conv1D(6, 12), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.down(self.up(x))))


def both(strategy: str = "bypass", dtype: torch.dtype = torch.float32) -> Model:
    """A model with an adapter "default", which is active, and another one in other modules."""
    model = adapted(dtype=dtype)
    nk.add_adapter(model, "second", **SECOND)
    nk.set_adapter(model, "second")
    trained(model, 1)
    nk.set_adapter(model, "default")
    nk.set_strategy(model, strategy)
    return model


def alone(name: str, strategy: str = "bypass", dtype: torch.dtype = torch.float32) -> Model:
    """The same model with one of the two adapters."""
    model = Model(dtype=dtype)
    nk.adapt(model, **(FIRST if name == "default" else SECOND))
    trained(model, 0 if name == "default" else 1)
    nk.set_strategy(model, strategy)
    return model


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradient of x and of everything that trains."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    deltas = [p.grad for p in model.parameters() if p.requires_grad]
    return [y.detach(), x.grad, *deltas]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    assert all(a.equal(e) for a, e in zip(actual, expected, strict=True))
