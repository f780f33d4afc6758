"""What a layer must compute, without the package's own code."""

from __future__ import annotations

import torch
from torch import Tensor


def effective_weight(layer) -> Tensor:
    """``W[j, index[j, s]] + delta[j, s]`` in float64, entry by entry; W as the layer saves it."""
    assert not layer.merged
    weight = layer.state_dict()["weight"].double().clone()
    for j, columns in enumerate(layer.index.tolist()):
        for s, column in enumerate(columns):
            if column >= 0:
                weight[j, column] += layer.delta[j, s].item()
    return weight


def state_of(layer) -> dict[str, Tensor]:
    """A copy of everything the layer saves, to compare with later."""
    return {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}


def assert_state(layer, expected: dict[str, Tensor]) -> None:
    """The layer holds exactly ``expected``, bit for bit."""
    actual = state_of(layer)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def input_gradient(layer, tokens: int = 5) -> tuple[Tensor, Tensor]:
    """The gradient of ``x`` that the layer returns, and the one of the formula."""
    x = torch.randn(tokens, layer.in_features, dtype=layer.weight.dtype, requires_grad=True)
    grad_output = torch.randn(tokens, layer.out_features, dtype=layer.weight.dtype)
    layer(x).backward(grad_output)
    expected = grad_output.double() @ effective_weight(layer)
    return x.grad, expected


def other_index(layer) -> Tensor:
    """A valid index with other connections than the layer's: the columns it does not choose."""
    chosen = torch.zeros(layer.out_features, layer.in_features, dtype=torch.bool)
    chosen.scatter_(1, layer.index.clamp(min=0).long(), True)
    free = [(~row).nonzero()[: layer.k, 0] for row in chosen]
    return torch.stack(free).int()
