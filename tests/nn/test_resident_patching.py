"""When W is patched: whenever delta has changed and only then, and what a pending backward sees."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from neuroada_kernels import NeuroAdaLinear, ops, reference
from neuroada_kernels.nn import _planned, _resident

MODIFIED = "modified by an inplace operation"


@pytest.fixture
def patches(monkeypatch):
    """The weights that were patched, one after the other."""
    found, plain = [], ops.patch_

    def spy(weight, *rest):
        found.append(weight.data_ptr())
        plain(weight, *rest)

    monkeypatch.setattr(ops, "patch_", spy)
    return found


@pytest.fixture
def layer(patches):
    layer = NeuroAdaLinear(24, 16, 3, strategy="resident")
    with torch.no_grad():
        layer.delta.normal_(std=0.1)
    layer(torch.randn(2, 24))
    patches.clear()
    return layer


def holds(layer) -> bool:
    """Whether the weight has ``round(W + delta)`` in it."""
    base = layer.state_dict()["weight"]
    return layer.weight.equal(reference.merged_weight(base, layer.index, layer.delta))


def test_not_where_delta_is_the_same(layer, patches):
    x, version = torch.randn(9, 24, requires_grad=True), layer.weight._version
    outputs = [layer(x), layer(x)]
    layer.eval()
    with torch.no_grad():
        layer(x)
    with torch.inference_mode():
        layer(x)
    sum(y.sum() for y in outputs).backward()
    layer(x).sum().backward()
    layer.state_dict()
    layer(x)
    assert not patches
    assert layer.weight._version == version


class ThroughData(torch.optim.SGD):
    """Writes behind autograd's back, as a kernel that is given a pointer does."""

    def step(self, closure):
        closure()
        for parameter in self.param_groups[0]["params"]:
            parameter.data.sub_(0.1 * parameter.grad)


OPTIMISERS = [torch.optim.SGD, torch.optim.AdamW, torch.optim.LBFGS, ThroughData]


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_once_after_a_step_of_the_optimiser(layer, patches, optimiser, options):
    if optimiser is torch.optim.LBFGS and options:
        pytest.skip("has one implementation alone")
    steps = optimiser([layer.delta], lr=0.1, **options)
    x = torch.randn(9, 24)

    def closure():
        steps.zero_grad()
        loss = layer(x).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        steps.step(closure)
        patches.clear()
        assert not holds(layer)
        layer(x)
        layer(x)
        assert patches == [layer.weight.data_ptr()]
        assert holds(layer)


def test_a_copy_follows_its_own_optimiser(layer):
    twin, x = copy.deepcopy(layer), torch.randn(9, 24)
    twin(x).square().sum().backward()
    ThroughData([twin.delta], lr=0.1).step(lambda: None)
    twin(x)
    assert holds(twin)
    assert not twin.delta.equal(layer.delta)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("change", ["in place", "by data", "by another parameter"])
def test_however_delta_has_changed_and_wherever_the_forward_runs(layer, patches, mode, change):
    new = torch.randn(16, 3)
    if change == "in place":
        with torch.no_grad():
            layer.delta.copy_(new)
    elif change == "by data":
        layer.delta.data = new
    else:
        layer.delta = nn.Parameter(new)
    with mode():
        layer(torch.randn(9, 24))
    assert len(patches) == 1
    assert holds(layer)


def test_data_that_is_replaced_twice_is_noticed(layer):
    """Now and then it lies where the first one lay."""
    x = torch.randn(9, 24)
    for _ in range(100):
        for _ in range(2):
            layer.delta.data = layer.delta.data + 0.1
        layer(x)
        assert holds(layer)


def test_a_layer_that_is_moved_holds_no_other_weight_than_its_own(layer):
    memory = StorageWeakRef(layer.weight.untyped_storage())
    layer.to(torch.float64)
    assert memory.expired()
    layer(torch.randn(9, 24, dtype=torch.float64))
    assert holds(layer)


def test_a_layer_that_was_resident_holds_no_weight_that_it_has_no_more(layer):
    memory = StorageWeakRef(layer.weight.untyped_storage())
    layer.strategy = "bypass"
    layer.weight = nn.Parameter(torch.randn(16, 24), requires_grad=False)
    assert memory.expired()


def test_a_delta_in_the_memory_of_the_last_one_is_another(layer):
    """Of the same address and version, with other values."""
    delta = layer.delta = nn.Parameter(torch.randn(16, 3))
    layer(torch.randn(9, 24))
    other = nn.Parameter(delta.data)  # which counts versions of its own
    with torch.no_grad():
        delta.add_(1)
    layer.delta = other
    layer(torch.randn(9, 24))
    assert holds(layer)


