"""Casting, moving, copying and pickling a layer."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import time
from itertools import pairwise

import pytest
import torch
from layer_facts import assert_state, effective_weight, input_gradient, other_index, state_of
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from neuroada_kernels import NeuroAdaLinear, make_plan, merge, save_adapter
from neuroada_kernels.plan import plan_parts
from neuroada_kernels.testing import rms_error, tolerance


def pickled(layer):
    return pickle.loads(pickle.dumps(layer))


def saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def emptied(layer):
    """As after deferred initialisation: memory without values."""
    return copy.deepcopy(layer).to("meta").to_empty(device="cpu")


COPIES = [copy.deepcopy, pickled, saved]


@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (lambda layer: layer.to(torch.bfloat16), torch.bfloat16),
        (lambda layer: layer.half(), torch.float16),
        (lambda layer: layer.double(), torch.float64),
        (lambda layer: layer.type(torch.float16), torch.float16),
    ],
    ids=["to-bfloat16", "half", "double", "type"],
)
@pytest.mark.parametrize("delta_dtype", [torch.float32, torch.bfloat16])
def test_cast_changes_weight_and_bias_alone(trained, cast, dtype, delta_dtype):
    layer = trained(delta_dtype=delta_dtype)
    index, delta = layer.index.clone(), layer.delta.detach().clone()
    weight, parameter = layer.weight.detach().clone(), layer.delta
    assert cast(layer) is layer
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert torch.equal(layer.weight, weight.to(dtype))
    assert layer.delta is parameter, "an optimiser would hold a stale delta"
    assert layer.delta.requires_grad
    assert layer.delta.dtype == delta_dtype
    assert torch.equal(layer.delta, delta)
    assert layer.index.dtype == torch.int32
    assert torch.equal(layer.index, index)
    x = torch.randn(9, 24, dtype=dtype)
    expected = x.double() @ effective_weight(layer).t() + layer.bias.double()
    assert rms_error(layer(x), expected) <= tolerance(dtype, 24)
    assert rms_error(*input_gradient(layer)) <= tolerance(dtype, 16)


def test_cast_leaves_the_gradient_of_delta_alone(trained):
    layer = trained()
    layer(torch.randn(9, 24)).sum().backward()
    gradient = layer.delta.grad.clone()
    layer.half()
    assert layer.delta.grad.dtype == torch.float32
    assert torch.equal(layer.delta.grad, gradient)


def test_cast_while_merged_can_be_unmerged(trained):
    layer = trained()
    weight = layer.weight.clone()
    layer.merge()
    layer.to(torch.bfloat16)
    layer.unmerge()
    assert torch.equal(layer.weight, weight.bfloat16())


def test_meta_layer_keeps_shapes_and_dtypes(trained):
    layer = trained(dtype=torch.bfloat16)
    before = state_of(layer)
    layer.to("meta")
    assert all(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))
    for name, tensor in layer.state_dict().items():
        assert tensor.shape == before[name].shape, name
        assert tensor.dtype == before[name].dtype, name
    assert layer.delta.requires_grad


def test_meta_layer_answers_shapes(trained):
    y = trained().to("meta")(torch.randn(2, 5, 24, device="meta"))
    assert y.is_meta
    assert y.shape == (2, 5, 16)


@pytest.mark.parametrize("make_copy", COPIES)
@pytest.mark.parametrize("merged", [False, True])
def test_copy_is_equal_and_independent(trained, make_copy, merged):
    layer = trained(neuron_fraction=0.5)
    if merged:
        layer.merge()
    before = state_of(layer)
    twin = make_copy(layer)
    assert type(twin) is type(layer)
    assert_state(twin, before)
    assert [p.requires_grad for p in twin.parameters()] == [
        p.requires_grad for p in layer.parameters()
    ]
    owned = {tensor.data_ptr() for tensor in (*layer.parameters(), *layer.buffers())}
    assert all(t.data_ptr() not in owned for t in (*twin.parameters(), *twin.buffers()))

    x = torch.randn(9, 24)
    assert torch.equal(twin(x), layer(x))
    twin.unmerge()
    assert rms_error(*input_gradient(twin)) <= tolerance(torch.float32, 16)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.zero_()
    assert_state(layer, before)


@pytest.mark.parametrize("make_copy", COPIES)
def test_copy_of_a_layer_whose_index_was_just_written(trained, make_copy):
    layer = trained()
    layer.index.copy_(other_index(layer))
    twin = make_copy(layer)
    assert rms_error(*input_gradient(twin)) <= tolerance(torch.float32, 16)


@pytest.mark.parametrize("make_copy", [*COPIES, emptied])
@pytest.mark.parametrize("assign", [False, True])
def test_copy_that_loads_another_state_at_once_follows_it(trained, make_copy, assign):
    source = trained()
    source.index = other_index(source)
    twin = make_copy(trained())
    twin.load_state_dict(source.state_dict(), assign=assign)
    assert torch.equal(twin.index, source.index)
    x = torch.randn(9, 24)
    assert torch.equal(twin(x), source(x))
    assert rms_error(*input_gradient(twin)) <= tolerance(torch.float32, 16)


def test_meta_layer_takes_its_values_by_assignment(trained):
    source = trained()
    layer = trained().to("meta")
    layer.load_state_dict(source.state_dict(), assign=True)
    assert not any(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))
    assert rms_error(*input_gradient(layer)) <= tolerance(torch.float32, 16)


@pytest.mark.parametrize("save_activations", ["full", "compact"])
def test_the_average_of_a_layer_that_was_moved_follows_it(trained, save_activations):
    """Torch copies buffer by buffer, in their order, from a layer into its moving average."""
    layer = trained(save_activations=save_activations)
    average = AveragedModel(layer, device="cpu", multi_avg_fn=get_ema_multi_avg_fn(0.5))
    total = torch.zeros_like(layer.delta)
    for step in range(3):
        with torch.no_grad():
            layer.delta.normal_()
            total = layer.delta.clone() if step == 0 else (total + layer.delta) / 2
        average.update_parameters(layer)
    torch.testing.assert_close(average.module.delta, total)
    x = torch.randn(9, 24)
    y = average.module(x)
    with torch.no_grad():
        layer.delta.copy_(total)
    expected = x.double() @ effective_weight(layer).t() + layer.bias.double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def averaged(strategy, decay):
    """A layer, and its moving average over two steps with all its buffers."""
    layer = NeuroAdaLinear(300, 40, k=8, strategy=strategy)
    average = AveragedModel(
        torch.nn.Sequential(layer), use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(decay)
    )
    for _ in range(2):
        average.update_parameters(torch.nn.Sequential(layer))
    return layer, average.module


@pytest.mark.parametrize("strategy", ["bypass", "resident"])
@pytest.mark.parametrize(
    "use",
    [
        lambda model, path: model(torch.randn(9, 300)),
        lambda model, path: model.state_dict(),
        lambda model, path: merge(model),
        lambda model, path: save_adapter(model, path / "adapter.safetensors"),
    ],
    ids=["forward", "state_dict", "merge", "save_adapter"],
)
def test_an_index_that_was_averaged_is_refused(strategy, use, tmp_path):
    """Torch cuts off what multiplying by 0.9 and 0.1 leaves of a column."""
    layer, model = averaged(strategy, 0.9)
    assert not torch.equal(model[0].index, layer.index)
    message = "index: was averaged, .*expected AveragedModel"
    with pytest.raises((RuntimeError, ValueError), match=message):
        use(model, tmp_path)
    model.load_state_dict({f"0.{name}": t for name, t in layer.state_dict().items()})
    x = torch.randn(9, 300)
    assert torch.equal(model(x), layer(x))


@pytest.mark.parametrize("strategy", ["bypass", "resident"])
def test_an_average_of_all_buffers_that_left_the_index_as_it_was_is_none_to_refuse(strategy):
    layer, model = averaged(strategy, 0.5)
    x = torch.randn(9, 300)
    assert torch.equal(model(x), layer(x))
    model[0].index.copy_(other_index(layer))  # by hand, after which the plan is another
    model(x)


@pytest.mark.parametrize("strategy", ["bypass", "resident"])
def test_another_index_with_its_plan_in_whatever_order_is_none_to_refuse(strategy):
    """As DistributedDataParallel sends both; a GPU has its plans in an order of its own."""
    layer = NeuroAdaLinear(300, 40, k=8, strategy=strategy)
    index = other_index(layer)
    plan = make_plan(index, 300)
    parts = plan_parts(plan, 300)
    for begin, end in pairwise(parts.column_start.tolist()):
        parts.entry[begin:end] = parts.entry[begin:end].flip(0).clone()
    assert not plan.equal(make_plan(index, 300))
    layer.index.copy_(index)
    layer.plan.copy_(plan)
    x = torch.randn(9, 300)
    expected = x @ effective_weight(layer).float().t() + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    layer.index.copy_(other_index(layer))
    layer.plan[-3:] -= 1  # as averaging would
    with pytest.raises((RuntimeError, ValueError), match="index: was averaged"):
        layer(x)


def test_threads_in_the_first_forward_of_a_copy_patch_its_weight_once(monkeypatch):
    """What one of them has saved for its backward must not be written by the next."""
    layer = copy.deepcopy(NeuroAdaLinear(24, 16, k=2, strategy="resident"))
    barrier, written, errors = threading.Barrier(4), [], []
    write = NeuroAdaLinear._write

    def slowly(self, weight, delta):
        written.append(threading.get_ident())
        time.sleep(0.05)
        write(self, weight, delta)

    def run():
        x = torch.randn(9, 24, requires_grad=True)
        barrier.wait(60)
        try:
            y = layer(x)
            barrier.wait(60)
            y.sum().backward()
        except Exception as error:
            errors.append(error)

    monkeypatch.setattr(NeuroAdaLinear, "_write", slowly)
    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert errors == []
    assert len(written) == 1
