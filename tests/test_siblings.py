"""Layers that read the same x keep one copy of the columns that any of them chose."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from gated_block import (
    WIDTH,
    Block,
    assert_same_bits,
    block_of,
    choose,
    gradients,
    kept_bytes,
    layers_of,
    qkv_of,
    tokens,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import neuroada_kernels as nk
from neuroada_kernels.nn import _siblings

STRATEGIES = pytest.mark.parametrize("strategy", ["bypass", "resident"])


@pytest.fixture
def copies(monkeypatch) -> list[weakref.ref[Tensor]]:
    """Every copy of columns that is made while the test runs."""
    made: list[weakref.ref[Tensor]] = []
    gather = _siblings.columns_of

    def counted(*args: object) -> Tensor:
        kept = gather(*args)
        made.append(weakref.ref(kept))
        return kept

    monkeypatch.setattr(_siblings, "columns_of", counted)
    return made


@STRATEGIES
@pytest.mark.parametrize("mode", ["auto", "compact"])
def test_one_copy_for_each_x_and_the_same_bits(mode, strategy, copies):
    x = tokens()
    expected = gradients(block_of(save_activations="full", strategy=strategy), x)
    assert not copies
    model = block_of(save_activations=mode, strategy=strategy)
    assert_same_bits(gradients(model, x), expected)
    # q, k and v; gate and up; down. Attention keeps what o reads.
    assert len(copies) == 3
    attention, mlp = model.self_attn, model.mlp
    assert attention.q_proj.columns is attention.k_proj.columns is attention.v_proj.columns
    assert mlp.gate_proj.columns is mlp.up_proj.columns
    assert attention.o_proj.columns is not attention.q_proj.columns


def test_compact_keeps_less_than_full_by_what_the_columns_leave_out():
    kept, x = {}, tokens().requires_grad_()
    for mode in ("full", "compact", "auto"):
        model = block_of(save_activations=mode)
        kept[mode] = kept_bytes(model, lambda: model(x))  # noqa: B023
    rows = x.numel() // WIDTH * x.element_size()
    left_out = (  # of x of q, k and v, of gate and up, and of down
        2 * WIDTH - len(model.self_attn.q_proj.columns) - len(model.mlp.up_proj.columns)
    ) + (4 * WIDTH - len(model.mlp.down_proj.columns))
    assert kept["auto"] == kept["compact"] == kept["full"] - rows * left_out
    assert left_out > 4 * WIDTH


@STRATEGIES
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_checkpointing_shares_in_the_recomputation_too(reentrant, strategy, copies):
    x = tokens()
    model = block_of(save_activations="compact", strategy=strategy)
    expected = gradients(model, x)
    copies.clear()
    results = gradients(model, x, lambda x: checkpoint(model, x, use_reentrant=reentrant))
    assert_same_bits(results, expected)
    assert len(copies) == (3 if reentrant else 6)  # the first forward keeps nothing, or drops it
    assert not any(kept() is not None for kept in copies)


def test_autocast_shares_what_full_would_cast_three_times(copies):
    x, results = tokens(), []
    for mode in ("full", "compact"):
        model = block_of(save_activations=mode)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(gradients(model, x))
    assert_same_bits(*results)
    assert len(copies) == 3


def test_deltas_that_are_there_in_their_own_forward_alone_are_enough():
    """As ZeRO-3 has them; siblings are planned one after another once indices have moved."""
    x, model = tokens(), block_of(save_activations="compact")
    expected, columns = model(x), [layer.columns for layer in layers_of(model)]
    model.float()
    values = {layer: layer.delta.data for layer in layers_of(model)}

    def gather(layer: nn.Module, _: object) -> None:
        layer.delta.data = values[layer]

    def release(layer: nn.Module, *_: object) -> None:
        layer.delta.data = torch.empty(0)

    for layer in values:
        layer.register_forward_pre_hook(gather)
        layer.register_forward_hook(release)
        release(layer)
    with torch.no_grad():
        assert model(x).equal(expected)
    assert_same_bits([layer.columns for layer in layers_of(model)], columns)


def test_auto_looks_at_what_all_siblings_chose():
    """Each a quarter of x, or all of them more than half."""
    model = block_of(k=1)
    for part, layer in enumerate(qkv_of(model)):
        choose(layer, 8 * part, 8)
    assert all(layer.columns is None for layer in qkv_of(model))
    nk.set_save_activations(model, "compact")
    assert all(len(layer.columns) == 24 for layer in qkv_of(model))
    nk.set_save_activations(model, "auto")
    choose(qkv_of(model)[2], 8, 8)
    assert all(len(layer.columns) == 16 for layer in qkv_of(model))


def test_a_sibling_that_keeps_x_itself_keeps_it_for_all():
    model = block_of(save_activations="compact")
    qkv_of(model)[1].save_activations = "full"
    assert all(layer.columns is None for layer in qkv_of(model))
    assert model.mlp.up_proj.columns is not None
    x = tokens().requires_grad_()
    attention = kept_bytes(model, lambda: model.self_attn(x))
    nk.set_save_activations(model, "full")
    assert kept_bytes(model, lambda: model.self_attn(x)) == attention


def test_x_written_between_siblings_is_another_x(copies):
    gradients_of = []
    for mode in ("full", "compact"):
        q, k, _ = qkv_of(block_of(save_activations=mode))
        x = tokens()
        first = q(x if mode == "compact" else x.clone())
        x.mul_(2)
        (first.square().sum() + k(x).square().sum()).backward()
        gradients_of.append([q.delta.grad, k.delta.grad])
    assert_same_bits(*gradients_of)
    assert len(copies) == 2


def test_siblings_that_read_different_inputs_get_their_own(copies):
    """A wrong guess at who reads what costs memory, and no gradient."""
    results = []
    for mode in ("full", "compact"):
        q, k, v = qkv_of(block_of(save_activations=mode))
        xs = [tokens(seed=seed) for seed in range(3)]
        sum(p(x).square().sum() for p, x in zip((q, k, v), xs, strict=True)).backward()
        results.append([p.delta.grad for p in (q, k, v)])
    assert_same_bits(*results)
    assert len(copies) == 3


def test_nothing_is_copied_where_no_delta_trains(copies):
    model = block_of(save_activations="compact").requires_grad_(False)
    model(tokens().requires_grad_()).sum().backward()
    assert not copies


def test_a_copy_lives_no_longer_than_the_graph(copies):
    model, x = block_of(save_activations="compact"), tokens()
    y = model(x)
    assert sum(kept() is not None for kept in copies) == 3
    del y
    assert not any(kept() is not None for kept in copies)


def test_a_copy_that_all_have_read_goes_with_the_graph_though_x_stays(copies):
    model, x = block_of(save_activations="compact"), tokens()
    outputs = [layer(x) for layer in qkv_of(model)]
    (kept,) = copies
    assert kept() is not None
    del outputs
    assert kept() is None


def test_a_copy_that_not_all_have_read_goes_with_its_x(copies):
    q, k, _ = qkv_of(block_of(save_activations="compact"))
    x = tokens()
    q(x).sum().backward()
    (kept,) = copies
    assert kept() is not None, "k and v may still come"
    k(x).sum().backward()
    assert len(copies) == 1
    del x
    assert kept() is None


def test_columns_are_shared_after_moving_a_model(copies):
    model = block_of(save_activations="compact").double()
    assert model.self_attn.q_proj.columns is model.self_attn.v_proj.columns
    gradients(model, tokens(torch.float64))
    assert len(copies) == 3


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deep", "pickle"]
)
def test_copied_models_share_within_themselves(duplicate, copies):
    model, x = block_of(k=1, save_activations="compact"), tokens()
    expected = gradients(model, x)
    twin = duplicate(model)
    copies.clear()
    assert_same_bits(gradients(twin, x), expected)
    assert len(copies) == 3
    choose(qkv_of(twin)[0], 0, 20)
    assert len(qkv_of(twin)[2].columns) > len(qkv_of(model)[2].columns) == 8
    assert not set(qkv_of(twin)[0]._siblings.layers) & set(layers_of(model))


def test_a_layer_copied_alone_keeps_its_own_columns():
    model = block_of(k=1, save_activations="compact")
    for part, layer in enumerate(qkv_of(model)):
        choose(layer, 8 * part, 8)
    lone = copy.deepcopy(qkv_of(model)[1])
    lone(tokens())
    assert lone.columns.tolist() == list(range(8, 16))
    assert len(qkv_of(model)[1].columns) == 24


def test_siblings_do_not_keep_one_another_alive():
    model = block_of(k=1, save_activations="compact")
    q, k, _ = qkv_of(model)
    choose(k, 20, 8)
    gone = weakref.ref(k)
    del k, model.self_attn.k_proj
    gc.collect()
    assert gone() is None
    choose(q, 0, 4)
    assert 20 not in q.columns.tolist()


def test_an_index_written_in_place_renews_its_siblings_columns(copies):
    model, x = block_of(k=1, save_activations="compact"), tokens()
    gradients(model, x)
    _, k, _ = qkv_of(model)
    k.index.copy_((k.index + 9) % WIDTH)
    copies.clear()
    results = gradients(model, x)
    nk.set_save_activations(model, "full")
    assert_same_bits(results, gradients(model, x))


def test_an_index_that_a_sibling_had_planned_first_still_moves_what_the_weight_holds():
    q, k, _ = qkv_of(block_of(strategy="resident"))
    base, x = k.state_dict()["weight"], tokens()
    k.index.copy_((k.index + 9) % WIDTH)
    q.index.copy_(q.index)
    q(x)  # which plans its own anew, and asks its siblings
    k(x)
    assert k.delta.any()
    assert k.weight.equal(nk.reference.merged_weight(base, k.index, k.delta))


def test_an_invalid_index_of_a_sibling_is_its_own_error():
    model = block_of(save_activations="compact")
    q, k, _ = qkv_of(model)
    k.index[3, 1] = WIDTH
    q.index.copy_(q.index)
    q(tokens())
    with pytest.raises(ValueError, match=f"index: column {WIDTH} in row 3 is out of range"):
        k(tokens())


def test_threads_find_their_own_copies():
    model = block_of(save_activations="compact")
    q, k, v = qkv_of(model)
    results: dict[int, bool] = {}
    barrier = threading.Barrier(2)

    def run(seed: int) -> None:
        ok = True
        for repeat in range(20):
            x = tokens(seed=2 * repeat + seed)
            ys = []
            for layer in (q, k, v):
                barrier.wait(60)
                ys.append(layer(x))
            grads = torch.autograd.grad(sum(y.square().sum() for y in ys), [q.delta, v.delta])
            flat = x.flatten(0, 1)
            for layer, y, grad in ((q, ys[0], grads[0]), (v, ys[2], grads[1])):
                dense = (2 * y.detach()).flatten(0, 1).t() @ flat
                ok &= torch.allclose(grad, dense.gather(1, layer.index.long()), atol=1e-3)
        results[seed] = ok

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert results == {0: True, 1: True}


# The compiler makes an instance of an autograd function to trace it, and is told not to.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@STRATEGIES
def test_a_compiled_block_keeps_one_copy_too(strategy):
    torch.compiler.reset()
    kept, x = {}, tokens()
    for mode in ("full", "auto"):
        model = block_of(save_activations=mode, strategy=strategy)
        function = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(gradients(model, x, function), gradients(model, x))
        given = x.clone().requires_grad_()
        kept[mode] = kept_bytes(model, lambda: function(given))  # noqa: B023
        torch.compiler.reset()
    attention, mlp = model.self_attn, model.mlp
    columns = sum(len(p.columns) for p in (attention.q_proj, mlp.up_proj, mlp.down_proj))
    rows = x.numel() // WIDTH * x.element_size()
    # Who else keeps x is not seen while tracing: what o reads is attention's, and kept twice.
    columns += len(attention.o_proj.columns)
    assert kept["auto"] == kept["full"] - rows * (6 * WIDTH - columns)


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "adapted"])
def test_loading_an_adapter_keeps_mode_and_sharing(fresh, tmp_path, copies):
    source = block_of(k=1, save_activations="compact")
    for part, layer in enumerate(qkv_of(source)):
        choose(layer, 8 * part, 8)
    nk.save_adapter(source, tmp_path / "a.safetensors")
    model = block_of(k=1, save_activations="compact")
    if fresh:
        model = Block()
        base = {n: t for n, t in source.state_dict().items() if not n.endswith(("index", "delta"))}
        model.load_state_dict(base)
    nk.load_adapter(model, tmp_path / "a.safetensors")
    assert {layer.save_activations for layer in layers_of(model)} == {"compact"}
    assert all(len(layer.columns) == 24 for layer in qkv_of(model))
    x = tokens()
    copies.clear()
    results = gradients(model, x)
    assert len(copies) == 3
    assert_same_bits(results, gradients(source, x))


def test_data_parallel_replicas_keep_what_the_layer_keeps():
    """They are shallow copies that are nobody's sibling."""
    model, x = block_of(save_activations="compact"), tokens()
    q = qkv_of(model)[0]
    replica = q._replicate_for_data_parallel()
    replica._parameters, replica._buffers = dict(q._parameters), dict(q._buffers)
    replica._buffers["index"] = q.index.clone()  # as on another device
    columns = q.columns
    replica(x).square().sum().backward()
    assert q.columns is columns
    expected, q.delta.grad = q.delta.grad, None
    q(x).square().sum().backward()
    assert q.delta.grad.equal(expected)