def test_a_delta_that_counts_no_versions_is_looked_at_in_every_forward(layer):
    with torch.inference_mode():
        layer.delta = nn.Parameter(torch.randn(16, 3), requires_grad=False)
        for _ in range(2):
            layer(torch.randn(9, 24))
            assert holds(layer)
            layer.delta.add_(1)


def test_deltas_that_come_and_go_are_told_apart(layer):
    """The next one may lie where the last one lay, with the same version and the same id."""
    x = torch.randn(9, 24)
    base = layer.state_dict()["weight"]
    for _ in range(20):
        delta = torch.randn(16, 3)
        y = torch.func.functional_call(layer, {"delta": delta}, x)
        whole = reference.merged_weight(base, layer.index, delta)
        assert y.equal(torch.nn.functional.linear(x, whole, layer.bias))
        del delta
    assert layer(x).equal(layer(x))
    assert holds(layer)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputing_patches_nothing(layer, patches, reentrant):
    x = torch.randn(9, 24)
    results = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        layer.delta.grad, given = None, x.clone().requires_grad_()
        y = call(given)
        y.square().sum().backward()
        results.append((y, given.grad, layer.delta.grad))
    assert all(a.equal(b) for a, b in zip(*results, strict=True))
    assert not patches


@pytest.mark.parametrize("x_requires_grad", [True, False])
@pytest.mark.parametrize("forward_since", [True, False])
def test_a_backward_after_delta_has_changed_is_refused(layer, x_requires_grad, forward_since):
    x = torch.randn(9, 24, requires_grad=x_requires_grad)
    y = layer(x)
    with torch.no_grad():
        layer.delta.add_(1)
    if forward_since:
        layer(x)
    with pytest.raises(RuntimeError, match=MODIFIED):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_after_delta_has_changed_is_no_other_function(layer, reentrant):
    """What is recomputed belongs to the new delta, and so does its gradient: no mixture."""
    x = torch.randn(9, 24, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=reentrant)
    with torch.no_grad():
        layer.delta.add_(1)
    grad_output = torch.randn(9, 16)
    y.backward(grad_output)
    torch.testing.assert_close(x.grad, grad_output @ layer.weight)
    assert holds(layer)


LEAVINGS = {
    "bypass": lambda layer: setattr(layer, "strategy", "bypass"),
    "merge": lambda layer: layer.merge(),
    "load": lambda layer: layer.load_state_dict(layer.state_dict()),
    "written": lambda layer: layer.weight.detach().add_(1),
}


@pytest.mark.parametrize("way", LEAVINGS)
def test_a_backward_after_w_has_changed_is_refused(layer, way):
    y = layer(torch.randn(9, 24, requires_grad=True))
    LEAVINGS[way](layer)
    with pytest.raises(RuntimeError, match=MODIFIED):
        y.sum().backward()


def test_a_weight_that_was_written_is_refused(layer):
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="weight: chosen entries were written while they hold"):
        layer(torch.randn(9, 24))


def test_writing_what_is_there_or_beside_it_changes_nothing(layer, patches):
    """As the wrapping in DistributedDataParallel does, which sends the first rank's values."""
    with torch.no_grad():
        layer.weight.copy_(layer.weight.clone())
    base = layer.state_dict()["weight"]
    layer(torch.randn(9, 24))
    chosen = torch.zeros(16, 24, dtype=torch.bool).scatter_(1, layer.index.long(), True)
    with torch.no_grad():
        layer.weight.masked_fill_(~chosen, 5)
    layer(torch.randn(9, 24))
    assert holds(layer)
    layer.strategy = "bypass"
    assert layer.weight.equal(base.masked_fill(~chosen, 5))


def test_neither_an_empty_slot_nor_nan_is_taken_for_a_weight_that_was_written(layer):
    index = layer.index.clone()
    index[:, 1] = -1
    layer.index = index
    with torch.no_grad():
        layer.delta[3, 0] = torch.nan
        layer(torch.randn(9, 24))
        layer.weight.copy_(layer.weight.clone())
        layer(torch.randn(9, 24))
    assert layer.weight.isnan().sum() == 1


