"""A group of one process: what is refused, and that a script for many runs in one as well."""

from __future__ import annotations

import copy

import pytest
import torch
from fully_sharded import fsdp, fsdp_replicated, sharded
from processes import adapted, assert_same_curve, layers, process_group, train
from small_transformer import Transformer
from tensor_parallel import parallel, tensor_parallel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

import neuroada_kernels as nk
from neuroada_kernels.distributed import (
    NeuroAdaColwiseParallel,
    NeuroAdaRowwiseParallel,
    broadcast_adapter,
    replicate_trained,
)


@pytest.fixture(autouse=True)
def group(tmp_path):
    with process_group(0, 1, tmp_path):
        yield


@pytest.mark.parametrize("check", [fsdp, fsdp_replicated, tensor_parallel])
def test_one_process_trains_as_one(check, tmp_path):
    check(tmp_path)


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's own
def test_what_ddp_holds_already_is_refused():
    model = adapted()
    wrapped = nn.parallel.DistributedDataParallel(model)
    plain = torch.compile(nn.parallel.DistributedDataParallel(Transformer()))
    for call in (lambda: nk.adapt(plain, 1), lambda: nk.add_adapter(wrapped, "other", 1)):
        with pytest.raises(ValueError, match="model: is in DistributedDataParallel"):
            call()
    assert nk.adapter_names(model) == ("default",)


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's own
def test_what_ddp_would_not_average_is_refused(tmp_path):
    paths = {k: tmp_path / f"{k}.safetensors" for k in (4, 2)}
    for k, path in paths.items():
        nk.save_adapter(adapted(k=k), path)
    model = adapted()
    nk.add_adapter(model, "other", 4)
    wrapped = nn.parallel.DistributedDataParallel(model)
    nk.load_adapter(wrapped, paths[4])
    nk.set_adapter(wrapped, "default")
    for call in (
        lambda: nk.load_adapter(wrapped, paths[2]),
        lambda: nk.load_adapter(wrapped, paths[4], adapter_name="third"),
        lambda: nk.set_adapter(wrapped, "other"),
        lambda: nk.set_requires_grad(wrapped, "other"),
        lambda: nk.load_adapter(nn.parallel.DistributedDataParallel(Transformer()), paths[4]),
    ):
        with pytest.raises(ValueError, match="model: is in DistributedDataParallel"):
            call()
    assert nk.adapter_names(model) == ("default", "other")
    assert [layer.active_adapter for layer in layers(model).values()] == ["default"] * 9
    nk.set_adapter(wrapped, "other", inference_mode=True)  # for an evaluation
    nk.set_adapter(wrapped, "default")
    nk.set_requires_grad(wrapped, "default", False)
    nk.set_requires_grad(wrapped, "default")


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's own
def test_what_trained_when_ddp_was_made_may_train_in_turn(tmp_path):
    model = adapted()
    nk.add_adapter(model, "other", 4)
    nk.set_requires_grad(model, ["default", "other"])
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    for name in ("other", "default", "other"):
        nk.set_adapter(wrapped, name)
        assert all(layer.delta.requires_grad for layer in layers(model).values())


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's own
def test_biases_of_a_file_are_refused_in_ddp_too(tmp_path):
    nk.save_adapter(adapted(bias="all"), tmp_path / "biases")
    wrapped = nn.parallel.DistributedDataParallel(adapted())
    with pytest.raises(ValueError, match="model: is in DistributedDataParallel"):
        nk.load_adapter(wrapped, tmp_path / "biases")
    assert not wrapped.module.head.bias.requires_grad


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's own
def test_what_ddp_averages_is_asked_of_ddp():
    """Whatever the flags have become since."""
    model = adapted()
    nk.add_adapter(model, "other", 4)
    wrapped = nn.parallel.DistributedDataParallel(model)
    nk.set_adapter(model, "other")  # the model inside, which is not known to be in DDP
    with pytest.raises(ValueError, match="model: is in DistributedDataParallel"):
        nk.set_adapter(wrapped, "other")
    wrapped.requires_grad_(False)
    nk.set_adapter(wrapped, "default")


def test_what_trains_later_is_averaged_too(tmp_path):
    nk.save_adapter(adapted(bias="all"), tmp_path / "biases")
    model = adapted()
    replicate_trained(model)
    nk.load_adapter(model, tmp_path / "biases")
    averaged = model.head.averaging._parameters
    assert {id(p) for p in averaged} == {id(p) for p in model.parameters() if p.requires_grad}
    model = adapted()
    nk.add_adapter(model, "other", 4)
    replicate_trained(model)
    nk.set_adapter(model, "other")
    averaged = {id(p) for p in model.head.averaging._parameters}
    assert {id(layer.delta) for layer in layers(model).values()} <= averaged
    assert model.head.delta._post_accumulate_grad_hooks
    model = adapted()
    nk.add_adapter(model, "other", 4)
    replicate_trained(model)
    nk.set_requires_grad(model, "other")
    averaged = {id(p) for p in model.head.averaging._parameters}
    assert averaged == {id(d) for layer in layers(model).values() for d in layer.deltas}


