"""A small adapted model, and a check that a failed load leaves a model unchanged."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import neuroada_kernels as nk


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """Two blocks and a head, ``[..., 6]`` to ``[..., 4]``."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList([Block(6), Block(6)])
        self.head = nn.Linear(6, 4)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


TARGETS = ["up", "down"]
NAMES = [f"blocks.{i}.{name}" for i in range(2) for name in TARGETS]


def adapted(
    k: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32, **options: object
) -> Model:
    """An adapted model whose deltas have values, as after training."""
    model = Model(dtype=dtype)
    nk.adapt(model, k, TARGETS, **options)
    return trained(model, seed)


def trained(model: nn.Module, seed: int) -> nn.Module:
    """Give every parameter that trains other values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) / 8
    return model


def regression(model: nn.Module, x: Tensor, target: Tensor, steps: int, lr: float) -> list[float]:
    """The losses of training what trains, by AdamW, towards ``target``."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(7)).to(dtype)


class Unchanged:
    """Asserts that modules, tensors, values and flags of the model are the same after the block."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def facts(self) -> object:
        named = dict(self.model.named_modules(remove_duplicate=False))
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        buffers = dict(self.model.named_buffers(remove_duplicate=False))
        return (
            {name: id(module) for name, module in named.items()},
            {name: (id(p), p.requires_grad) for name, p in parameters.items()},
            {name: id(buffer) for name, buffer in buffers.items() if not name.endswith("plan")},
        )

    def values(self) -> dict[str, Tensor]:
        return {name: t.detach().clone() for name, t in self.model.state_dict().items()}

    def __enter__(self) -> None:
        self.before = self.facts(), self.values()

    def __exit__(self, *error: object) -> None:
        facts, values = self.before
        assert self.facts() == facts
        for name, tensor in self.values().items():
            assert torch.equal(tensor, values[name]), name


def layers(model: nn.Module) -> dict[str, nk.NeuroAdaLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nk.NeuroAdaLinear)}


def assert_same_adapter(first: nn.Module, second: nn.Module) -> None:
    assert layers(first).keys() == layers(second).keys()
    for name, layer in layers(first).items():
        other = layers(second)[name]
        assert torch.equal(layer.index, other.index), name
        assert layer.delta.dtype == other.delta.dtype, name
        assert torch.equal(layer.delta, other.delta), name