def test_a_weight_that_was_written_beside_them_is_patched_with_another_delta(layer):
    """As by what writes all parameters: of delta and W, either may have come first."""
    base = layer.state_dict()["weight"]
    with torch.no_grad():
        layer.weight.copy_(layer.weight.clone())
        layer.delta.add_(1)
    layer(torch.randn(9, 24))
    assert layer.weight.equal(reference.merged_weight(base, layer.index, layer.delta))


def test_averaged_weights_are_patched_anew(layer):
    """torch.optim.swa_utils averages every parameter, the patched ones too."""
    averaged = torch.optim.swa_utils.AveragedModel(layer)
    base, deltas = layer.state_dict()["weight"], []
    for _ in range(3):
        with torch.no_grad():
            layer.delta.normal_()
        layer(torch.randn(2, 24))
        averaged.update_parameters(layer)
        deltas.append(layer.delta.detach().clone())
    average = torch.stack(deltas).mean(0)
    torch.testing.assert_close(averaged.module.delta.detach(), average)
    averaged(torch.randn(2, 24))
    whole = reference.merged_weight(base, layer.index, average)
    torch.testing.assert_close(averaged.module.weight.detach(), whole)


def test_a_weight_that_is_swapped_for_a_call_is_refused(layer):
    x, other = torch.randn(9, 24), torch.randn(16, 24)
    with pytest.raises(RuntimeError, match="weight: is another one than that which holds W"):
        torch.func.functional_call(layer, {"weight": other}, x)
    layer(x)
    assert holds(layer)


@pytest.mark.parametrize("how", ["set", "in place", "functional_call"])
def test_another_index_moves_the_bypass(layer, how):
    base, x = layer.state_dict()["weight"], torch.randn(9, 24)
    other = ((layer.index + 7) % 24).int()
    if how == "functional_call":
        y = torch.func.functional_call(layer, {"index": other}, x)
    else:
        if how == "set":
            layer.index = other
        else:
            layer.index.copy_(other)
        y = layer(x)
    whole = reference.merged_weight(base, other, layer.delta)
    assert y.equal(torch.nn.functional.linear(x, whole, layer.bias))
    layer(x)
    assert holds(layer)
    layer.strategy = "bypass"
    assert layer.weight.equal(base)


def test_a_copy_stays_patched_while_its_first_forward_plans(layer, monkeypatch):
    """Other threads may be in a forward of theirs, as where one model serves several."""
    other, plain = copy.deepcopy(layer), _planned.make_plan
    seen = []

    def spy(*arguments):
        seen.append(other.weight.clone())
        return plain(*arguments)

    monkeypatch.setattr(_planned, "make_plan", spy)
    other(torch.randn(2, 24))
    assert len(seen) == 1
    assert seen[0].equal(layer.weight)


def test_a_wrong_index_is_refused_and_the_old_one_stays(layer):
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="index: column 24 in row 0 is out of range"):
        layer.index = torch.full_like(layer.index, 24)
    assert layer.weight.equal(before)
    layer(torch.randn(2, 24))
    assert holds(layer)


def test_a_weight_that_requires_grad_is_refused(layer):
    layer.weight.requires_grad_()
    with pytest.raises(ValueError, match="weight: requires grad, expected a frozen weight"):
        layer(torch.randn(2, 24))


def test_a_weight_of_another_dtype_is_named(layer):
    with pytest.raises(TypeError, match=r"weight: dtype torch.float32, expected torch.bfloat16"):
        layer(torch.randn(2, 24).bfloat16())


def test_always_where_a_graph_records_it_and_from_then_on(layer, patches, monkeypatch):
    """A replay has another delta, of which no version tells: so the graph has to have the patch."""
    x = torch.randn(9, 24, requires_grad=True)
    with monkeypatch.context() as capture:
        capture.setattr(_resident, "_is_captured", lambda weight: True)
        outputs = [layer(x), layer(x)]
    assert len(patches) == 2
    sum(y.sum() for y in outputs).backward()  # the same values again spoil no pending backward
    layer.delta.data.add_(0.1)  # as a replay may
    layer(x)
    assert len(patches) == 3
    assert holds(layer)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_graph_patches_in_every_replay():
    layer = NeuroAdaLinear(24, 16, 3, device="cuda", strategy="resident")
    x = torch.randn(9, 24, device="cuda")
    base = layer.state_dict()["weight"]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y = layer(x)
        layer.delta.add_(0.1)  # behind the back of its version, in a replay
    for _ in range(3):
        expected = reference.merged_weight(base, layer.index, layer.delta)
        graph.replay()
        torch.testing.assert_close(y, torch.nn.functional.linear(x, expected, layer.bias))
    layer(x)
    assert holds(layer)