def test_layers_that_a_file_brings_are_averaged_too(tmp_path):
    nk.save_adapter(adapted(), tmp_path / "file")
    model = adapted(target_modules=["head"])
    replicate_trained(model)
    nk.load_adapter(model, tmp_path / "file")
    averaged = {id(p) for p in model.head.averaging._parameters}
    assert averaged == {id(layer.delta) for layer in layers(model).values()}


def test_deltas_that_are_averaged_each_in_a_group_stay_so():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    nk.adapt(model, k=2)
    for layer in model:
        replicate_trained(layer)
    first, second = (layer.averaging for layer in model)
    nk.set_requires_grad(model, "default")
    assert (model[0].averaging, model[1].averaging) == (first, second)
    assert [len(averaging._parameters) for averaging in (first, second)] == [1, 1]


def test_a_parked_delta_needs_values_to_be_averaged():
    model = adapted()
    nk.add_adapter(model, "other", 4)
    nk.set_requires_grad(model, "other")
    with pytest.raises(ValueError, match=r"other.*delta: is on the meta device, expected values"):
        replicate_trained(model.to("meta"))


def test_averaged_deltas_are_not_split():
    model = adapted()
    replicate_trained(model)
    assert copy.deepcopy(model).head.averaging is None
    with pytest.raises(ValueError, match="delta: replicate_trained averages it"):
        parallel(model)


def test_what_trains_beside_deltas_needs_values_to_be_averaged():
    model = adapted(bias="all").to("meta")
    with pytest.raises(ValueError, match="bias: is on the meta device, expected values"):
        replicate_trained(model)


def test_no_buffer_has_16_bits_which_nccl_does_not_take():
    for strategy in ("bypass", "resident"):
        model = adapted(strategy=strategy)
        nk.merge(model)
        for tensor in (*model.buffers(), *parallel(adapted()).buffers()):
            assert tensor.dtype not in (torch.int16, torch.uint16)
            assert tensor.dtype == torch.int32 or tensor.is_floating_point()


def test_resident_is_refused_by_a_sharded_weight():
    with pytest.raises(ValueError, match="'resident' is refused: weight is a DTensor"):
        sharded(adapted(strategy="resident"))
    model = sharded(adapted())
    model(torch.zeros(1, 2, dtype=torch.long))  # the root keeps whole parameters until a backward
    assert not isinstance(model.head.weight, DTensor)
    for name in ("head", "blocks.0"):
        with pytest.raises(ValueError, match=f"{name}.*: strategy: 'resident' is refused.*sharded"):
            nk.set_strategy(
                nn.ModuleDict({name.replace(".", "-"): model.get_submodule(name)}), "resident"
            )
    assert nk.set_strategy(model, "auto").keys() == layers(model).keys()


def test_adapters_by_name_stay_in_one_process():
    model = adapted()
    nk.add_adapter(model, "other", 1)
    with pytest.raises(ValueError, match=r"module: has adapters by name, \['default', 'other'\]"):
        parallel(model)
    for split in (sharded(adapted()), parallel(adapted())):
        for act in (
            lambda m: nk.add_adapter(m, "other", 1),
            lambda m: nk.set_adapter(m, "default"),
            lambda m: nk.unload(m),
        ):
            with pytest.raises(ValueError, match="model: is sharded over processes"):
                act(split)


def test_an_adapter_that_is_not_active_is_saved_whole(tmp_path):
    model = adapted()
    nk.add_adapter(model, "other", 1)
    nk.save_adapter(model, tmp_path / "whole", adapter_name="other")
    nk.save_adapter(sharded(model), tmp_path / "sharded", adapter_name="other")
    files = [(tmp_path / name).read_bytes() for name in ("whole", "sharded")]
    assert files[0] == files[1]


def test_a_model_is_adapted_before_it_is_sharded(tmp_path):
    nk.save_adapter(adapted(), tmp_path / "adapter.safetensors")
    model = sharded(Transformer().double())
    words = r"blocks.0.qkv: its weight is sharded .* before fully_shard"
    with pytest.raises(ValueError, match=words):
        nk.adapt(model)
    with pytest.raises(ValueError, match=words):
        nk.load_adapter(model, tmp_path / "adapter.safetensors", allow_mismatch=True)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("assign", [False, True])
