"""Bases of every kind with a foreign forward, and their weights as their library reads them."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

D_IN, D_OUT = 64, 48


def library(name: str) -> ModuleType:
    """Import a library without its warnings, or skip the test.

    bitsandbytes compiles functions of its CPU backend, which takes a C++ compiler half a minute;
    here they stay uncompiled, which gives the same results.
    """
    compile_nothing = mock.patch("torch.compile", lambda function=None, **_: function)
    with warnings.catch_warnings(), compile_nothing:
        warnings.simplefilter("ignore")
        pytest.importorskip(name.partition(".")[0])
        return importlib.import_module(name)


class Conv1D(nn.Module):
    """A copy of transformers', under the same name, for when that is not installed."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / 8)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


Conv1D.__module__ = "transformers.pytorch_utils"


class Scaled(nn.Module):
    """A third-party layer: a weight like that of nn.Linear, and a forward of its own."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.weight = nn.Parameter(torch.randn(d_out, d_in) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


class Hidden(nn.Module):
    """A third-party layer that has no ``weight``."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.parts = nn.ParameterList([torch.randn(d_out, d_in // 2) / 8 for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.cat(list(self.parts), 1).t()


def _nf4(linear: nn.Linear, **options) -> nn.Module:
    bnb = library("bitsandbytes")
    d_out, d_in = linear.weight.shape
    options = {"quant_type": "nf4", "compute_dtype": linear.weight.dtype, **options}
    layer = bnb.nn.Linear4bit(d_in, d_out, **options).to(linear.weight.dtype)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def _int8(linear: nn.Linear) -> nn.Module:
    bnb = library("bitsandbytes")
    d_out, d_in = linear.weight.shape
    layer = bnb.nn.Linear8bitLt(d_in, d_out, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def _torchao(linear: nn.Linear, config: str, **options) -> nn.Module:
    ao = library("torchao.quantization")
    holder = nn.Sequential(linear)
    if config == "IntxWeightOnlyConfig":
        options = {"weight_dtype": torch.int4, "granularity": ao.PerGroup(32)}
    ao.quantize_(holder, getattr(ao, config)(**options))
    return holder[0]


QUANTISED = {
    "nf4": _nf4,
    "fp4": lambda linear: _nf4(linear, quant_type="fp4", compress_statistics=False),
    "int8": _int8,
    "torchao-int8": lambda linear: _torchao(linear, "Int8WeightOnlyConfig"),
    "torchao-int4": lambda linear: _torchao(linear, "IntxWeightOnlyConfig"),
    "torchao-float8": lambda linear: _torchao(linear, "Float8WeightOnlyConfig"),
}
PLAIN = ["conv1d", "scaled"]
KINDS = [*PLAIN, *QUANTISED]


def make(kind: str, d_in: int = D_IN, d_out: int = D_OUT, dtype=torch.float32) -> nn.Module:
    """A base of that kind with random values."""
    if kind == "conv1d":
        return Conv1D(d_out, d_in).to(dtype)
    if kind in ("scaled", "hidden"):
        return {"scaled": Scaled, "hidden": Hidden}[kind](d_in, d_out).to(dtype)
    return QUANTISED[kind](nn.Linear(d_in, d_out, dtype=dtype))


def dense(base: nn.Module) -> Tensor:
    """The dense ``W [d_out, d_in]`` of a base, by the library's own function."""
    weight = base.weight
    if isinstance(base, Conv1D):
        return weight.detach().t().clone()
    if hasattr(weight, "quant_state"):
        bnb = library("bitsandbytes")
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    if weight.dtype == torch.int8:
        scales = weight.SCB if weight.SCB is not None else base.state.SCB
        return weight.data.float() * (scales / 127)[:, None]
    if type(weight) is nn.Parameter:
        return weight.detach().clone()
    return weight.dequantize()


def raw(base: nn.Module) -> list[Tensor]:
    """Copies of all bytes that a base holds, including the parts of tensor subclasses."""
    found: list[Tensor] = []
    for tensor in (*base.parameters(), *base.buffers()):
        if hasattr(tensor, "quant_state"):
            found += [tensor.data, tensor.quant_state.absmax]
        elif hasattr(tensor, "__tensor_flatten__"):
            found += [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        else:
            found.append(tensor.data)
    return [tensor.detach().clone() for tensor in found]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(
        a.dtype == b.dtype and torch.equal(a.float(), b.float())
        for a, b in zip(first, second, strict=True)
    )


def effective(layer) -> Tensor:
    """``W + delta`` in float64, entry by entry."""
    weight = dense(layer.base).double()
    for j, columns in enumerate(layer.index.tolist()):
        for s, column in enumerate(columns):
            if column >= 0:
                weight[j, column] += layer.delta[j, s].item()
    return weight
