"""Adapters on disk: what comes back, what is refused, and what a file holds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from adapted import NAMES, TARGETS, Model, adapted, assert_same_adapter, inputs, layers, trained
from safetensors import safe_open
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import neuroada_kernels as nk
from neuroada_kernels.adapter_file import read_adapter


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adapter.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("delta_dtype", [torch.float32, torch.bfloat16])
def test_an_unadapted_model_becomes_the_one_that_was_saved(path, dtype, delta_dtype):
    model = adapted(dtype=dtype, delta_dtype=delta_dtype)
    nk.save_adapter(model, path)
    other = Model(dtype=dtype)
    summary = nk.load_adapter(other, path)
    assert summary.modules == tuple(NAMES)
    assert_same_adapter(model, other)
    assert torch.equal(other(inputs(dtype)), model(inputs(dtype)))
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in other.named_parameters()} == flags


@pytest.mark.parametrize("state", ["as it was", "merged", "resident"])
def test_what_is_saved_does_not_depend_on_what_the_weight_holds(path, state):
    model = adapted(dtype=torch.bfloat16)
    nk.save_adapter(model, path)
    before = path.read_bytes()
    if state == "merged":
        nk.merge(model)
    elif state == "resident":
        nk.set_strategy(model, "resident")
        model(inputs(torch.bfloat16))
    nk.save_adapter(model, path)
    assert path.read_bytes() == before


@pytest.mark.filterwarnings("ignore:delta. new parameters")
@pytest.mark.parametrize("k", [1, 3], ids=["of other connections", "of more connections"])
def test_resident_layers_load_an_adapter(path, k):
    saved = adapted(dtype=torch.bfloat16, k=k, selection="smallest")
    nk.save_adapter(saved, path)
    model = adapted(dtype=torch.bfloat16)
    base = {name: layer.weight.clone() for name, layer in layers(model).items()}
    nk.set_strategy(model, "resident")
    model(inputs(torch.bfloat16))
    nk.load_adapter(model, path)
    assert_same_adapter(model, saved)
    nk.set_strategy(saved, "resident")
    assert torch.equal(model(inputs(torch.bfloat16)), saved(inputs(torch.bfloat16)))
    nk.set_strategy(model, "bypass")
    for name, layer in layers(model).items():
        assert torch.equal(layer.weight, base[name]), name


def test_a_refused_adapter_leaves_resident_layers_as_they_were(path):
    other = Model(seed=1)
    nk.adapt(other, 2, TARGETS)
    nk.save_adapter(other, path)
    model = adapted()
    nk.set_strategy(model, "resident")
    model(inputs())
    held = {name: layer.weight.clone() for name, layer in layers(model).items()}
    with pytest.raises(ValueError, match="not what the adapter is for"):
        nk.load_adapter(model, path)
    for name, layer in layers(model).items():
        assert layer.strategy == "resident"
        assert torch.equal(layer.weight, held[name]), name


def test_an_adapted_model_keeps_the_parameters_that_an_optimizer_holds(path):
    nk.save_adapter(adapted(seed=1), path)
    model = adapted(seed=2)
    deltas = {name: layer.delta for name, layer in layers(model).items()}
    nk.load_adapter(model, path)
    assert all(layer.delta is deltas[name] for name, layer in layers(model).items())
    assert_same_adapter(adapted(seed=1), model)


@pytest.mark.parametrize("options", [{"k": 3}, {"delta_dtype": torch.float64}], ids=str)
def test_an_adapted_model_takes_another_k_and_another_delta_dtype(path, options):
    saved = adapted(**options)
    nk.save_adapter(saved, path)
    model = adapted(k=1)
    loss = model(inputs()).sum()  # alive, as in a loop: its graph knows the old shapes
    loss.backward()
    deltas = {name: layer.delta for name, layer in layers(model).items()}
    with pytest.warns(UserWarning, match=r"delta: new parameters in blocks\.0\.up"):
        nk.load_adapter(model, path)
    assert all(layer.delta is not deltas[name] for name, layer in layers(model).items())
    assert_same_adapter(saved, model)
    assert torch.equal(model(inputs()), saved(inputs()))
    for one in (model, saved):
        one(inputs()).sum().backward()
    for name, layer in layers(model).items():
        assert torch.equal(layer.delta.grad, layers(saved)[name].delta.grad)


def test_loading_into_what_no_optimizer_can_hold_does_not_warn(path):
    nk.save_adapter(adapted(k=3), path)
    with torch.device("meta"):
        waiting = Model()
    nk.adapt(waiting, 1, TARGETS)
    waiting.load_state_dict(Model().state_dict(), strict=False, assign=True)
    for model in (Model(), waiting):
        nk.load_adapter(model, path)
        assert torch.equal(model(inputs()), adapted(k=3)(inputs()))


def test_an_index_of_other_columns_is_followed_by_forward_and_backward(path):
    saved = adapted(selection="smallest")
    nk.save_adapter(saved, path)
    model = adapted()
    model(inputs()).sum().backward()
    model.zero_grad()
    nk.load_adapter(model, path)
    assert torch.equal(model(inputs()), saved(inputs()))
    for m in (model, saved):
        m(inputs()).sum().backward()
    for name, layer in layers(model).items():
        assert torch.equal(layer.delta.grad, layers(saved)[name].delta.grad)


def test_slots_without_a_connection_come_back(path):
    model = adapted(neuron_fraction=0.5)
    nk.save_adapter(model, path)
    other = Model()
    nk.load_adapter(other, path)
    assert_same_adapter(model, other)
    assert any((layer.index < 0).any() for layer in layers(other).values())


@pytest.mark.parametrize(
    ("d_in", "dtype"), [(255, "U16"), (65535, "U16"), (65536, "I32"), (70000, "I32")]
)
def test_the_index_takes_16_bits_where_every_column_fits(path, d_in, dtype):
    linear = nn.Linear(d_in, 2)
    with torch.no_grad():
        linear.weight[0, -1] = 2
    model = nn.Sequential(linear)
    nk.adapt(model, 2)
    model[0].index = torch.tensor([[0, d_in - 1], [-1, 3]], dtype=torch.int32)
    nk.save_adapter(model, path)
    with safe_open(path, "pt") as file:
        assert file.get_slice("0.index").get_dtype() == dtype
    other = nn.Sequential(nn.Linear(d_in, 2))
    other[0].weight = linear.weight
    nk.load_adapter(other, path)
    assert torch.equal(other[0].index, model[0].index)


def test_biases_and_a_head_that_train_are_saved_too(path):
    model = Model()
    nk.adapt(model, 2, TARGETS)
    model.blocks[1].up.bias.requires_grad_()
    model.head.requires_grad_()
    trained(model, seed=3)
    nk.save_adapter(model, path)
    assert sorted(read_adapter(path).parameters) == ["blocks.1.up.bias", "head.bias", "head.weight"]
    other = Model()
    nk.load_adapter(other, path)
    assert torch.equal(other(inputs()), model(inputs()))
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in other.named_parameters()} == flags


def test_training_goes_on_as_without_saving(path):
    def step(model: nn.Module) -> None:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(inputs()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model = adapted()
    nk.save_adapter(model, path)
    other = Model()
    nk.load_adapter(other, path)
    for m in (model, other):
        step(m)
    assert_same_adapter(model, other)


def test_the_config_comes_back(path):
    config = nk.NeuroAdaConfig(k=2, target_modules=["up", "down"], k_pattern={"up": 1}, layers=[1])
    model = Model()
    nk.adapt(model, config)
    nk.save_adapter(model, path)
    other = Model()
    nk.load_adapter(other, path)
    assert other.neuroada_config == config == model.neuroada_config
    another = nk.NeuroAdaConfig(target_modules=["ё"])
    nk.save_adapter(model, path, config=another)
    nk.load_adapter(model, path)
    assert model.neuroada_config == another


def test_the_same_adapter_is_the_same_file(path, tmp_path):
    nk.save_adapter(adapted(), path)
    nk.save_adapter(adapted(), tmp_path / "again")
    assert path.read_bytes() == (tmp_path / "again").read_bytes()


def test_a_file_takes_few_bytes_a_connection(path):
    model = nn.Sequential(nn.Linear(512, 512))
    nk.adapt(model, 8)
    nk.save_adapter(model, path)
    assert path.stat().st_size < 512 * 8 * (2 + 4) + 1024


@pytest.mark.filterwarnings("ignore:delta. new parameters")
def test_the_loaded_tensors_do_not_depend_on_the_file(path):
    model = adapted(k=1)
    for k in (3, 3):
        nk.save_adapter(adapted(k=k), path)
        nk.load_adapter(model, path)
        os.truncate(path, 0)  # a mapping of it would be a bus error now
        assert torch.equal(model(inputs()), adapted(k=k)(inputs()))


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(
    "wrapper", ["compile", "compile a block", "DataParallel", "checkpoint a block"]
)
def test_wrapped_models_save_and_load_under_plain_names(path, wrapper):
    def wrap(model: Model) -> nn.Module:
        if wrapper == "DataParallel":
            return nn.DataParallel(model)
        if wrapper == "compile":
            return torch.compile(model)
        wrap_block = torch.compile if wrapper == "compile a block" else checkpoint_wrapper
        model.blocks[0] = wrap_block(model.blocks[0])
        return model

    nk.save_adapter(wrap(adapted()), path)
    assert sorted(read_adapter(path).modules) == sorted(NAMES)
    other = Model()
    nk.load_adapter(wrap(other), path)
    found = [m for m in other.modules() if isinstance(m, nk.NeuroAdaLinear)]
    saved = layers(adapted()).values()
    assert all(torch.equal(a.delta, b.delta) for a, b in zip(found, saved, strict=True))


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("wrap", [checkpoint_wrapper, torch.compile])
def test_wrapping_a_block_does_not_change_random_choices(wrap):
    plain, wrapped = Model(), Model()
    wrapped.blocks[0] = wrap(wrapped.blocks[0])
    for model in (plain, wrapped):
        nk.adapt(model, 2, TARGETS, selection="random")
    for a, b in zip(layers(plain).values(), layers(wrapped).values(), strict=True):
        assert torch.equal(a.index, b.index)


@pytest.mark.filterwarnings("ignore")
def test_a_model_inside_ddp_saves_and_loads_as_itself(path):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(adapted())
        nk.save_adapter(wrapped, path)
        other = nn.parallel.DistributedDataParallel(adapted(seed=5))
        nk.load_adapter(other, path)
        assert sorted(read_adapter(path).modules) == sorted(NAMES)
        assert torch.equal(other(inputs()), wrapped(inputs()))
    finally:
        torch.distributed.destroy_process_group()


def test_a_module_under_two_names_is_one(path):
    def shared() -> nn.Module:
        torch.manual_seed(0)
        linear = nn.Linear(6, 6)
        return nn.Sequential(linear, nn.ReLU(), linear)

    model = shared()
    nk.adapt(model, 2)
    trained(model, 0)
    nk.save_adapter(model, path)
    assert list(read_adapter(path).modules) == ["0"]
    other = shared()
    nk.load_adapter(other, path)
    assert other[0] is other[2]
    assert torch.equal(other(inputs()), model(inputs()))


def test_a_layer_by_itself_saves_and_loads(path):
    torch.manual_seed(0)
    linear = nn.Linear(6, 4)
    layer = trained(nk.NeuroAdaLinear.from_linear(linear, 2), 0)
    nk.save_adapter(layer, path)
    other = nk.NeuroAdaLinear.from_linear(linear, 2)
    nk.load_adapter(other, path)
    assert torch.equal(other.delta, layer.delta)
    with pytest.raises(ValueError, match="a single layer, expected a NeuroAda layer"):
        nk.load_adapter(linear, path)