def test_a_model_on_the_meta_device_chooses_after_its_shards_have_values(assign):
    with torch.device("meta"):
        model = Transformer().double()
    nk.adapt(model, k=4, delta_dtype=torch.float64, strategy="auto")
    sharded(model)
    if not assign:
        model.to_empty(device="cpu")
    whole = adapted(strategy="auto")
    mesh = init_device_mesh("cpu", (1,))
    values = {
        name: distribute_tensor(whole.get_parameter(name), mesh, parameter.placements)
        for name, parameter in model.named_parameters()
        if not name.endswith("delta")
    }
    nk.set_strategy(whole, "bypass")
    model.load_state_dict(values, strict=False, assign=assign)
    assert nk.select_connections(model) == []
    for name, layer in layers(model).items():
        assert torch.equal(layer.index, layers(whole)[name].index)
        assert layer.strategy == "bypass"
        layer.requires_grad_(False).delta.requires_grad_()
    assert_same_curve(train(model), train(whole))


def test_merging_parts_is_refused():
    for model in (sharded(adapted()), parallel(adapted())):
        with pytest.raises(ValueError, match=r"weight: is sharded .* save the adapter"):
            nk.merge(model)
    model = sharded(adapted())
    model(torch.zeros(1, 2, dtype=torch.long))  # the root keeps whole parameters until a backward
    assert not isinstance(model.head.weight, DTensor)
    with pytest.raises(ValueError, match=r"weight: is sharded"):
        model.head.merge()
    model.reshard()
    assert not model.head.merged


def test_split_layers_keep_x_and_say_so():
    model = parallel(adapted(save_activations="compact"))
    for layer in layers(model).values():
        assert layer.columns is None
        assert "columns of x" not in repr(layer)


def test_fsdp_keeps_the_deltas_that_it_has(tmp_path):
    path = tmp_path / "adapter.safetensors"
    nk.save_adapter(adapted(k=2), path)
    model = sharded(adapted())
    nn.init.ones_(model.head.delta)
    before = {name: t.full_tensor() for name, t in model.named_parameters()}
    indices = {name: layer.index.clone() for name, layer in layers(model).items()}
    with pytest.raises(ValueError, match=r"blocks.0.qkv: delta: \[96, 2\] .* which FSDP holds"):
        nk.load_adapter(model, path)
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor.full_tensor(), before[name])
    for name, layer in layers(model).items():
        assert torch.equal(layer.index, indices[name])


def test_what_a_style_cannot_split():
    mesh = init_device_mesh("cpu", (1,))
    for options, words in (
        ({"strategy": "resident"}, "weight is to be split"),
        ({"layer_type": nk.ReferenceNeuroAdaLinear}, "ReferenceNeuroAdaLinear, expected"),
    ):
        layer = adapted(**options).head
        for style in (NeuroAdaColwiseParallel(), NeuroAdaRowwiseParallel()):
            with pytest.raises((TypeError, ValueError), match=words):
                parallelize_module(layer, mesh, style)
    layer = adapted().head
    layer.merge()
    with pytest.raises(ValueError, match="merged"):
        parallelize_module(layer, mesh, NeuroAdaColwiseParallel())
    layer.unmerge()
    with pytest.raises(ValueError, match="2 dimensions"):
        NeuroAdaColwiseParallel()._apply(layer, init_device_mesh("cpu", (1, 1)))
    parallelize_module(layer, mesh, NeuroAdaColwiseParallel())
    with pytest.raises((TypeError, ValueError), match="TensorParallelLinear, expected"):
        parallelize_module(layer, mesh, NeuroAdaColwiseParallel())


def test_a_style_splits_other_modules_as_torchs_own():
    mesh = init_device_mesh("cpu", (1,))
    for style in (NeuroAdaColwiseParallel(), NeuroAdaRowwiseParallel()):
        linear = parallelize_module(nn.Linear(4, 4), mesh, style)
        assert isinstance(linear.weight, DTensor)
        assert linear(torch.ones(4)).shape == (4,)


def test_what_cannot_be_replicated():
    with pytest.raises(ValueError, match="no NeuroAda layer"):
        broadcast_adapter(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no parameter that trains"):
        replicate_trained(nn.Linear(2, 2).requires_grad_(False))
    model = adapted()
    nk.merge(model)
    with pytest.raises(ValueError, match="merged"):
        broadcast_adapter(model)
    for function in (broadcast_adapter, replicate_trained):
        with pytest.raises(ValueError, match="delta: is sharded already"):
            function(sharded(adapted()))
