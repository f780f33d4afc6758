"""Which parameters of an adapted model train: ``requires_grad`` flags."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from neuroada_kernels._models import find_layers
from neuroada_kernels.config import NeuroAdaConfig
from neuroada_kernels.targets import modules_of_peft


def deltas_of(model: nn.Module) -> set[int]:
    """The ids of all deltas, including those of parked adapters."""
    return {id(delta) for layer in find_layers(model).values() for delta in layer.deltas}


def freeze(model: nn.Module, config: NeuroAdaConfig) -> None:
    """Freeze all parameters except deltas, PEFT's, and biases if the config trains them."""
    kept = deltas_of(model) | {
        id(parameter)
        for module in modules_of_peft(model)
        for parameter in module.parameters(recurse=False)
    }
    for name, parameter in model.named_parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(config.bias == "all" and _is_bias(name))


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2].endswith("bias")


def check_biases_train(model: nn.Module) -> None:
    """Raise if a bias was made under inference_mode: outside, it cannot be made to train."""
    for name, parameter in model.named_parameters():
        if _is_bias(name) and parameter.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(f"{name}: was made under inference_mode, expected one that can train")


@contextlib.contextmanager
def grad_flags_kept_on_error(model: nn.Module) -> Iterator[None]:
    """If the block raises, restore the ``requires_grad`` flag of every parameter."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        raise
