"""Whole runs: the reference's loss curve whatever the strategy, and a run that is killed."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import small_transformer
import torch
from small_transformer import Transformer, adapted, from_file, loss_of, trained, training
from torch import nn

import neuroada_kernels as nk

STEPS, LR = 25, 0.02
#: Of the loss, anywhere along a run: in bfloat16 two units in the last place.
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
every_dtype = pytest.mark.parametrize("dtype", list(ALLOWED), ids=str)
CHECKPOINTING = pytest.mark.parametrize(
    "checkpointing", [None, True, False], ids=["stored", "reentrant", "non_reentrant"]
)


def run(model: nn.Module) -> list[float]:
    optimizer = torch.optim.AdamW(trained(model).values(), lr=LR)
    return list(itertools.islice(training(model, optimizer), STEPS))


@cache
def reference_curve(dtype: torch.dtype) -> list[float]:
    return run(adapted(dtype=dtype, layer_type=nk.ReferenceNeuroAdaLinear))


@cache
def stored_curve(strategy: str, dtype: torch.dtype) -> list[float]:
    return run(adapted(dtype=dtype, strategy=strategy, save_activations="full"))


def mixed_precision_curve(dtype: torch.dtype) -> list[float]:
    """Float32 masters of the chosen weights, written out: no layer of the package's is in it.

    In every step the model's weights are the masters rounded to its dtype, its dense gradients are
    read at the chosen entries, and the optimiser steps the masters' distance from the base.
    """
    torch.manual_seed(0)
    model = Transformer().to(dtype)
    chosen, base, deltas = {}, {}, {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight
            chosen[weight] = nk.select(weight, 4).long()
            base[weight] = weight.detach().clone()
            deltas[weight] = nn.Parameter(torch.zeros(chosen[weight].shape))
    optimizer = torch.optim.AdamW(deltas.values(), lr=LR)
    losses = []
    for step in range(STEPS):
        with torch.no_grad():
            for weight, index in chosen.items():
                master = base[weight].gather(1, index).float() + deltas[weight]
                weight.scatter_(1, index, master.to(dtype))
        model.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        for weight, index in chosen.items():
            deltas[weight].grad = weight.grad.gather(1, index).float()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same_curve(curve: list[float], expected: list[float], dtype: torch.dtype) -> None:
    assert expected[-1] < 0.8 * expected[0], "a run that learns nothing shows nothing"
    torch.testing.assert_close(
        torch.tensor(curve), torch.tensor(expected), rtol=ALLOWED[dtype], atol=0
    )


@CHECKPOINTING
@pytest.mark.parametrize("strategy", ["bypass", "resident"])
@pytest.mark.parametrize("save_activations", ["full", "compact"])
@every_dtype
def test_the_loss_curve_is_the_reference_layers(save_activations, strategy, checkpointing, dtype):
    model = adapted(checkpointing, dtype, strategy=strategy, save_activations=save_activations)
    kept = [module.columns is not None for module in model.modules() if hasattr(module, "columns")]
    assert any(kept) == (save_activations == "compact")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    curve = run(model)
    assert_same_curve(curve, reference_curve(dtype), dtype)
    assert curve == stored_curve(strategy, dtype), "neither recomputing nor compacting is inexact"
    for name, tensor in model.state_dict().items():
        assert tensor.equal(before[name]) == (not name.endswith("delta")), name


@every_dtype
def test_resident_is_mixed_precision_with_float32_masters(dtype):
    curve, expected = stored_curve("resident", dtype), mixed_precision_curve(dtype)
    assert curve[0] == expected[0]
    assert_same_curve(curve, expected, dtype)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_other_optimisers_train_it_too(optimizer):
    curves = []
    for options in ({"strategy": "resident"}, {"layer_type": nk.ReferenceNeuroAdaLinear}):
        model = adapted(**options)
        steps = optimizer(trained(model).values(), lr=LR)
        curves.append(list(itertools.islice(training(model, steps), 8)))
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-5, atol=0)


@pytest.fixture
def base(tmp_path) -> Path:
    """A file with the state of a model that was never adapted."""
    torch.manual_seed(0)
    file = tmp_path / "base.pt"
    torch.save(Transformer().state_dict(), file)
    return file


def kill_after(steps: int, base: Path, folder: Path) -> None:
    command = [sys.executable, small_transformer.__file__, str(base), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if int(line) >= steps:
                    break
        finally:
            os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def test_a_run_that_is_killed_leaves_its_base_and_goes_on_from_its_adapter(base, tmp_path):
    content = base.read_bytes()
    kill_after(6, base, tmp_path)
    assert base.read_bytes() == content

    steps = max(int(file.stem) for file in tmp_path.glob("*.safetensors"))
    assert steps >= 6
    model = from_file(str(base), strategy="resident")
    nk.load_adapter(model, tmp_path / f"{steps}.safetensors")
    optimizer = torch.optim.AdamW(trained(model).values(), lr=LR)
    optimizer.load_state_dict(torch.load(tmp_path / f"{steps}.optimizer"))
    resumed = list(itertools.islice(training(model, optimizer, first=steps), 5))

    whole = from_file(str(base), strategy="resident")
    optimizer = torch.optim.AdamW(trained(whole).values(), lr=LR)
    uninterrupted = list(itertools.islice(training(whole, optimizer), steps + 5))
    assert resumed == uninterrupted[steps:]
    nk.set_strategy(model, "bypass")
    plain = torch.load(base)
    assert all(model.state_dict()[name].equal(tensor) for name, tensor in plain.items())
    assert base.read_bytes() == content


def test_the_weights_of_that_run_are_the_files_own_pages(base):
    """Otherwise the test before this one would show nothing of the file."""
    model = from_file(str(base), strategy="resident")
    layer = model.blocks[0].up
    maps = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in maps if line.endswith(base.name)]
    address = layer.weight.data_ptr()
    assert any(int(low, 16) <= address < int(high, 16) for low, high in ranges)
    before = layer.weight.clone()
    nn.init.normal_(layer.delta)
    layer(torch.randn(2, layer.in_features))
    assert not layer.weight.equal(before)
    assert torch.load(base)["blocks.0.up.weight"].equal(before)
