"""Saves the adapter of each method, and loads it into a fresh base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

import neuroada_kernels as nk
from neuroada_kernels.benchmarks.methods import METHODS, OURS, PEFT, training

Save = Callable[[nn.Module, Path], None]
Load = Callable[[nn.Module, Path], nn.Module]


def storage(method: str, k: int) -> tuple[Save, Load]:
    """The functions that save an adapter of a method, and load it into a fresh base."""
    if METHODS[method].source == PEFT or method == "neuroada-peft":
        return _save_pretrained, _load_peft
    if METHODS[method].source == OURS:
        return _save_neuroada, _load_neuroada
    if method == "full":
        return _save_pretrained, _load_whole
    return _save_stand_in, lambda base, folder: _load_stand_in(base, folder, method, k)


def _save_pretrained(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


def _load_peft(base: nn.Module, folder: Path) -> nn.Module:
    from peft import PeftModel

    model: nn.Module = PeftModel.from_pretrained(base, folder)
    return model


def _load_whole(base: nn.Module, folder: Path) -> nn.Module:
    from transformers import LlamaForCausalLM

    model: nn.Module = LlamaForCausalLM.from_pretrained(folder)
    return model


def _save_neuroada(model: nn.Module, folder: Path) -> None:
    nk.save_adapter(model, folder / "adapter.safetensors")


def _load_neuroada(base: nn.Module, folder: Path) -> nn.Module:
    nk.load_adapter(base, folder / "adapter.safetensors")
    return base


def _save_stand_in(model: nn.Module, folder: Path) -> None:
    """Save what trains, and its index: a stand-in has no format of its own."""
    from safetensors.torch import save_file

    index = {name: b for name, b in model.named_buffers() if name.endswith(".index")}
    values = {name: p.detach() for name, p in training(model).items()}
    save_file(values | index, folder / "trained.safetensors")


def _load_stand_in(base: nn.Module, folder: Path, method: str, k: int) -> nn.Module:
    from safetensors.torch import load_file

    model: nn.Module = METHODS[method].adapt(base, k)
    found = model.load_state_dict(load_file(folder / "trained.safetensors"), strict=False)
    assert not found.unexpected_keys
    return model
